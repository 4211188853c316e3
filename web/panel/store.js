// All trainings that the page has heard of.
import { Training } from "./training.js";

const MOST = 64;

export class Store {
  // changed: called after anything changed; heard: with each message that is new, and its training.
  constructor(routes, changed, heard) {
    this._routes = routes;
    this._changed = changed;
    this._heard = heard;
    this._trainings = new Map();
    this._waiting = null;
  }

  // Those there are, the one that told something last at the end.
  list() {
    return [...this._trainings.values()];
  }

  // A message of a training; it waits while older ones are being fetched.
  take(message) {
    if (this._waiting) {
      this._waiting.push(message);
      return;
    }
    const training = this._apply(message);
    // A run that starts has nothing to remember yet.
    if (message.event === "run" && message.step) training.hasPast = true;
    this._heard(message, training);
    this._changed();
  }

  // Learns from the server what the page has missed: before it was opened, or while it was cut off.
  async restore() {
    if (this._waiting) return;
    this._waiting = [];
    let found = null;
    try {
      found = await this._routes.listTold();
    } catch (error) {
      console.warn("Graft: what trains now could not be read:", error.message);
    }
    const waiting = this._waiting;
    this._waiting = null;
    if (found) this._replay(found);
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

  _replay({ told, running, runs }) {
    const trainings = new Set(told.map((message) => this._apply(message)));
    this._loseAllBut(new Set(running.map(keyOf)));
    const names = new Set(runs.map(({ name }) => name));
    for (const training of trainings) training.hasPast = names.has(training.run);
  }

  _loseAllBut(running) {
    for (const [key, training] of this._trainings) if (training.isLive && !running.has(key)) training.lose();
  }

  // Fetches what was before this page listened, once, for a training that is looked at.
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

// What tells trainings apart.
export function keyOf({ workflow, node, inputs = "" }) {
  return `${workflow} ${node} ${inputs}`;
}
