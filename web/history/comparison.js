// Several runs compared: curves, sample pictures and the settings in which they differ.
import { ticksOf, widen } from "../panel/chart.js";
import { button, make, openDialog, say } from "../panel/make.js";
import { makeChoice, makePick, makeThumb, markPicked, nameOf, openViewer } from "../panel/strip.js";
import { samplesByStep } from "../panel/training.js";
import { formatLoss, formatRate } from "../panel/words.js";
import { t } from "../texts.js";
import { iconButton, lossesOf, stateOf, titleOf } from "./card.js";

// Settings that only decide the names of a run's files.
const PASSED_OVER = new Set(["recipe.name", "recipe.on_existing"]);

// Return {name: text} of everything that made a run, nested names joined by points: objective.loss.
function flatten(run) {
  const rows = {};
  const add = (name, value) => {
    if (PASSED_OVER.has(name)) return;
    if (value !== null && typeof value === "object" && !Array.isArray(value)) {
      for (const [key, part] of Object.entries(value)) add(name ? `${name}.${key}` : key, part);
    } else {
      rows[name.replace(/^(recipe|made_from)\./, "")] = textOf(value);
    }
  };
  add("recipe", run.recipe);
  add("", run.facts);
  return rows;
}

function textOf(value) {
  if (Array.isArray(value)) return value.map(textOf).join(", ");
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(6)));
  // The first digits suffice to tell digests apart.
  if (typeof value === "string" && /^[0-9a-f]{40,}$/.test(value)) return value.slice(0, 8);
  return value === null || value === undefined ? "" : String(value);
}

// Return [name, texts by run, whether they differ] of every setting, sorted by name.
export function compare(runs) {
  const rows = runs.map(flatten);
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))].sort();
  return names.map((name) => {
    const values = rows.map((row) => row[name] ?? "");
    return [name, values, values.some((value) => value !== values[0])];
  });
}

// Return the main settings of a run in one line: LoRA, SD1, rank 16, 1e-4.
export function shortly({ recipe }) {
  const rate = recipe.learning_rate || recipe.embedding_learning_rate;
  const parts = [recipe.method, recipe.family, recipe.rank ? `${t("rank")} ${recipe.rank}` : "", rate ? formatRate(rate) : ""];
  return parts.filter(Boolean).join(", ");
}

// Open the dialog. runs: as the history lists them, each with its samples and saves; acts: {imageUrl, open, use}.
export function openComparison(runs, acts) {
  const title = runs.length > 1 ? t("Compare runs") : titleOf(runs[0]);
  const close = iconButton("pi-times", t("Close"), () => dialog.close());
  const dialog = make(
    "dialog",
    { class: "graft-comparison", "aria-label": title },
    make("header", {}, make("h2", {}, title), close),
    makeLegend(runs, (name) => {
      dialog.close();
      acts.open(name);
    }),
    makeChart(runs),
    ...makeSamples(runs, acts),
    ...makeSaves(runs, (run, step) => {
      dialog.close();
      acts.use(run, step);
    }),
    ...makeRecipes(runs),
  );
  openDialog(dialog);
}

function makeHead(...names) {
  return make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));
}

// Return a wide element that scrolls by itself, also with the keyboard.
function makeScroller(label, content) {
  return make("div", { class: "graft-scroller", role: "region", "aria-label": label, tabindex: 0 }, content);
}

function makeLegend(runs, open) {
  const rows = runs.map((run, place) => {
    const swatch = make("i", { class: "graft-key", "data-run": place % 6, "aria-hidden": "true" });
    const opening = iconButton("pi-folder-open", `${t("Open workflow")}: ${run.name}`, () => open(run.name));
    opening.disabled = !run.has_graph;
    const [, checked] = run.checked.at(-1) ?? [];
    return make(
      "tr",
      {},
      make("th", { scope: "row", title: run.name }, swatch, titleOf(run)),
      make("td", {}, stateOf(run)),
      make("td", {}, run.final === null ? "" : lossesOf(run)),
      make("td", {}, formatLoss(checked)),
      make("td", {}, opening),
    );
  });
  const names = [t("Run"), t("State"), t("Loss"), t("Validation"), t("Open workflow")];
  return makeScroller(t("Run"), make("table", {}, makeHead(...names), make("tbody", {}, ...rows)));
}

