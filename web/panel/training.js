// The trainings that sent messages to the page, each built from its messages.
import { t } from "../texts.js";
import { Curve } from "./chart.js";
import { formatBytes, formatRate } from "./words.js";

const LIVE = new Set(["preparing", "drawing", "caching", "working", "training"]);
const PACES = 15; // number of recent steps whose median duration predicts the next
const RESUMABLE = new Set(["stopped", "paused", "removed", "cancelled"]);
const RECALLED = new Set(["best", "early stop", "pictures"]); // events that are read again from the run's log
const SAMPLE = /^step-(\d+)-(\d+)\.(?:png|webp)$/;

// State changes by event. Unknown events change nothing.
const HANDLERS = {
  run(training, { name, step, steps, settings }) {
    Object.assign(training, { run: name, step, steps, resumedFrom: step, settings: settings ?? null });
  },
  warnings(training, { warnings }) {
    training.warnings = warnings;
  },
  // About the adapter that the run starts from.
  "adapter warnings"(training, { warnings }) {
    training.warnings = [...training.warnings, ...warnings];
  },
  // Work between two steps or before the first, by name; "training" when the steps continue.
  phase(training, { name }) {
    training.work = name === "training" ? "" : name;
    if (training.phase !== "training") training.phase = name === "training" ? "training" : "working";
  },
  // Saves that could not be read; the training resumed from an earlier one.
  "damaged state"(training, { step, states }) {
    const warning = { kind: "damaged", step, states: states.join(", ") };
    training.warnings = [...training.warnings, warning];
  },
  drawing(training, { done, total }) {
    Object.assign(training, { phase: "drawing", done, total });
  },
  cache(training, { name, done, total }) {
    Object.assign(training, { phase: "caching", file: name, done, total });
  },
  step(training, { step, steps, epoch, loss, lr, seconds, losses, memory, accuracy = null }) {
    Object.assign(training, { phase: "training", work: "", step, steps, epoch, lr, memory, accuracy });
    training.addPace(seconds);
    const values = losses?.length ? losses : [loss];
    values.forEach((value, place) => training.curve.add(step - values.length + 1 + place, value));
  },
  estimate(training, { seconds, missing, free, fits, cures }) {
    training.measured = seconds;
    if (fits) return;
    const figures = { missing: formatBytes(missing ?? 0), free: formatBytes(free ?? 0) };
    // missing is null if memory ran out before it could be measured.
    const problem = missing === null
      ? t("A step needs more memory than the device has.")
      : t("A step needs $missing more memory than is in use now, but only $free are free.", figures);
    const cure = cures.length ? t("It would fit with these Graft Memory Options: $cures.", { cures: cures.join(", ") }) : "";
    training.note = `${problem} ${cure}`.trim();
  },
  memory(training, { step, done }) {
    training.note = t("Memory ran out in step $step: $done.", { step, done });
  },
  spike(training, { step }) {
    training.note = t("Skipped step $step: its loss was far above the usual.", { step });
  },
  rate(training, { optimizer, learning_rate }) {
    const figures = { optimizer, rate: formatRate(learning_rate) };
    training.note = t("$optimizer finds the learning rate itself and multiplies it by $rate: set learning_rate to 1.", figures);
  },
  validation(training, { step, loss }) {
    training.curve.addValidation(step, loss);
  },
  best(training, { step }) {
    training.curve.best = step;
  },
  "early stop"(training, { step, best }) {
    training.curve.end = step;
    training.lowest = best;
  },
  // The pictures with the highest and the lowest loss, each [name, loss relative to the median picture].
  pictures(training, { hardest, memorized }) {
    Object.assign(training, { hardest, memorized });
  },
  sample(training, { step, samples }) {
    training.samples.set(step, samples);
    training.shown += 1;
  },
  saved(training, { step }) {
    Object.assign(training, { saved: step, isSaving: false });
  },
  asked(training, { wish }) {
    if (wish === "save") training.isSaving = true;
    else training.asked = wish;
  },
  stopped(training, { step, steps }) {
    Object.assign(training, { step, steps });
  },
  done(training, { run, step, steps, cached }) {
    const phase = step < steps ? "stopped" : cached ? "returned" : "finished";
    Object.assign(training, { phase, run, step, steps, saved: step });
  },
  paused(training, { run, step }) {
    Object.assign(training, { phase: "paused", run: run || training.run, step, saved: step });
  },
  // Paused for other prompts or until its hours; the server queues it again.
  waiting(training, { run, step, starts = "" }) {
    const hours = { ...training.hours, starts };
    Object.assign(training, { phase: "waiting", run: run || training.run, step, saved: step, hours });
  },
  "give way"(training, { to }) {
    training.giveWay = to;
  },
  cancelled(training, { step, saved, nothing }) {
    Object.assign(training, { phase: "cancelled", step, saved, isNothing: nothing });
  },
  failed(training, { message, cure, saved }) {
    Object.assign(training, { phase: "failed", message, cure, saved });
  },
};

