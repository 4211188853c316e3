// The panel of one training node.

import { t, text } from "../texts.js";
import { Chart } from "./chart.js";
import { button, keepKeys, make, mark, say } from "./make.js";
import { Strip } from "./strip.js";
import * as words from "./words.js";

export class Hours {
  // changed: called with {not_before, pause: [from, to]}, each a time such as "22:00" or "".
  constructor(changed) {
    this._pause = ["", ""];
    this._fields = [t("Not before"), t("Pause from"), t("to")].map((label) => {
      const input = make("input", { type: "time" });
      input.addEventListener("change", () => changed(this._read().hours));
      return { input, element: make("label", {}, label, " ", input) };
    });
    this._clock = make("span", { class: "graft-quiet" });
    this.element = make("div", { class: "graft-hours" }, ...this._fields.map(({ element }) => element), this._clock);
    this.element.hidden = true;
    // The graph has shortcuts for digits.
    this.element.addEventListener("keydown", (event) => event.stopPropagation());
  }

  show({ not_before: start, pause, clock }) {
    this._pause = pause;
    // One end of a pause alone is not set yet, and stays until the other one is filled in.
    const { isHalf } = this._read();
    [start, ...pause].forEach((value, place) => {
      const { input } = this._fields[place];
      const isOpen = input === document.activeElement || (isHalf && place > 0);
      if (!isOpen && input.value !== value) input.value = value;
    });
    say(this._clock, t("The server's time, now $time", { time: clock }));
  }

  _read() {
    const [start, ...pause] = this._fields.map(({ input }) => input.value);
    const isHalf = !pause[0] !== !pause[1];
    return { isHalf, hours: { not_before: start, pause: isHalf ? this._pause : pause } };
  }
}

export const HEIGHT = 370;
export const WIDTH = 380;

const QUARTERS = 4;

// [name, function of a training and an index into its curve that returns the text, swatch of the chart's line]
const FACTS = [
  [text("Loss"), (training, place) => words.formatLoss(training.curve.losses[place]), "raw"],
  [text("Smoothed"), (training, place) => words.formatLoss(training.curve.smooth[place]), "smooth"],
  [text("Validation"), (training) => words.formatLoss(training.curve.validation.at(-1)?.[1]), "checked"],
  [text("Learning rate"), (training) => words.formatRate(training.lr)],
  [text("Epoch"), (training) => words.formatEpoch(training.epoch)],
  [text("Speed"), (training) => words.formatPace(training.pace)],
  [text("Time left"), (training) => words.formatTime(words.isGoingOn(training) ? training.secondsLeft : NaN)],
  [text("Memory"), (training) => words.formatMemory(training.isLive ? training.memory : null)],
  // Hidden for trainings without pairs.
  [text("Accuracy"), (training) => `${Math.round(100 * training.accuracy)} %`],
];

export class Panel {
  constructor(routes) {
    this._routes = routes;
    this._training = null;
    this._seen = -1;
    this._pointed = null;
    this._problem = "";
    this._remark = "";
    this._queue = "";
    this._announced = "";
    this._lastWay = "to short prompts";
    this._build();
    this._listen();
    this._showReady();
  }

  get training() {
    return this._training;
  }

  // Show the current state of a training if it changed.
  // isSame: whether the node's inputs match the training's; steps: number of steps set on the node.
  show(training, isSame, steps) {
    const remark = words.remark(training, isSame, steps);
    if (training === this._training && training.version === this._seen && remark === this._remark) return;
    if (training !== this._training) this._problem = "";
    this._training = training;
    this._remark = remark;
    this.element.graftTraining = training;
    this._seen = training.version;
    this._render();
  }

  // Show the trainings of ComfyUI's queue, one line; empty to show none.
  showQueue(line) {
    if (line === this._queue) return;
    this._queue = line;
    this._showNote();
  }

