// A run in the list of the history.
import { make, mark, say } from "../panel/make.js";
import { formatLoss } from "../panel/words.js";
import { t, text } from "../texts.js";
import { drawSpark, shortly } from "./comparison.js";

const STATES = {
  running: text("Training"),
  finished: text("Finished"),
  stopped: text("Stopped"),
  paused: text("Paused"),
  waiting: text("Waiting"),
  unfinished: text("Unfinished"),
};

export function stateOf({ status, step, steps }) {
  return `${t(STATES[status])}, ${t("$step of $steps steps", { step, steps })}`;
}

export function lossesOf({ final, best, best_step: step }) {
  if (final === null) return t("Loss: no step done yet.");
  return t("$final, best $best at step $step", { final: formatLoss(final), best: formatLoss(best), step });
}

// Return an icon button; its name is its label for screen readers and its tooltip.
export function iconButton(icon, name, act) {
  const picture = make("i", { class: `pi ${icon}`, "aria-hidden": "true" });
  const button = make("button", { type: "button", class: "graft-icon", "aria-label": name, title: name }, picture);
  button.addEventListener("click", act);
  return button;
}

// Return a run's title: the user's name for it, else its folder.
export function titleOf({ title, name }) {
  return title || name;
}

export class Card {
  // acts: {imageUrl, choose, show, use, edit, open, resume, remove}, the actions of its parts.
  constructor(run, acts) {
    this.run = run;
    this._acts = acts;
    this.box = make("input", { type: "checkbox", "aria-label": t("Compare $run", { run: run.name }) });
    this.box.addEventListener("change", () => acts.choose(run.name, this.box.checked));
    this._name = make("button", { type: "button", class: "graft-name", title: run.name });
    this._name.addEventListener("click", () => acts.show(run.name));
    this._state = make("span", { class: "graft-quiet" });
    this._facts = make("div", { class: "graft-quiet" });
    this._start = make("div", { class: "graft-quiet" });
    this._date = make("time", { class: "graft-quiet" });
    this._note = make("div", { class: "graft-text" });
    const meaning = t("The mean of the last tenth of the steps, and the lowest mean of any tenth.");
    this._loss = make("div", { class: "graft-loss", title: meaning });
    this._spark = make("div");
    this._picture = make("div", { class: "graft-picture" });
    this._use = iconButton("pi-plus-circle", this._named(t("Use this LoRA")), () => acts.use(this.run));
    this._edit = iconButton("pi-pencil", this._named(t("Name and note")), () => acts.edit(this.run));
    this._open = iconButton("pi-folder-open", this._named(t("Open workflow")), () => acts.open(run.name));
    this._resume = iconButton("pi-play", this._named(t("Resume")), () => acts.resume(run.name));
    this._remove = iconButton("pi-trash", this._named(t("Delete")), () => acts.remove(this.run));
    this.element = make(
      "li",
      { class: "graft-card" },
      make("div", { class: "graft-side" }, this._picture, this.box),
      make(
        "div",
        { class: "graft-body" },
        make("div", { class: "graft-title" }, this._name),
        make("div", { class: "graft-line" }, make("span", { class: "graft-dot", "aria-hidden": "true" }), this._state),
        this._facts,
        this._start,
        this._date,
        this._note,
        this._spark,
        this._loss,
        make("div", { class: "graft-line" }, this._use, this._edit, this._open, this._resume, this._remove),
      ),
    );
    this.update(run);
  }

  update(run) {
    this.run = run;
    this.element.dataset.run = run.name;
    this.element.dataset.status = run.status;
    this.progress(run.step, run.steps);
    say(this._facts, shortly(run));
    const start = run.facts.made_from?.start;
    say(this._start, start ? t("Started from $run", { run: start }) : "");
    this._start.hidden = !start;
    const [final, best] = [formatLoss(run.final), formatLoss(run.best)];
    say(this._loss, run.final === null ? t("Loss: no step done yet.") : t("Loss $final, best $best", { final, best }));
    say(this._name, titleOf(run));
    const changed = new Date(run.changed * 1000);
    say(this._date, changed.toLocaleString([], { dateStyle: "medium", timeStyle: "short" }));
    mark(this._date, "datetime", changed.toISOString());
    say(this._note, run.note);
    mark(this._note, "title", run.note);
    this._note.hidden = !run.note;
    this._use.disabled = !run.saves.length;
    this._spark.replaceChildren(...(run.curve.length > 1 ? [drawSpark(run.curve)] : []));
    this._showPicture(run);
    this._open.disabled = !run.has_graph;
    mark(this._open, "title", run.has_graph ? t("Open workflow") : t("This run has no saved workflow"));
    this._resume.hidden = !["paused", "unfinished"].includes(run.status) || !run.has_graph;
    this._remove.disabled = ["running", "waiting"].includes(run.status);
  }

  // Show the progress only, without the data from the run's folder.
  progress(step, steps) {
    say(this._state, stateOf({ ...this.run, step, steps }));
  }

  focus() {
    this._name.focus();
  }

  _named(act) {
    return `${act}: ${this.run.name}`;
  }

  _showPicture({ picture, changed }) {
    if (!picture) {
      const none = make("i", { class: "pi pi-image", role: "img", "aria-label": t("No sample picture") });
      this._picture.replaceChildren(none);
      return;
    }
    const address = this._acts.imageUrl(picture, changed);
    const known = this._picture.querySelector("img");
    if (known) mark(known, "src", address);
    // The alt text is empty: the run's name stands beside the picture.
    else this._picture.replaceChildren(make("img", { src: address, alt: "", loading: "lazy", decoding: "async" }));
  }
}
