// The loss chart: thin line for each step, thick line smoothed, dots for the validation loss, with the marks of the
// best save and of an early end.
import { t } from "../texts.js";

const MOST = 16384; // points; beyond this, every second one is dropped
const WEIGHT = 0.04; // weight of a new loss in the smoothed one

export class Curve {
  constructor() {
    this.steps = [];
    this.losses = [];
    this.smooth = [];
    this.validation = []; // [step, loss]
    this.best = null; // step of the kept save with the lowest validation loss
    this.end = null; // step at which the validation loss ended the run
    this._mean = 0;
    this._weight = 0;
  }

  get length() {
    return this.steps.length;
  }

  // Add a step's loss; skip values that are not finite, and steps that are already there.
  add(step, loss) {
    if (!Number.isFinite(loss) || step <= (this.steps.at(-1) ?? -1)) return;
    // Correct the bias toward zero, at which the average starts.
    this._mean += WEIGHT * (loss - this._mean);
    this._weight += WEIGHT * (1 - this._weight);
    this.steps.push(step);
    this.losses.push(loss);
    this.smooth.push(this._mean / this._weight);
    if (this.length > MOST) this._thin();
  }

  addValidation(step, loss) {
    if (Number.isFinite(loss) && step > (this.validation.at(-1)?.[0] ?? -1)) this.validation.push([step, loss]);
  }

  // Insert earlier points before the existing ones: pairs of step and loss, rising.
  prepend(points, validation) {
    const { steps, losses, validation: later, best, end } = this;
    Object.assign(this, new Curve(), { best, end });
    for (const [step, loss] of points) if (step < (steps[0] ?? Infinity)) this.add(step, loss);
    steps.forEach((step, place) => this.add(step, losses[place]));
    for (const [step, loss] of validation) if (step < (later[0]?.[0] ?? Infinity)) this.addValidation(step, loss);
    for (const [step, loss] of later) this.addValidation(step, loss);
  }

  // Return the index of the last point at or before a step, 0 if there is none.
  find(step) {
    let [low, high] = [0, this.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return Math.max(0, low - 1);
  }

  _thin() {
    for (const name of ["steps", "losses", "smooth"]) {
      this[name] = this[name].filter((_, place) => place % 2 === (this.length - 1) % 2);
    }
  }
}

const SCALE = 2; // canvas pixels per page pixel, since users zoom into the graph
const FONT = "10px system-ui, sans-serif";
const LEFT = 38;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 16;
const OUTLIERS = 0.01; // fraction of the losses that may lie beyond the chart's edge, on either side

export class Chart {
  // colors: function that returns the current {raw, smooth, checked, line, text}.
  constructor(canvas, colors) {
    this._canvas = canvas;
    this._colors = colors;
    this._size = [0, 0];
  }

  // Set the canvas's size on the page. Reading it at each drawing would force a layout.
  resize(width, height) {
    this._size = [Math.round(width), Math.round(height)];
    [this._canvas.width, this._canvas.height] = this._size.map((side) => side * SCALE);
  }

  // Draw a curve; pointed: the step under the pointer, or null.
  draw(curve, pointed) {
    const [width, height] = this._size;
    const pen = this._canvas.getContext("2d");
    pen.setTransform(SCALE, 0, 0, SCALE, 0, 0);
    pen.clearRect(0, 0, width, height);
    if (!curve.length || width < LEFT + RIGHT + 8 || height < TOP + BOTTOM + 8) return;
    const colors = this._colors();
    const frame = frameOf(curve, width, height);
    drawAxes(pen, frame, colors);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, TOP - 2, frame.right - LEFT + 2, frame.bottom - TOP + 4);
    pen.clip();
    pen.lineJoin = "round";
    drawRaw(pen, curve, frame, colors.raw);
    drawLine(pen, columnsOf(curve, curve.smooth, frame).map(({ x, last }) => [x, last]), frame, colors.smooth);
    drawChecked(pen, curve, frame, colors.checked);
    if (curve.best !== null) drawMark(pen, curve.best, t("Best"), frame.bottom - 4, frame, colors.checked);
    // A resumed run has left its early end behind.
    if (curve.end === curve.steps.at(-1)) drawMark(pen, curve.end, t("Early end"), TOP + 9, frame, colors.text);
    if (pointed !== null) drawPointed(pen, curve, pointed, frame, colors);
    pen.restore();
  }

  // Return the step at a horizontal position on the canvas, 0 at its left and 1 at its right.
  stepAt(curve, share) {
    const [width] = this._size;
    const { first, last } = rangeOf(curve);
    const inner = (share * width - LEFT) / Math.max(1, width - LEFT - RIGHT);
    return Math.round(first + Math.min(1, Math.max(0, inner)) * (last - first));
  }
}

function rangeOf(curve) {
  const first = curve.steps[0];
  return { first, last: Math.max(first + 1, curve.steps.at(-1)) };
}