  _build() {
    this._state = make("span", { class: "graft-state" });
    this._count = make("span", { class: "graft-count" });
    this._way = button(t("Give way"), () => this._act(() => this._toggleWay()));
    this._way.classList.add("graft-way");
    this._clock = button("", () => this._toggleHours());
    this._clock.append(make("i", { class: "pi pi-clock", "aria-hidden": "true" }));
    this._clock.classList.add("graft-clock");
    for (const name of ["aria-label", "title"]) mark(this._clock, name, t("Hours of training"));
    this._hours = new Hours((hours) => this._act(() => this._routes.setHours(this._training.prompt, hours)));
    this._bar = make("div", { class: "graft-bar", role: "progressbar", "aria-label": t("Progress"), "aria-valuemin": 0 });
    this._fill = make("div");
    this._bar.append(this._fill);
    this._note = make("div", { class: "graft-note" });
    this._canvas = make("canvas", { role: "img" });
    this._hint = make("div", { class: "graft-hint" });
    this._chart = new Chart(this._canvas, () => this._readColors());
    this._facts = FACTS.map(([name, , swatch]) => makeFact(name, swatch));
    this._figures = make("dl", { class: "graft-facts" }, ...this._facts.map(({ element }) => element));
    this._pictures = make("div", { class: "graft-pictures", title: t(words.ABOUT_LOSS) });
    this._strip = new Strip((sample, training) => this._routes.imageUrl(sample, training.prompt));
    this._buttons = make("div", { class: "graft-buttons" });
    this._stop = this._addButton(t("Stop and keep"), () => this._routes.ask(this._training, "stop"));
    this._save = this._addButton(t("Save now"), () => this._routes.ask(this._training, "save"));
    this._pause = this._addButton(t("Pause"), () => this._routes.ask(this._training, "pause"));
    this._resume = this._addButton(t("Resume"), () => this._routes.resume(this._training));
    this._dequeue = this._addButton(t("Remove from queue"), () => this._routes.removePrompt(this._training.prompt));
    this._saved = make("span", { class: "graft-saved" });
    this._buttons.append(this._saved);
    this._live = make("div", { class: "graft-live", role: "status", "aria-live": "polite" });
    this.element = make(
      "section",
      { class: "graft-panel widget-expands", "aria-label": t("Training") },
      make("div", { class: "graft-head" }, make("span", { class: "graft-dot" }), this._state, this._way, this._clock, this._count),
      this._bar,
      this._hours.element,
      this._note,
      make("div", { class: "graft-chart" }, this._canvas, this._hint),
      this._figures,
      this._pictures,
      this._strip.element,
      this._buttons,
      this._live,
    );
    this.element.style.setProperty("--graft-height", `${HEIGHT - 20}px`);
  }

  _addButton(text, act) {
    const added = button(text, () => this._act(act));
    this._buttons.append(added);
    return added;
  }

  async _act(act) {
    this._problem = "";
    try {
      await act();
    } catch (error) {
      this._problem = error.message;
    }
    if (this._training) this._render();
  }

  // Switch giving way off, or on as it was, at first to short prompts.
  async _toggleWay() {
    const { giveWay } = this._training;
    if (giveWay !== "off") this._lastWay = giveWay;
    await this._routes.setGiveWay(this._training, giveWay === "off" ? this._lastWay : "off");
  }

  _toggleHours() {
    const { element } = this._hours;
    element.hidden = !element.hidden;
    mark(this._clock, "aria-expanded", !element.hidden);
  }

  _listen() {
    keepKeys(this.element);
    this._canvas.addEventListener("pointermove", (event) => {
      const box = this._canvas.getBoundingClientRect();
      this._point((event.clientX - box.left) / Math.max(1, box.width));
    });
    this._canvas.addEventListener("pointerleave", () => this._point(null));
    // A change of theme starts a color transition on the canvas (graft.css). Redraw when it ends.
    this._canvas.addEventListener("transitionend", () => this._drawChart());
    new ResizeObserver(([{ contentRect }]) => {
      this._chart.resize(contentRect.width, contentRect.height);
      this._drawChart();
    }).observe(this._canvas);
  }

  _point(share) {
    if (!this._training?.curve.length) return;
    this._pointed = share === null ? null : this._chart.stepAt(this._training.curve, share);
    this._drawChart();
    this._showFacts();
  }

  _showReady() {
    this.element.dataset.phase = "idle";
    say(this._state, t("Ready"));
    say(this._hint, t("Press Run: loss, sample pictures and controls appear here."));
    mark(this._canvas, "aria-label", t("Loss: not trained yet."));
    mark(this._bar, "aria-valuemax", 1);
    mark(this._bar, "aria-valuenow", 0);
    const parts = [this._way, this._clock, this._hours.element, this._bar, this._note, this._figures, this._pictures, this._strip.element, this._buttons];
    for (const part of parts) part.hidden = true;
  }

  _render() {
    const training = this._training;
    // Draw first: reading the theme's colors is cheap only before other changes to the page.
    this._drawChart();
    this.element.dataset.phase = training.phase;
    say(this._state, words.describe(training));
    say(this._count, training.steps ? `${training.step} / ${training.steps}` : "");
    this._showBar();
    this._showNote();
    say(this._hint, training.curve.length ? "" : this._waitingFor());
    this._showFacts();
    const pictures = words.listPictures(training).join("\n");
    this._pictures.hidden = !pictures;
    say(this._pictures, pictures);
    this._strip.show(training);
    this._showButtons();
    this._announce();
  }

