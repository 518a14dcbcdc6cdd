// Several models answer one message, unnamed and in random order, until a person has judged.

import { answer, postJson } from "./api.js";
import { announce, complain, find, isTyping, make, sendOnEnter, settings, withSystem, writer } from "./dom.js";

const LETTERS = ["A", "B", "C", "D"];

// What is being judged: `messages`, `answers` of `{ model, text }` in the order shown, and when they were all there.
let round = null;
let running = null;
// What was judged last, so that it can be taken back.
let judged = null;

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
  find("undo").hidden = !judged || !!running;
  find("ask-send").hidden = !!running;
  find("ask-stop").hidden = !running;
}

async function ask(content) {
  complain(null);
  const models = chosenModels();
  if (models.length < 2 || models.length > 4) {
    complain(new Error("Choose two to four models to compare."));
    return;
  }
  judged = null;
  find("verdict").textContent = "";
  const messages = withSystem([{ role: "user", content }]);
  round = { messages, answers: shuffled(models).map((model) => ({ model, text: "" })), since: null, isJudged: false };
  running = new AbortController();
  const texts = round.answers.map(() => make("p", { className: "text" }));
  const item = (text, i) => make("li", { ariaBusy: "true" }, make("h2", { textContent: LETTERS[i] }), text);
  find("answers").replaceChildren(...texts.map(item));
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
    if (error.name !== "AbortError") complain(error);
  }
  running = null;
  showButtons();
  if (round && !isTyping(document.activeElement)) find("verdicts").firstElementChild.focus();
}

async function judge(verdict) {
  if (!round?.since || round.isJudged) return;
  round.isJudged = true;
  const seconds = Math.round(performance.now() - round.since) / 1000;
  const annotator = find("annotator").value.trim() || undefined;
  const { messages, answers } = round;
  try {
    const reply = await postJson("compare/judge", { messages, answers, verdict, annotator, seconds });
    judged = { round, kept: reply.kept };
    [...find("answers").children].forEach((item, i) => {
      const score = reply.scores ? `, score ${reply.scores[i].toFixed(2)}` : "";
      item.append(make("p", { className: "note", textContent: answers[i].model + score }));
      item.classList.toggle("best", verdict === i);
    });
    const said = { tie: "Judged alike.", bad: "Judged bad." }[verdict] ?? `${LETTERS[verdict]} judged best.`;
    find("verdict").textContent = `${said} N: the next message.`;
  } catch (error) {
    round.isJudged = false;
    complain(error);
  }
  showButtons();
  find(round.isJudged ? "undo" : "question").focus();
}

async function undo() {
  if (!judged) return;
  try {
    if (judged.kept) await postJson("compare/undo", { id: judged.kept });
  } catch (error) {
    complain(error);
    return;
  }
  round = judged.round;
  judged = null;
  round.isJudged = false;
  round.since = performance.now();
  find("answers").querySelectorAll(".note").forEach((note) => note.remove());
  find("answers").querySelectorAll("li").forEach((item) => item.classList.remove("best"));
  find("verdict").textContent = "Taken back.";
  showButtons();
  find("verdicts").firstElementChild.focus();
}

export function stopCompare() {
  running?.abort();
}

// A key of the comparison; whether it was one.
export function compareKey(key) {
  const verdicts = { t: "tie", x: "bad" };
  const at = LETTERS.indexOf(key.toUpperCase());
  if (key === "u") undo();
  else if (key === "n" && !running) find("question").select();
  else if (at >= 0 && find("verdicts").childElementCount > at + 2) judge(at);
  else if (key in verdicts) judge(verdicts[key]);
  else return false;
  return true;
}

export function startCompare(models, about) {
  const box = (model, i) =>
    make("label", {}, make("input", { type: "checkbox", value: model, checked: i < 4 }), ` ${model}`);
  find("rivals").append(...models.map(box));
  const lacks = [];
  if (models.length < 2) lacks.push("There is one model only: start the server with several --checkpoint to compare them.");
  if (!about.labels) lacks.push("Judgements are not kept: start the server with --labels FILE to keep them.");
  find("lacks").textContent = lacks.join(" ");
  find("annotator").value = localStorage.getItem("annotator") ?? "";
  find("annotator").addEventListener("change", (event) => localStorage.setItem("annotator", event.target.value));
  sendOnEnter(find("question"));
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const content = find("question").value.trim();
    if (content && !running) ask(content);
  });
  find("ask-stop").addEventListener("click", stopCompare);
  find("undo").addEventListener("click", undo);
  showButtons();
}
