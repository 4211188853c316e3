// All trainings that sent messages to the page.
import { Training } from "./training.js";

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
