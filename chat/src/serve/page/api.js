// Requests to the server that this page came from.

const ENDED_EARLY = "The answer ended early: the server has stopped.";

let key = sessionStorage.getItem("key");

export class NeedsKey extends Error {}

export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

// `json` is the body's text.
async function send(path, method, json, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const asked = fetch(path, { method, headers, signal, body: json });
  const response = await asked.catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  });
  if (response.status === 401) throw new NeedsKey(key ? "The server does not take this key." : "This server asks for a key.");
  if (!response.ok) {
    const said = await response.json().catch(() => null);
    throw new Error(said?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

export const getJson = async (path) => (await send(path, "GET")).json();
export const postJson = async (path, body) => (await send(path, "POST", JSON.stringify(body))).json();

// JSON of `fields`, of which there are some, with a seed that keeps all its digits: `JSON.stringify` takes no BigInt.
function withSeed(seed, fields) {
  const json = JSON.stringify(fields);
  return seed === undefined ? json : `{"seed":${seed},${json.slice(1)}`;
}

// The answer to `messages`, told to `onText` as it comes. Returns why it ended.
export async function answer(model, messages, settings, onText, signal) {
  const { seed, ...others } = settings;
  const json = withSeed(seed, { model, messages, stream: true, ...others });
  const response = await send("v1/chat/completions", "POST", json, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let finish = null;
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(ENDED_EARLY);
    });
    if (done) throw new Error(ENDED_EARLY);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return finish;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice?.delta.content) onText(choice.delta.content);
      finish = choice?.finish_reason ?? finish;
    }
  }
}
