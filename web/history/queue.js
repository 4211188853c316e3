// The trainings of ComfyUI's queue in order, above the history of runs: what runs, what waits, and the time left.
import { make, say } from "../panel/make.js";
import { formatTime } from "../panel/words.js";
import { t } from "../texts.js";
import { iconButton } from "./card.js";

export class Queue {
  // remove: removes a waiting prompt from ComfyUI's queue.
  constructor(remove) {
    this._remove = remove;
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
    const shown = JSON.stringify(rows.map(({ prompt, name, training, running }) => [prompt, name, training?.node, running]));
    if (shown !== this._shown) {
      this._shown = shown;
      this._list.replaceChildren(...rows.map((row) => this._makeRow(row)));
    }
    this.element.hidden = !trainings.length;
    say(this._title, titleOf(trainings));
    const states = this._list.querySelectorAll(".graft-quiet");
    rows.forEach((row, place) => say(states[place], stateOf(row)));
  }

  _makeRow({ prompt, name, training, running }) {
    const state = make("div", { class: "graft-quiet" });
    if (!training) return make("li", {}, state);
    const named = `${t("Remove from queue")}: ${name}`;
    const remove = running ? null : iconButton("pi-times", named, () => this._remove(prompt));
    return make("li", {}, make("div", { class: "graft-body" }, make("div", {}, name), state), remove);
  }
}

// Return a row for each training, and one for each series of other prompts.
function rowsOf(prompts) {
  const rows = [];
  for (const { prompt_id: prompt, running, trainings } of prompts) {
    for (const training of trainings) {
      rows.push({ prompt, training, running, name: training.run ?? (training.name || t("Training")) });
    }
    if (trainings.length) continue;
    const last = rows.at(-1);
    if (last?.count && last.running === running) last.count += 1;
    else rows.push({ count: 1, running });
  }
  return rows;
}

// Return the heading: the time left of all trainings, as far as it is known.
function titleOf(trainings) {
  const known = trainings.map((training) => training.seconds_left).filter(Number.isFinite);
  if (!known.length) return t("Queue");
  const time = formatTime(known.reduce((sum, seconds) => sum + seconds, 0));
  return known.length === trainings.length ? t("Queue: $time left", { time }) : t("Queue: more than $time left", { time });
}

function stateOf({ count, training, running }) {
  if (count) return running ? t("Other prompts, running now: $count", { count }) : t("Other prompts: $count", { count });
  const { step, steps, seconds_left: left, gave_way: gaveWay } = training;
  const state = running ? t("Training") : gaveWay ? t("Waiting for other prompts") : t("Waiting");
  const parts = [state];
  if (steps) parts.push(t("$step of $steps steps", { step, steps }));
  if (Number.isFinite(left)) parts.push(t("$time left", { time: formatTime(left) }));
  return parts.join(", ");
}
