// What runs of the stages measure, as they go on.

import { getJson, postJson } from "./api.js";
import { figure, short } from "./curves.js";
import { complain, find, grouped, make } from "./dom.js";

// Between two looks at a run, in milliseconds.
const EVERY = 2000;

// The figures that matter, and the metrics that each shows where a run has them.
const FIGURES = [
  ["Loss (nats)", ["train/loss", "val/loss"]],
  ["Reward", ["objective/score", "objective/rlhf_reward", "val/score"]],
  ["Gold score", ["gold/score", "gold/val_score"]],
  ["KL from the reference (nats)", ["objective/kl", "val/kl"]],
  ["Accuracy", ["train/accuracy", "val/accuracy", "rewards/accuracies"]],
  ["Margin", ["train/margin", "val/margin", "rewards/margins"]],
  ["Length of responses (tokens)", ["rollout/response_length", "val/response_length"]],
];

let timer = null;
// Counts the times that one began to look, of which only the last goes on.
let turn = 0;
// The run that is shown: its name, the byte up to which its metrics are read, and the points of each metric.
let run = null;

function begin(name) {
  run = { name, next: 0, curves: new Map(), last: null };
  for (const id of ["curves", "other-curves", "samples"]) find(id).replaceChildren();
  find("more-curves").hidden = find("samples-title").hidden = true;
  find("progress").textContent = "";
}

function take(row) {
  // A run that was resumed goes on from an earlier step.
  if (run.last && row.step < run.last.step) {
    for (const points of run.curves.values()) while (points.length && points.at(-1)[0] > row.step) points.pop();
  }
  run.last = row;
  for (const [name, value] of Object.entries(row)) {
    if (!name.includes("/") || typeof value !== "number") continue;
    if (!run.curves.has(name)) run.curves.set(name, []);
    run.curves.get(name).push([row.step, value]);
  }
}

function showCurves() {
  const seriesOf = (names) =>
    names.filter((name) => run.curves.get(name)?.length).map((name) => ({ name, points: run.curves.get(name) }));
  const shown = FIGURES.map(([title, names]) => [title, seriesOf(names)]).filter(([, series]) => series.length);
  find("curves").replaceChildren(...shown.map(([title, series]) => figure(title, series)));
  const listed = new Set(FIGURES.flatMap(([, names]) => names));
  const others = seriesOf([...run.curves.keys()].filter((name) => !listed.has(name)).sort());
  find("more-curves").hidden = !others.length;
  find("other-curves").replaceChildren(...others.map((series) => figure(series.name, [series])));
  find("progress").textContent = progressOf(run.last);
}

// How far a run is, as far as its row says.
function progressOf({ step, seconds, tokens }) {
  const parts = [`Step ${grouped(step)}`];
  if (typeof seconds === "number") parts.push(`${grouped(Math.round(seconds))} s`);
  if (typeof tokens === "number") parts.push(`${grouped(tokens)} tokens`);
  return parts.join(" · ");
}

function shownSample(sample) {
  const numbers = ["score", "gold", "kl"].filter((name) => typeof sample[name] === "number");
  const said = [`Step ${sample.step}`, ...numbers.map((name) => `${name} ${short(sample[name])}`)];
  const item = make("li", {}, make("p", { className: "note", textContent: said.join(", ") }));
  if (sample.prompt) item.append(make("p", { className: "text prompt", textContent: sample.prompt }));
  item.append(make("p", { className: "text", textContent: sample.response ?? sample.text ?? "" }));
  return item;
}

async function look() {
  const looked = run;
  let isNew = false;
  for (let isAll = false; !isAll; ) {
    const reply = await postJson("training/rows", { run: looked.name, from: looked.next });
    if (run !== looked) return;
    if (reply.from !== looked.next) {
      looked.curves.clear();
      looked.last = null;
    }
    reply.rows.forEach(take);
    isNew ||= reply.rows.length > 0;
    isAll = reply.is_all || reply.next === looked.next;
    looked.next = reply.next;
  }
  if (!isNew) return;
  showCurves();
  const { samples } = await postJson("training/samples", { run: looked.name });
  if (run !== looked) return;
  find("samples").replaceChildren(...samples.map(shownSample));
  find("samples-title").hidden = !samples.length;
}

async function listRuns() {
  const { runs } = await getJson("training/runs");
  const names = runs.map(({ name }) => name);
  if (!names.length && !run) find("progress").textContent = "There are no runs yet.";
  const known = [...find("run").options].map((option) => option.value);
  if (names.length === known.length && names.every((name) => known.includes(name))) return;
  find("run").replaceChildren(...names.map((name) => make("option", { textContent: name, value: name })));
  if (run && names.includes(run.name)) find("run").value = run.name;
  else if (names.length) begin(names[0]);
}

// Looks again and again while the view is shown.
export function showTraining(isShown) {
  clearTimeout(timer);
  turn += 1;
  if (!isShown) return;
  const mine = turn;
  const again = async () => {
    try {
      if (!document.hidden) {
        await listRuns();
        if (run) await look();
      }
      complain(null);
    } catch (error) {
      complain(error);
    }
    if (mine === turn) timer = setTimeout(again, EVERY);
  };
  again();
}

export function startTraining() {
  find("run").addEventListener("change", (event) => {
    begin(event.target.value);
    showTraining(true);
  });
}
