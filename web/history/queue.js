// The trainings of ComfyUI's queue in order, above the history of runs: what runs, what waits, and the time left.
import { make, say } from "../panel/make.js";
import { describeQueue, formatTime, nameOf } from "../panel/words.js";
import { t } from "../texts.js";
import { iconButton } from "./card.js";

export class Queue {
  // acts: {remove, move}: remove a waiting prompt; move it before another one, or behind all others with null.
  constructor(acts) {
    this._acts = acts;
    this._shown = "";
    this._title = make("h3");
    this._list = make("ol", { "aria-label": t("Queue") });
    this.element = make("div", { class: "graft-queue" }, this._title, this._list);
    this.element.hidden = true;
  }

  // Show the prompts of the queue, in order: [{prompt_id, running, trainings}].
  show(prompts) {
    const rows = rowsOf(prompts);
    const trainings = prompts.flatMap((prompt) => prompt.trainings);
    // A new list loses the focus, so make one only if other rows are shown.
    const shown = JSON.stringify(rows.map(({ prompts, name, training, running }) => [prompts, name, training?.node, running]));
    if (shown !== this._shown) {
      this._shown = shown;
      const { ariaLabel: focused } = this._list.contains(document.activeElement) ? document.activeElement : {};
      this._list.replaceChildren(...rows.map((row, place) => this._makeRow(row, place, rows)));
      // The button of a moved training keeps the focus.
      [...this._list.querySelectorAll("button")].find(({ ariaLabel }) => ariaLabel === focused)?.focus();
    }
    this.element.hidden = !trainings.length;
    say(this._title, describeQueue(trainings));
    const states = this._list.querySelectorAll(".graft-quiet");
    rows.forEach((row, place) => say(states[place], stateOf(row)));
  }

  _makeRow({ prompts, name, training, running, isFirst }, place, rows) {
    const state = make("div", { class: "graft-quiet" });
    if (!training) return make("li", {}, state);
    const [prompt] = prompts;
    const buttons = [];
    if (!running && isFirst) {
      const add = (icon, label, act) => buttons.push(iconButton(icon, `${label}: ${name}`, act));
      const before = rows.findLast((row, other) => other < place && !row.running && !row.prompts.includes(prompt));
      if (before) add("pi-arrow-up", t("Move up"), () => this._acts.move(prompt, before.prompts[0]));
      const later = rows.filter((row, other) => other > place && !row.prompts.includes(prompt));
      const behind = later.find((row) => row.prompts[0] !== later[0].prompts[0]);
      if (later.length) add("pi-arrow-down", t("Move down"), () => this._acts.move(prompt, behind?.prompts[0] ?? null));
      add("pi-times", t("Remove from queue"), () => this._acts.remove(prompt));
    }
    return make("li", {}, make("div", { class: "graft-body" }, make("div", {}, name), state), ...buttons);
  }
}

// Return a row for each training, and one for each series of other prompts, with the prompts in it.
function rowsOf(queued) {
  const rows = [];
  for (const { prompt_id: prompt, running, trainings, starts } of queued) {
    trainings.forEach((training, place) => {
      rows.push({ prompts: [prompt], training, running, starts, name: nameOf(training), isFirst: place === 0 });
    });
    if (trainings.length) continue;
    const last = rows.at(-1);
    if (last && !last.training && last.running === running) last.prompts.push(prompt);
    else rows.push({ prompts: [prompt], running });
  }
  return rows;
}

function stateOf({ prompts, training, running, starts }) {
  const { length: count } = prompts;
  if (!training) return running ? t("Other prompts, running now: $count", { count }) : t("Other prompts: $count", { count });
  const { step, steps, seconds_left: left, gave_way: gaveWay } = training;
  const waiting = starts ? t("Waiting until $time", { time: starts }) : gaveWay ? t("Waiting for other prompts") : t("Waiting");
  const state = running ? t("Training") : waiting;
  const parts = [state];
  if (steps) parts.push(t("$step of $steps steps", { step, steps }));
  if (Number.isFinite(left)) parts.push(t("$time left", { time: formatTime(left) }));
  return parts.join(", ");
}
