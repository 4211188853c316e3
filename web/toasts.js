// Toasts about the outcome of trainings, also for nodes out of view.
import { keyOf } from "./panel/training.js";
import { t } from "./texts.js";

const LIFE = 5000; // milliseconds
const LONG_LIFE = 15000; // milliseconds for messages that take time to read
const PAUSE = 60000; // milliseconds between two toasts about automatic saves

export class Toasts {
  // host: returns the part of app.extensionManager that shows toasts.
  constructor(host) {
    this._host = host;
    this._asked = new Set(); // trainings with a save command
    this._resumed = new Set(); // resumed trainings before their first step
    this._waited = new Set(); // trainings that gave way, which return without a toast
    this._told = -Infinity; // time of the last toast about a save
  }

  show(severity, summary, detail) {
    this._host().add({ severity, summary, detail, life: severity === "error" ? LONG_LIFE : LIFE });
  }

  async attempt(work) {
    try {
      await work();
    } catch (error) {
      this.show("error", t("That did not work"), error.message);
    }
  }

  // Handle a message; the training already includes it.
  hear(message, training) {
    const key = keyOf(message);
    this[`_on_${message.event}`]?.(training, message, key);
  }

  _on_begin(training, message, key) {
    this._asked.delete(key);
    this._resumed.delete(key);
  }

  _on_asked(training, { wish }, key) {
    if (wish === "save") this._asked.add(key);
  }

  _on_run(training, { step, steps }, key) {
    if (!this._waited.delete(key) && step && step < steps) this._resumed.add(key);
  }

  // Wait for a step: a stopped run is returned without one.
  _on_step(training, message, key) {
    if (this._resumed.delete(key)) this._note("info", t("Training resumed"), training, training.resumedFrom);
  }

  _on_saved(training, { step }, key) {
    const wasAsked = this._asked.delete(key);
    const isLast = step === training.steps || training.asked;
    if (isLast || (!wasAsked && performance.now() - this._told < PAUSE)) return;
    this._told = performance.now();
    this._note("success", t("Training saved"), training, step);
  }

  _on_done(training, { step, cached }) {
    const isStopped = training.phase === "stopped";
    const summary = isStopped ? t("Training stopped, result kept") : t("Training finished");
    if (!cached) this._note("success", summary, training, step);
  }

  _on_paused(training, { step }) {
    this._note("info", t("Training paused"), training, step);
  }

  _on_waiting(training, message, key) {
    this._waited.add(key);
  }

  _on_failed(training, { message, cure }) {
    this.show("error", t("Training failed"), [message, cure].filter(Boolean).join("\n"));
  }

  _note(severity, summary, { run, steps }, step) {
    this.show(severity, summary, t("$run, step $step of $steps", { run, step, steps }));
  }
}
