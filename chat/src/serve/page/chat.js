// One conversation with one model.

import { answer } from "./api.js";
import { announce, complain, find, isTyping, make, sendOnEnter, settings, withSystem, writer } from "./dom.js";

const messages = [];
let running = null;

// Makes a change; who read the end of the conversation sees its end afterwards too.
function keepEnd(change) {
  const isNearEnd = innerHeight + scrollY >= document.body.scrollHeight - 80;
  change();
  if (isNearEnd) scrollTo(0, document.body.scrollHeight);
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

// Lets the message at `i` be written anew, beginning with `content`.
function edit(i, content = messages[i].content) {
  const text = make("textarea", { value: content, rows: 3, required: true, ariaLabel: "Your message" });
  const form = make(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        const edited = text.value.trim();
        if (running || !edited) return;
        // Without an answer it is being edited as before.
        ask([...messages.slice(0, i), { role: "user", content: edited }], () => edit(i, edited));
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
  ask(messages.slice(0, i));
  const item = find("messages").children[i];
  item.ariaBusy = "true";
  item.classList.add("outdated");
}

function say(content) {
  const box = find("message");
  // Without an answer it goes back to where it was written, before what was written there since.
  ask([...messages, { role: "user", content }], () => (box.value = [content, box.value].filter(Boolean).join("\n")));
}

// Asks for an answer to `asked`, which is the conversation then; if nothing comes, it is again what it was and `giveBack` is
// called. Without `giveBack` what is shown stays until the answer begins.
async function ask(asked, giveBack) {
  complain(null);
  const before = [...messages];
  const model = find("model").value;
  const message = { role: "assistant", content: "", model };
  let text = null;
  const begin = () => {
    messages.splice(0, Infinity, ...asked, message);
    show();
    const item = find("messages").lastElementChild;
    item.ariaBusy = "true";
    scrollTo(0, document.body.scrollHeight);
    text = writer(item.querySelector(".text"), keepEnd);
  };
  const onText = (piece) => {
    if (!text) begin();
    message.content += piece;
    text.write(piece);
  };
  running = new AbortController();
  if (giveBack) begin();
  else show();
  const sent = withSystem(asked.map(({ role, content }) => ({ role, content })));
  const answered = answer(model, sent, settings(), onText, running.signal);
  const { finish, error } = await answered.then((finish) => ({ finish }), (error) => ({ error }));
  running = null;
  const wasStopped = error?.name === "AbortError";
  keepEnd(() => {
    if (error && !wasStopped) complain(error);
    if (error && !message.content) {
      messages.splice(0, Infinity, ...before);
      show();
      giveBack?.();
      return;
    }
    if (!text) begin();
    text.flush();
    if (error) message.note = wasStopped ? "Stopped." : "Broken off.";
    else if (finish === "length") message.note = "Cut off at the token limit.";
    show();
  });
  if (!error) announce(`${model}: ${message.content}`);
  if (!isTyping(document.activeElement)) find("message").focus();
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
