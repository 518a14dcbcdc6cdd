// Curves over the steps of a run.

import { make } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 140;
// Most points of a curve that are drawn: one of each run of neighbours.
const MAX_POINTS = 400;

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A number with four digits that matter.
export function short(value) {
  if (value === 0 || !Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// Every n-th point and the last.
function thinned(points) {
  const every = Math.ceil(points.length / MAX_POINTS);
  return points.filter((_, i) => i % every === 0 || i === points.length - 1);
}

// The colour of each name, the same in every figure: held-out data has one of its own, and what is measured in training
// has the others.
function colours(names) {
  const left = [0, 2, 3];
  return names.map((name) => (/^val\/|\/val_/.test(name) ? 1 : left.length > 1 ? left.shift() : left[0]));
}

// A figure with a title and the curves of `series`, each `{ name, points: [[step, value], …] }`.
export function figure(title, series) {
  const points = series.flatMap((one) => one.points);
  const [steps, values] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const range = (all) => all.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);
  const [[first, last], [low, high]] = [range(steps), range(values)];
  const x = (step) => (last > first ? ((step - first) / (last - first)) * WIDTH : WIDTH / 2);
  const y = (value) => (high > low ? HEIGHT - ((value - low) / (high - low)) * HEIGHT : HEIGHT / 2);
  const said = series.map(({ name, points }) => {
    const [begin, end] = [points[0], points.at(-1)];
    return `${name}: ${short(begin[1])} at step ${begin[0]}, ${short(end[1])} at step ${end[0]}`;
  });
  const picture = draw("svg", { viewBox: `-2 -4 ${WIDTH + 4} ${HEIGHT + 8}`, role: "img", "aria-label": said.join("; ") });
  picture.append(draw("path", { class: "axes", d: `M0 0V${HEIGHT}H${WIDTH}` }));
  const zero = low < 0 && high > 0 ? [draw("path", { class: "zero", d: `M0 ${y(0)}H${WIDTH}` })] : [];
  picture.append(...zero);
  const colour = colours(series.map(({ name }) => name));
  series.forEach((one, i) => {
    const corners = thinned(one.points).map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
    // A path of one corner is shown by its round cap.
    const d = `M${corners.join("L")}${corners.length === 1 ? "h0" : ""}`;
    const kind = corners.length === 1 ? "dot" : "curve";
    picture.append(draw("path", { class: `${kind} curve-${colour[i]}`, d }));
  });
  const legend = make("ul", { className: "legend" });
  const tell = (step) => {
    const items = series.map(({ name, points }, i) => {
      const point = step === null ? points.at(-1) : points.findLast((point) => point[0] <= step) ?? points[0];
      return make("li", { className: `curve-${colour[i]}` }, make("span", { textContent: name }), ` ${short(point[1])}`);
    });
    legend.replaceChildren(...items, make("li", { textContent: `step ${step ?? last}` }));
  };
  tell(null);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    tell(Math.round(first + at * (last - first)));
  });
  picture.addEventListener("pointerleave", () => tell(null));
  const scale = make("p", { className: "note scale" }, `${short(low)} to ${short(high)}, steps ${first} to ${last}`);
  return make("figure", {}, make("figcaption", { textContent: title }), picture, scale, legend);
}
