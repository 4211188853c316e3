// Curves of runs as SVG, which follows the theme by itself.
import { ticksOf, widen } from "../panel/chart.js";

const SPACE = "http://www.w3.org/2000/svg";
const [LEFT, RIGHT, TOP, BOTTOM] = [44, 10, 10, 20];
const HEIGHT = 220;

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Return a small curve without axes, hidden from screen readers: the text beside it says the same.
export function drawSpark(curve) {
  const [width, height] = [100, 24];
  const svg = draw("svg", { class: "graft-spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  svg.setAttribute("aria-hidden", "true");
  if (curve.length > 1) {
    const frame = frameOf([{ curve, checked: [] }], [1, width - 1], [height - 2, 2]);
    svg.append(draw("polyline", { points: pointsOf(curve, frame), "vector-effect": "non-scaling-stroke" }));
  }
  return svg;
}

// Draw the curves of runs over each other; the dots are validation losses.
// label: the curves in words; point: called with the step under the pointer, or null.
export function drawCurves(runs, width, label, point) {
  const svg = draw("svg", { class: "graft-curves", width, height: HEIGHT, role: "img", "aria-label": label });
  const shown = runs.filter(({ curve, checked }) => curve.length || checked.length);
  if (!shown.length) return svg;
  const frame = frameOf(shown, [LEFT, width - RIGHT], [HEIGHT - BOTTOM, TOP]);
  drawAxes(svg, frame, width);
  runs.forEach(({ curve, checked }, place) => {
    const group = draw("g", { "data-run": place % 6 });
    if (curve.length) group.append(draw("polyline", { points: pointsOf(curve, frame) }));
    for (const [step, loss] of checked) group.append(draw("circle", { cx: frame.x(step), cy: frame.y(loss), r: 2.5 }));
    svg.append(group);
  });
  letPoint(svg, frame, point);
  return svg;
}

function letPoint(svg, frame, point) {
  const line = draw("line", { class: "graft-pointed", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(line);
  svg.addEventListener("pointermove", (event) => {
    const step = frame.stepAt(event.clientX - svg.getBoundingClientRect().left);
    for (const side of ["x1", "x2"]) line.setAttribute(side, frame.x(step));
    line.setAttribute("visibility", "visible");
    point(step);
  });
  svg.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    point(null);
  });
}

function drawAxes(svg, frame, width) {
  for (const [tick, text] of ticksOf(frame.low, frame.high, 6)) {
    const y = Math.round(frame.y(tick)) + 0.5;
    svg.append(draw("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
    svg.append(draw("text", { x: LEFT - 6, y: y + 3.5, "text-anchor": "end" }, text));
  }
  const y = HEIGHT - 5;
  svg.append(draw("text", { x: LEFT, y }, String(frame.first)));
  svg.append(draw("text", { x: width - RIGHT, y, "text-anchor": "end" }, String(frame.last)));
}

// Return the scales of steps and losses. across, down: [position of the first or lowest, of the last or highest].
function frameOf(runs, across, down) {
  const points = runs.flatMap(({ curve, checked }) => [...curve, ...checked]);
  let [first, last, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [step, loss] of points) {
    [first, last] = [Math.min(first, step), Math.max(last, step)];
    [low, high] = [Math.min(low, loss), Math.max(high, loss)];
  }
  [low, high] = widen(low, high);
  const scale = (value, from, to, [start, end]) => start + ((value - from) / (to - from || 1)) * (end - start);
  const x = (step) => scale(step, first, last, across);
  const y = (loss) => scale(loss, low, high, down);
  const stepAt = (place) => Math.round(Math.min(last, Math.max(first, scale(place, ...across, [first, last]))));
  return { first, last, low, high, x, y, stepAt };
}

function pointsOf(curve, frame) {
  return curve.map(([step, loss]) => `${frame.x(step).toFixed(1)},${frame.y(loss).toFixed(1)}`).join(" ");
}