  _waitingFor() {
    const { phase, file } = this._training;
    if (phase === "caching" && file) return file;
    return this._training.isLive ? t("The loss appears after the first step.") : t("No step was done.");
  }

  _showBar() {
    const { phase, step, steps, done, total } = this._training;
    const [now, all] = phase === "drawing" || phase === "caching" ? [done, total] : [step, steps];
    this._bar.hidden = false;
    this._figures.hidden = false;
    mark(this._bar, "aria-valuemax", Math.max(1, all));
    mark(this._bar, "aria-valuenow", now);
    this._fill.style.transform = `scaleX(${all ? now / all : 0})`;
  }

  _showNote() {
    const text = [...this._notes(), this._queue].filter(Boolean).join("\n");
    this._note.hidden = !text;
    say(this._note, text);
  }

  _notes() {
    const training = this._training;
    if (!training) return [];
    const hasFailed = training.phase === "failed";
    const rest = hasFailed ? [training.message] : words.listWarnings(training);
    const [first, last] = hasFailed ? [rest, []] : [[], rest];
    return [this._problem, ...first, words.advise(training), this._remark, ...last];
  }

  _showFacts() {
    const { curve } = this._training;
    const place = this._pointed === null ? curve.length - 1 : curve.find(this._pointed);
    FACTS.forEach(([, read], number) => say(this._facts[number].value, read(this._training, place)));
    this._facts.at(-1).element.hidden = this._training.accuracy === null;
    const step = this._pointed === null || !curve.length ? "" : t("at step $step", { step: curve.steps[place] });
    say(this._facts[0].where, step);
  }

  _showButtons() {
    const { phase, isLive, isResumable, asked, isSaving, saved, run, giveWay, ahead, hours } = this._training;
    const isWaiting = phase === "waiting";
    this._buttons.hidden = !isLive && !isResumable && !isWaiting && !saved;
    // With no prompt before it, its own one runs.
    this._dequeue.hidden = !isWaiting || (ahead === 0 && !hours.starts);
    this._way.hidden = !isLive;
    this._clock.hidden = !isLive && !isWaiting;
    if (this._clock.hidden) this._hours.element.hidden = true;
    mark(this._clock, "aria-expanded", !this._hours.element.hidden);
    this._hours.show(hours);
    mark(this._way, "aria-pressed", giveWay !== "off");
    mark(this._way, "title", words.describeWay(giveWay));
    this._resume.hidden = !isResumable;
    for (const button of [this._stop, this._save, this._pause]) button.hidden = !isLive;
    this._stop.disabled = asked === "stop";
    this._pause.disabled = asked === "pause";
    this._save.disabled = Boolean(asked) || isSaving || phase !== "training";
    say(this._saved, isSaving ? t("Saving") : saved ? t("Saved at step $step", { step: saved }) : "");
    mark(this._saved, "title", run);
    mark(this._state, "title", run && t("Run $name", { name: run }));
  }

  // Announce to screen readers at each event and quarter, not at each step.
  _announce() {
    const { phase, step, steps } = this._training;
    const quarter = steps ? Math.floor((QUARTERS * step) / steps) : 0;
    const key = [phase, this._training.asked, this._problem, phase === "training" ? quarter : 0].join();
    if (key === this._announced) return;
    this._announced = key;
    const where = phase === "training" && step ? t(", step $step of $steps", { step, steps }) : "";
    say(this._live, [words.describe(this._training) + where, this._note.textContent].filter(Boolean).join(". "));
    mark(this._canvas, "aria-label", words.describeCurve(this._training));
  }

  _drawChart() {
    if (this._training) this._chart.draw(this._training.curve, this._pointed);
  }

  _readColors() {
    const colors = {};
    for (const { swatch } of this._facts) {
      if (swatch) colors[swatch.dataset.line] = getComputedStyle(swatch).backgroundColor;
    }
    const { color, borderTopColor } = getComputedStyle(this._canvas);
    return { ...colors, text: color, line: borderTopColor };
  }
}

function makeFact(name, line) {
  const swatch = line ? make("i", { class: "graft-swatch", "data-line": line }) : null;
  const where = make("small");
  const value = make("dd");
  return { element: make("div", { "data-name": name }, make("dt", {}, swatch, t(name), where), value), value, swatch, where };
}
