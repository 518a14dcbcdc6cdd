// The page: its views, its theme and its key.

import { getJson, NeedsKey, setKey } from "./api.js";
import { startChat, stopChat } from "./chat.js";
import { compareKey, startCompare, stopCompare } from "./compare.js";
import { complain, find, isTyping } from "./dom.js";
import { showTraining, startTraining } from "./training.js";

const TABS = ["chat", "compare", "training"];

function open(tab) {
  for (const name of TABS) {
    find(name).hidden = name !== tab;
    find(`tab-${name}`).setAttribute("aria-selected", String(name === tab));
    find(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  // The settings are those of answers.
  find("settings").hidden = tab === "training";
  showTraining(tab === "training");
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  find("theme").textContent = theme === "dark" ? "Light" : "Dark";
  find("theme").setAttribute("aria-label", `Use the ${theme === "dark" ? "light" : "dark"} theme`);
}

async function start() {
  try {
    const models = (await getJson("v1/models")).data.map((model) => model.id);
    const about = await getJson("about");
    find("login").hidden = true;
    find("views").hidden = false;
    complain(null);
    startChat(models, about);
    startCompare(models, about);
    find("tab-training").hidden = !about.training;
    if (about.training) startTraining();
    find("message").focus();
  } catch (error) {
    find("login").hidden = !(error instanceof NeedsKey);
    complain(error);
  }
}

for (const name of TABS) {
  find(`tab-${name}`).addEventListener("click", () => {
    complain(null);
    open(name);
  });
  find(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const shown = TABS.filter((tab) => !find(`tab-${tab}`).hidden);
    const step = event.key === "ArrowLeft" ? shown.length - 1 : 1;
    const next = shown[(shown.indexOf(name) + step) % shown.length];
    complain(null);
    open(next);
    find(`tab-${next}`).focus();
  });
}
// What was wrong with them may be right now.
find("settings").addEventListener("input", () => complain(null));
find("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", theme);
  setTheme(theme);
});
find("login").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(find("key").value);
  start();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    stopChat();
    stopCompare();
  }
  // A key that is held down says once what it says.
  const isPlain = !event.ctrlKey && !event.metaKey && !event.altKey && !event.repeat;
  if (!find("compare").hidden && !isTyping(event.target) && isPlain && compareKey(event.key)) event.preventDefault();
});
// The system's theme, which may change while the page is open, until a person has chosen one.
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const showTheme = () => setTheme(localStorage.getItem("theme") ?? (systemIsDark.matches ? "dark" : "light"));
systemIsDark.addEventListener("change", showTheme);
showTheme();
start();
