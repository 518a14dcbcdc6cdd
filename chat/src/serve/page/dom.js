// What both views share.

export const find = (id) => document.getElementById(id);

// An element with its properties and children; text is never taken for HTML.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function announce(text) {
  find("announce").textContent = text;
}

export function complain(error) {
  const problem = find("problem");
  problem.textContent = error ? error.message : "";
  problem.hidden = !error;
}

// Text that comes in pieces, put into an element once a frame: a small model writes faster than a page is laid out.
// `around` is given the function that does so.
export function writer(element, around = (append) => append()) {
  const node = element.appendChild(document.createTextNode(""));
  let waiting = "";
  let frame = 0;
  const flush = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    around(() => node.appendData(waiting));
    waiting = "";
  };
  const write = (piece) => {
    waiting += piece;
    frame ||= requestAnimationFrame(flush);
  };
  return { write, flush };
}

// Whether somebody is writing or choosing, so that the focus stays.
export const isTyping = (element) => element?.matches("textarea, select, input:not([type=checkbox])") ?? false;

// A count with its digits in groups.
export const grouped = (count) => count.toLocaleString("en");

const number = (id) => (find(id).value === "" ? undefined : Number(find(id).value));

// A seed may have 64 bits, of which a number keeps 53.
function wholeNumber(id) {
  const text = find(id).value;
  return /^-?\d+$/.test(text) ? BigInt(text) : number(id);
}

export function settings() {
  return {
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed: wholeNumber("seed"),
  };
}

// The messages with the system text before them.
export function withSystem(messages) {
  const system = find("system").value.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

// Enter sends, Shift+Enter starts a line; what an input method composes is not sent.
export function sendOnEnter(textarea) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      textarea.form.requestSubmit();
    }
  });
}
