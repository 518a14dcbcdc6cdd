// One conversation with one model.

import { answer } from "./api.js";
import { announce, complain, find, isTyping, make, sendOnEnter, settings, withSystem, writer } from "./dom.js";

const messages = [];
let running = null;

function isNearEnd() {
  return innerHeight + scrollY >= document.body.scrollHeight - 80;
}

function button(label, onclick) {
  return make("button", { type: "button", className: "quiet", textContent: label, disabled: !!running, onclick });
}

function show() {
  find("messages").replaceChildren(...messages.map(shown));
  find("send").hidden = !!running;
  find("stop").hidden = !running;
  find("clear").disabled = !!running;
}

function shown(message, i) {
  const isUser = message.role === "user";
  const bar = make("div", { className: "bar" });
  if (isUser) bar.append(button("Edit", () => edit(i)));
  else if (i === messages.length - 1) bar.append(button("Retry", () => retry(i)));
  const item = make(
    "li",
    { className: `message ${message.role}` },
    make("h2", { textContent: isUser ? "You" : message.model }),
    make("p", { className: "text", textContent: message.content }),
  );
  if (message.note) item.append(make("p", { className: "note", textContent: message.note }));
  item.append(bar);
  return item;
}

function edit(i) {
  const text = make("textarea", { value: messages[i].content, rows: 3, required: true, ariaLabel: "Your message" });
  const form = make(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        if (running || !text.value.trim()) return;
        messages.length = i;
        say(text.value.trim());
      },
    },
    text,
    make("div", { className: "bar" }, make("button", { textContent: "Send" }), button("Cancel", show)),
  );
  sendOnEnter(text);
  find("messages").children[i].replaceChildren(form);
  text.focus();
}

function retry(i) {
  messages.length = i;
  reply();
}

function say(content) {
  messages.push({ role: "user", content });
  reply();
}

async function reply() {
  complain(null);
  const model = find("model").value;
  const asked = withSystem(messages.map(({ role, content }) => ({ role, content })));
  const message = { role: "assistant", content: "", model };
  messages.push(message);
  running = new AbortController();
  show();
  const item = find("messages").lastElementChild;
  item.ariaBusy = "true";
  scrollTo(0, document.body.scrollHeight);
  const text = writer(item.querySelector(".text"), (append) => {
    const follow = isNearEnd();
    append();
    if (follow) scrollTo(0, document.body.scrollHeight);
  });
  const onText = (piece) => {
    message.content += piece;
    text.write(piece);
  };
  try {
    const finish = await answer(model, asked, settings(), onText, running.signal);
    if (finish === "length") message.note = "Cut off at the token limit.";
    announce(`${model}: ${message.content}`);
  } catch (error) {
    const wasStopped = error.name === "AbortError";
    message.note = wasStopped ? "Stopped." : "Broken off.";
    if (!wasStopped) complain(error);
    if (!message.content) takeBack();
  }
  text.flush();
  running = null;
  show();
  if (!isTyping(document.activeElement)) find("message").focus();
}

// A message without an answer goes back to where it was written.
function takeBack() {
  const [{ content }] = messages.splice(-2);
  find("message").value ||= content;
}

export function stopChat() {
  running?.abort();
}

// Says of a model that was only pretrained why it does not answer.
function showBase(base) {
  const model = find("model").value;
  find("base").textContent = `${model} has learnt plain text alone, not conversations: it goes on writing instead of answering.`;
  find("base").hidden = !base.includes(model);
}

export function startChat(models, about) {
  find("model").replaceChildren(...models.map((model) => make("option", { textContent: model, value: model })));
  find("model").addEventListener("change", () => showBase(about.base));
  showBase(about.base);
  sendOnEnter(find("message"));
  find("say").addEventListener("submit", (event) => {
    event.preventDefault();
    const content = find("message").value.trim();
    if (!content || running) return;
    find("message").value = "";
    say(content);
  });
  find("stop").addEventListener("click", stopChat);
  find("clear").addEventListener("click", () => {
    messages.length = 0;
    complain(null);
    show();
    find("message").focus();
  });
  show();
}