function makeChart(runs) {
  const place = make("div", { class: "graft-plot" });
  const legend = t("Lines: smoothed loss. Dots: validation loss.");
  const caption = make("p", { class: "graft-quiet" }, legend);
  const point = (step) => say(caption, step === null ? legend : pointed(runs, step));
  const label = `${t("Loss")}: ${runs.map((run) => `${run.name} ${lossesOf(run)}`).join("; ")}`;
  const sized = new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width) place.replaceChildren(drawCurves(runs, Math.floor(contentRect.width), label, point));
  });
  sized.observe(place);
  return make("div", {}, place, caption);
}

function pointed(runs, step) {
  const losses = runs.map(({ name, title, curve }) => {
    const [, loss] = curve.findLast(([earlier]) => earlier <= step) ?? [];
    return `${title || name} ${formatLoss(loss)}`;
  });
  return t("Step $step: $losses", { step, losses: losses.join(", ") });
}

// Return a row of pictures per run and a column per step of any run; nothing if no run has pictures.
function makeSamples(runs, acts) {
  const known = runs.map((run) => samplesByStep(run.samples));
  const steps = [...new Set(known.flatMap((byStep) => [...byStep.keys()]))].sort((a, b) => a - b);
  if (!steps.length) return [];
  const body = make("tbody");
  const show = (prompt) => {
    const rows = runs.map((run, place) => {
      const pictures = steps.filter((step) => known[place].get(step)?.[prompt]).map((step) => {
        const url = acts.imageUrl(known[place].get(step)[prompt], run.changed);
        return { step, url, name: `${run.name}: ${nameOf(step)}` };
      });
      const cells = steps.map((step) => makeCell(pictures, pictures.findIndex((picture) => picture.step === step)));
      return make("tr", {}, make("th", { scope: "row", title: run.name }, titleOf(run)), ...cells);
    });
    body.replaceChildren(...rows);
  };
  const count = Math.max(...known.flatMap((byStep) => [...byStep.values()].map((samples) => samples.length)));
  show(0);
  const table = make("table", { class: "graft-samples" }, makeHead(t("Run"), ...steps.map(nameOf)), body);
  const heading = make("div", { class: "graft-heading" }, make("h3", {}, t("Sample pictures")));
  if (count > 1) heading.append(makePrompts(count, show));
  return [heading, makeScroller(t("Sample pictures"), table)];
}

// Return a button for each saved step of one run; nothing for several runs, or without saves.
function makeSaves(runs, use) {
  const [{ saves }] = runs;
  if (runs.length > 1 || !saves.length) return [];
  const buttons = saves.map((step) => button(t("Use step $step", { step }), () => use(runs[0], step)));
  const heading = make("div", { class: "graft-heading" }, make("h3", {}, t("Saved steps")));
  const meaning = t("Copies the saved step to where LoRA loaders list it, and adds a loader.");
  return [heading, make("p", { class: "graft-quiet" }, meaning), make("div", { class: "graft-buttons" }, ...buttons)];
}

function makeCell(pictures, place) {
  if (place < 0) return make("td");
  const { url, name } = pictures[place];
  const thumb = makeThumb(name, null, () => openViewer(pictures, place));
  thumb.image.src = url;
  return make("td", {}, thumb.button);
}

function makePrompts(count, show) {
  const pick = (number) => {
    markPicked(choice, number);
    show(number);
  };
  const choice = makeChoice(...Array.from({ length: count }, (_, number) => makePick(number, () => pick(number))));
  markPicked(choice, 0);
  return choice;
}

function makeRecipes(runs) {
  const rows = compare(runs);
  const isOne = runs.length === 1;
  const body = make("tbody");
  const none = make("p", { class: "graft-quiet" }, t("All settings are the same."));
  const head = makeHead(t("Setting"), ...runs.map(titleOf));
  const name = isOne ? t("Settings") : t("Different settings");
  const scroller = makeScroller(name, make("table", { class: "graft-recipes" }, head, body));
  const show = (all) => {
    const shown = rows.filter(([, , differs]) => all || differs);
    body.replaceChildren(
      ...shown.map(([name, values, differs]) => {
        const cells = values.map((value) => make("td", {}, value));
        return make("tr", { "data-differs": !isOne && differs }, make("th", { scope: "row" }, name), ...cells);
      }),
    );
    scroller.hidden = !shown.length;
    none.hidden = shown.length > 0;
  };
  show(isOne);
  const heading = make("div", { class: "graft-heading" });
  heading.append(make("h3", {}, name));
  if (!isOne) {
    const box = make("input", { type: "checkbox" });
    box.addEventListener("change", () => show(box.checked));
    heading.append(make("label", {}, box, t("Show all settings")));
  }
  return [heading, none, scroller];
}

// Curves of runs as SVG, which follows the theme by itself.
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
function drawCurves(runs, width, label, point) {
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