function frameOf(curve, width, height) {
  const sorted = Float64Array.from(curve.losses).sort();
  const cut = Math.floor(sorted.length * OUTLIERS);
  const all = [sorted[cut], sorted[sorted.length - 1 - cut], ...curve.validation.map(([, loss]) => loss)];
  let [low, high] = [Infinity, -Infinity];
  for (const loss of all) [low, high] = [Math.min(low, loss), Math.max(high, loss)];
  for (const loss of curve.smooth) [low, high] = [Math.min(low, loss), Math.max(high, loss)];
  [low, high] = widen(low, high);
  const [right, bottom] = [width - RIGHT, height - BOTTOM];
  const { first, last } = rangeOf(curve);
  const x = (step) => LEFT + ((step - first) / (last - first)) * (right - LEFT);
  const y = (loss) => bottom - ((loss - low) / (high - low)) * (bottom - TOP);
  return { first, last, low, high, right, bottom, x, y };
}

// Return a range of losses with a margin; a single step has one value, or two that differ in the last digit.
export function widen(low, high) {
  const room = Math.max((high - low) * 0.06, Math.abs(high) * 0.02) || 1;
  return [low - room, high + room];
}

// Return about `count` round numbers within a range, each with its text.
export function ticksOf(low, high, count = 4) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const digits = Math.max(0, -Math.floor(Math.log10(gap)));
  const [first, last] = [Math.ceil(low / gap), Math.floor(high / gap)];
  return Array.from({ length: last - first + 1 }, (_, place) => {
    const tick = (first + place) * gap;
    return [tick, tick.toFixed(digits)];
  });
}

function drawAxes(pen, frame, colors) {
  pen.font = FONT;
  pen.fillStyle = colors.text;
  pen.strokeStyle = colors.line;
  pen.lineWidth = 1;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const [tick, text] of ticksOf(frame.low, frame.high)) {
    const y = Math.round(frame.y(tick)) + 0.5;
    if (y < TOP || y > frame.bottom) continue;
    pen.beginPath();
    pen.moveTo(LEFT, y);
    pen.lineTo(frame.right, y);
    pen.stroke();
    pen.fillText(text, LEFT - 5, y);
  }
  pen.textBaseline = "alphabetic";
  pen.textAlign = "left";
  pen.fillText(String(frame.first), LEFT, frame.bottom + 13);
  pen.textAlign = "right";
  pen.fillText(String(frame.last), frame.right, frame.bottom + 13);
}

// Return the lowest, highest and last value for each pixel column that holds points.
function columnsOf(curve, values, frame) {
  const columns = [];
  let column = null;
  for (let place = 0; place < values.length; place += 1) {
    const x = frame.x(curve.steps[place]);
    const value = values[place];
    if (column === null || x - column.x >= 1) {
      column = { x, low: value, high: value, last: value };
      columns.push(column);
    } else {
      column.low = Math.min(column.low, value);
      column.high = Math.max(column.high, value);
      column.last = value;
    }
  }
  return columns;
}

function drawRaw(pen, curve, frame, color) {
  pen.strokeStyle = color;
  pen.lineWidth = 1;
  pen.beginPath();
  columnsOf(curve, curve.losses, frame).forEach(({ x, low, high, last }, place) => {
    if (place === 0) pen.moveTo(x, frame.y(last));
    pen.lineTo(x, frame.y(low));
    pen.lineTo(x, frame.y(high));
    pen.lineTo(x, frame.y(last));
  });
  pen.stroke();
}

function drawLine(pen, points, frame, color) {
  pen.strokeStyle = color;
  pen.lineWidth = 2;
  pen.beginPath();
  for (const [x, loss] of points) pen.lineTo(x, frame.y(loss));
  pen.stroke();
}

function drawChecked(pen, curve, frame, color) {
  const points = curve.validation.map(([step, loss]) => [frame.x(step), loss]);
  drawLine(pen, points, frame, color);
  if (points.length > 60) return;
  pen.fillStyle = color;
  for (const [x, loss] of points) dot(pen, x, frame.y(loss), 2.5);
}

// Draw a named vertical line at a step; the name, at height y, is on the side that has more room.
function drawMark(pen, step, name, y, frame, color) {
  const x = Math.round(frame.x(step)) + 0.5;
  pen.strokeStyle = color;
  pen.lineWidth = 1;
  pen.setLineDash([3, 3]);
  pen.beginPath();
  pen.moveTo(x, TOP);
  pen.lineTo(x, frame.bottom);
  pen.stroke();
  pen.setLineDash([]);
  const isRight = x > (LEFT + frame.right) / 2;
  pen.fillStyle = color;
  pen.textAlign = isRight ? "right" : "left";
  pen.fillText(name, isRight ? x - 4 : x + 4, y);
}

function drawPointed(pen, curve, pointed, frame, colors) {
  const place = curve.find(pointed);
  const x = frame.x(curve.steps[place]);
  pen.strokeStyle = colors.text;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(x, TOP);
  pen.lineTo(x, frame.bottom);
  pen.stroke();
  pen.fillStyle = colors.smooth;
  dot(pen, x, frame.y(curve.smooth[place]), 3.5);
}

function dot(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}