// Return a Map from step to the sample pictures of that step.
export function samplesByStep(samples) {
  const byStep = new Map();
  for (const sample of samples) {
    const [, digits] = SAMPLE.exec(sample.filename) ?? [];
    if (digits !== undefined) byStep.set(Number(digits), [...(byStep.get(Number(digits)) ?? []), sample]);
  }
  return byStep;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

export class Training {
  // node: execution id; workflow: id of the workflow that queued it, "" if unknown;
  // sources: the nodes of its prompt that decide its result, if known.
  // give_way: the prompts that it gives way to.
  constructor({ node, workflow, prompt_id, sources = null, give_way: giveWay = "off" }) {
    this.node = node;
    this.workflow = workflow;
    this.sources = sources;
    this.prompt = prompt_id;
    this.giveWay = giveWay;
    this.ahead = null; // number of prompts before a waiting one, null if unknown
    // Its hours, as the server's clock shows them, the clock itself, and the time at which it starts if it must not run now.
    this.hours = { not_before: "", pause: ["", ""], starts: "", clock: "" };
    this.phase = "preparing";
    this.run = "";
    this.step = 0;
    this.steps = 0;
    this.resumedFrom = 0;
    this.saved = 0;
    this.done = 0;
    this.total = 0;
    this.file = "";
    this.epoch = null;
    this.lr = null;
    this.accuracy = null; // share of the last pairs whose better picture the model prefers
    this.measured = null; // seconds per step, measured before the first step
    this.paces = []; // seconds of the last steps, without the first, which warms up
    this.warmUp = null; // seconds of the first step
    this.memory = null; // [bytes in use, total bytes]
    this.asked = null;
    this.isSaving = false;
    this.hasPast = false; // whether the run's log has steps that this page did not receive
    this.isNothing = false;
    this.message = "";
    this.cure = "";
    this.note = ""; // the last notable event
    this.lowest = 0; // step of the lowest validation loss, if that ended the run
    this.hardest = []; // [name, relative loss]
    this.memorized = []; // likewise
    this.work = ""; // name of the work between steps, "" during the steps
    this.warnings = []; // about the dataset and the settings
    this.settings = null; // the run's settings, by the recipe's names
    this.curve = new Curve();
    this.samples = new Map(); // step -> its pictures
    this.shown = 0; // counter of changes to samples
    this.version = 0;
  }

  get isLive() {
    return LIVE.has(this.phase);
  }

  get isResumable() {
    return RESUMABLE.has(this.phase);
  }

  // The usual seconds per step, null if unknown.
  get pace() {
    if (this.paces.length) return median(this.paces);
    if (this.warmUp === null) return this.measured;
    return Math.min(this.warmUp, this.measured ?? Infinity);
  }

  addPace(seconds) {
    if (this.warmUp === null) this.warmUp = seconds;
    else this.paces = [...this.paces, seconds].slice(-PACES);
  }

  get secondsLeft() {
    return this.pace === null ? null : this.pace * (this.steps - this.step);
  }

  take(message) {
    HANDLERS[message.event]?.(this, message);
    this.version += 1;
  }

  // Note how many prompts are before a waiting one; -1: its prompt is no longer in the queue.
  settle(ahead) {
    if (ahead === this.ahead) return;
    if (ahead < 0) this.phase = "removed";
    this.ahead = ahead;
    this.version += 1;
  }

  // Note the hours of its prompt.
  keepHours(hours) {
    if (JSON.stringify(hours) === JSON.stringify(this.hours)) return;
    this.hours = hours;
    this.version += 1;
  }

  // Mark the training as lost: the server was restarted or crashed.
  lose() {
    this.phase = "lost";
    this.version += 1;
  }

  // Add the steps before this page listened, from the run's log and pictures.
  remember({ events, samples }) {
    // Skip later steps of a resumed run: its log may hold steps that it will repeat.
    const isOld = ({ step }) => step <= (this.isLive ? Math.max(this.step, this.resumedFrom) : this.steps);
    const of = (kind) => events.filter((row) => row.event === kind && isOld(row)).map(({ step, loss }) => [step, loss]);
    this.curve.prepend(of("step"), of("validation"));
    for (const event of events) if (RECALLED.has(event.event) && isOld(event)) HANDLERS[event.event](this, event);
    for (const [step, loaded] of samplesByStep(samples)) {
      if (!isOld({ step })) continue;
      const known = this.samples.get(step) ?? [];
      const isNew = ({ filename }) => !known.some((sample) => sample.filename === filename);
      this.samples.set(step, [...known, ...loaded.filter(isNew)]);
    }
    this.shown += 1;
    this.version += 1;
  }
}

const MOST = 64;

export class Store {
  // changed: called after any change; heard: called with each new message and its training.
  constructor(routes, changed, heard) {
    this._routes = routes;
    this._changed = changed;
    this._heard = heard;
    this._trainings = new Map();
    this._waiting = null;
  }

  // Return the trainings, the one with the latest message last.
  list() {
    return [...this._trainings.values()];
  }

  // Handle a message of a training; while older messages are being fetched, queue it.
  take(message) {
    if (this._waiting) {
      this._waiting.push(message);
      return;
    }
    const training = this._apply(message);
    // A run that starts at step 0 has no past.
    if (message.event === "run" && message.step) training.hasPast = true;
    this._heard(message, training);
    this._changed();
  }

  // Fetch the messages that the page missed before it was opened or while it was disconnected.
  async restore() {
    if (this._waiting) return;
    this._waiting = [];
    let answer = null;
    try {
      answer = await this._routes.listTold();
    } catch (error) {
      console.warn("Graft: cannot read the running trainings:", error.message);
    }
    const waiting = this._waiting;
    this._waiting = null;
    if (answer) this._replay(answer);
    for (const message of waiting) this.take(message);
    this._changed();
  }

  _apply(message) {
    const key = keyOf(message);
    const known = message.event === "begin" ? undefined : this._trainings.get(key);
    const training = known ?? new Training(message);
    this._trainings.delete(key);
    this._trainings.set(key, training);
    if (this._trainings.size > MOST) this._trainings.delete(this._trainings.keys().next().value);
    training.take(message);
    return training;
  }

  _replay({ told: messages, running, runs }) {
    const trainings = new Set(messages.map((message) => this._apply(message)));
    this._loseAllBut(new Set(running.map(keyOf)));
    const names = new Set(runs.map(({ name }) => name));
    for (const training of trainings) training.hasPast = names.has(training.run);
  }

  _loseAllBut(running) {
    for (const [key, training] of this._trainings) if (training.isLive && !running.has(key)) training.lose();
  }

  // Return the trainings that gave way, whose prompts wait in ComfyUI's queue.
  get waiting() {
    return this.list().filter(({ phase }) => phase === "waiting");
  }

  // Tell the trainings of the prompts of ComfyUI's queue, in order, and of the server's clock.
  settle({ prompts, clock }) {
    const ids = prompts.map((prompt) => prompt.prompt_id);
    for (const training of this.waiting) training.settle(ids.indexOf(training.prompt));
    for (const { prompt_id: id, not_before, pause, starts } of prompts) {
      const trainings = this.list().filter((training) => training.prompt === id);
      for (const training of trainings) training.keepHours({ not_before, pause, starts, clock });
    }
    this._changed();
  }

  // Fetch the steps before this page listened, once, for a visible training.
  async recall(training) {
    if (!training.hasPast) return;
    training.hasPast = false;
    try {
      training.remember(await this._routes.readRun(training.run));
    } catch (error) {
      console.warn(`Graft: run ${training.run} could not be read:`, error.message);
    }
    this._changed();
  }
}

// Return the key that identifies a training.
export function keyOf({ workflow, node, inputs = "" }) {
  return `${workflow} ${node} ${inputs}`;
}
