// Several models answer one message, unnamed and in random order, until a person has judged; or the server has pairs of
// answers that somebody wants to be judged.

import { answer, postJson } from "./api.js";
import { announce, complain, find, grouped, isTyping, make, sendOnEnter, settings, withSystem, writer } from "./dom.js";

const LETTERS = ["A", "B", "C", "D"];

// What is being judged: `messages`, `answers` of `{ model, text }` in the order shown, and when they were all there.
let round = null;
let running = null;
// What was judged, the last one last, so that it can be taken back step by step.
let judged = [];
// What was being judged when an earlier judgement was taken back; it comes again.
let waiting = [];
// Whether the server is being asked to keep a judgement or to take it back.
let isSaving = false;

function shuffled(items) {
  const order = [...items];
  for (let i = order.length - 1; i > 0; i--) {
    const j = crypto.getRandomValues(new Uint32Array(1))[0] % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

function isOneText(answers) {
  return new Set(answers.map(({ text }) => text)).size === 1;
}

function chosenModels() {
  return [...find("rivals").querySelectorAll("input:checked")].map((input) => input.value);
}

const annotator = () => find("annotator").value.trim() || undefined;

function showButtons() {
  const n = round?.answers.length ?? 0;
  const areAlike = !!round && isOneText(round.answers);
  const choice = (label, key, verdict) =>
    make("button", { type: "button", textContent: `${label} (${key})`, onclick: () => judge(verdict) });
  find("verdicts").replaceChildren(
    ...LETTERS.slice(0, areAlike ? 0 : n).map((letter, i) => choice(`${letter} is best`, letter, i)),
    choice(n > 2 ? "All alike" : "Tie", "T", "tie"),
    choice(n > 2 ? "All bad" : "Both bad", "X", "bad"),
  );
  find("verdicts").hidden = !round?.since || round.isJudged;
  find("undo").hidden = judged.length === 0 || !!running;
  find("next").hidden = !round?.isJudged || (waiting.length === 0 && round.number === undefined);
  find("ask-send").hidden = !!running;
  find("ask-stop").hidden = !running;
}

// Shows the round's message and its answers, which may still be empty; returns the elements of their texts.
function showRound() {
  const texts = round.answers.map(({ text }) => make("p", { className: "text", textContent: text }));
  const item = (text, i) => make("li", {}, make("h2", { textContent: LETTERS[i] }), text);
  find("answers").replaceChildren(...texts.map(item));
  const turns = round.messages.filter(({ role }) => role !== "system");
  const isAlone = turns.length === 1;
  find("asked").textContent = turns.map(({ role, content }) => (isAlone ? content : `${role}: ${content}`)).join("\n\n");
  find("asked-before").hidden = false;
  return texts;
}

async function ask(content) {
  complain(null);
  const models = chosenModels();
  if (models.length < 2 || models.length > 4) {
    complain(new Error("Choose two to four models to compare."));
    return;
  }
  waiting = [];
  find("question").value = "";
  find("verdict").textContent = "";
  const messages = withSystem([{ role: "user", content }]);
  round = { messages, answers: shuffled(models).map((model) => ({ model, text: "" })), since: null, isJudged: false };
  running = new AbortController();
  const texts = showRound();
  texts.forEach((text) => (text.parentElement.ariaBusy = "true"));
  showButtons();
  // Letters are a judgement from now on, not the end of the message.
  find("answers").focus();
  const one = async (rival, i) => {
    const text = writer(texts[i]);
    const onText = (piece) => {
      rival.text += piece;
      text.write(piece);
    };
    await answer(rival.model, messages, settings(), onText, running.signal);
    text.flush();
    texts[i].parentElement.ariaBusy = null;
  };
  try {
    await Promise.all(round.answers.map(one));
    round.since = performance.now();
    announce(isOneText(round.answers) ? "All have given the same answer." : "All have answered: which is best?");
  } catch (error) {
    running.abort();
    round = null;
    find("answers").replaceChildren();
    find("asked-before").hidden = true;
    // A message without answers goes back to where it was written.
    find("question").value ||= content;
    if (error.name !== "AbortError") complain(error);
  }
  running = null;
  showButtons();
  // The group of the buttons, not the first of them: who presses Enter once too often has judged nothing.
  if (round && !isTyping(document.activeElement)) find("verdicts").focus();
}

async function judge(verdict) {
  if (!round?.since || round.isJudged || isSaving) return;
  isSaving = true;
  round.isJudged = true;
  const seconds = Math.round(performance.now() - round.since) / 1000;
  const { messages, answers } = round;
  try {
    const reply = await postJson("compare/judge", { messages, answers, verdict, annotator: annotator(), seconds });
    judged.push({ round, kept: reply.kept });
    [...find("answers").children].forEach((item, i) => {
      const known = [answers[i].model, reply.scores && `score ${reply.scores[i].toFixed(2)}`].filter(Boolean);
      if (known.length > 0) item.append(make("p", { className: "note", textContent: known.join(", ") }));
      item.classList.toggle("best", verdict === i);
    });
    const said = { tie: "Judged alike.", bad: "Judged bad." }[verdict] ?? `${LETTERS[verdict]} judged best.`;
    const next = waiting.length > 0 ? "answers" : round.number === undefined ? "message" : "pair";
    find("verdict").textContent = `${said} N: the next ${next}.`;
  } catch (error) {
    round.isJudged = false;
    complain(error);
  }
  isSaving = false;
  showButtons();
  find(round.isJudged ? "judged" : "verdicts").focus();
}

// Takes the last judgement back, then the one before it. What is on the screen comes again afterwards.
async function undo() {
  if (judged.length === 0 || isSaving || running) return;
  const { round: last, kept } = judged.at(-1);
  isSaving = true;
  try {
    if (kept) await postJson("compare/undo", { id: kept });
  } catch (error) {
    complain(error);
    return;
  } finally {
    isSaving = false;
  }
  judged.pop();
  if (round && round !== last) waiting.push(round);
  judgeAgain(last, "Taken back.");
}

function judgeAgain(earlier, said) {
  complain(null);
  round = earlier;
  round.isJudged = false;
  round.since = performance.now();
  showRound();
  find("verdict").textContent = said;
  showButtons();
  find("verdicts").focus();
}

// On to what waits to be judged, or to a new message.
function next() {
  if (running || isSaving) return;
  if (round?.isJudged && waiting.length > 0) judgeAgain(waiting.pop(), "");
  else if (round?.number !== undefined) askPair();
  else find("question").focus();
}

// Asks the server for the next pair of its file; one that is not judged is skipped.
async function askPair() {
  if (running || isSaving) return;
  complain(null);
  isSaving = true;
  let reply;
  try {
    reply = await postJson("compare/question", { annotator: annotator(), after: round?.number });
  } catch (error) {
    complain(error);
    return;
  } finally {
    isSaving = false;
  }
  find("pairs-judged").textContent = `${grouped(reply.judged)} of ${grouped(reply.n)} judged.`;
  waiting = [];
  if (!reply.question) {
    find("verdict").textContent = "All pairs are judged.";
    showButtons();
    return;
  }
  const { number, messages, answers } = reply.question;
  round = { messages, answers: shuffled(answers.map((text) => ({ text }))), since: performance.now(), isJudged: false, number };
  showRound();
  find("verdict").textContent = "";
  showButtons();
  find("verdicts").focus();
}

export function stopCompare() {
  running?.abort();
}

// A key of the comparison, whichever case it is in; whether it was one.
export function compareKey(key) {
  const verdicts = { T: "tie", X: "bad" };
  const letter = key.toUpperCase();
  const at = LETTERS.indexOf(letter);
  if (letter === "U") undo();
  else if (letter === "N") next();
  else if (at >= 0 && find("verdicts").childElementCount > at + 2) judge(at);
  else if (letter in verdicts) judge(verdicts[letter]);
  else return false;
  return true;
}

export function startCompare(models, about) {
  const box = (model, i) =>
    make("label", {}, make("input", { type: "checkbox", value: model, checked: i < 4 }), ` ${model}`);
  find("rivals").append(...models.map(box));
  // How many there are may be right now.
  find("rivals").addEventListener("change", () => complain(null));
  find("rivals").hidden = find("ask").hidden = models.length < 2;
  const lacks = [];
  if (models.length < 2 && about.questions === 0) lacks.push("There is one model only: start the server with several --checkpoint to compare them.");
  if (!about.labels) lacks.push("Judgements are not kept: start the server with --labels FILE to keep them.");
  find("lacks").textContent = lacks.join(" ");
  find("annotator").value = localStorage.getItem("annotator") ?? "";
  find("annotator").addEventListener("change", (event) => localStorage.setItem("annotator", event.target.value));
  sendOnEnter(find("question"));
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const content = find("question").value.trim();
    if (content && !running && !isSaving) ask(content);
  });
  find("ask-stop").addEventListener("click", stopCompare);
  find("undo").addEventListener("click", undo);
  find("next").addEventListener("click", next);
  find("pairs").hidden = about.questions === 0;
  find("pairs-judged").textContent = `${grouped(about.questions)} pairs wait for you.`;
  find("ask-pair").addEventListener("click", askPair);
  showButtons();
}
