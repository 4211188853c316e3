// Requests to the server, and the pack's routes.

import { t } from "../texts.js";

export class Server {
  constructor(api) {
    this._api = api;
  }

  _post(path, body = {}) {
    const headers = { "Content-Type": "application/json" };
    return this._json(path, { method: "POST", headers, body: JSON.stringify(body) });
  }

  async _json(path, options) {
    const answer = await this._api.fetchApi(path, options);
    const value = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(value.error ?? `The server answered ${answer.status}.`);
    return value;
  }
}

const MOST_EVENTS = 5000;

export class Routes extends Server {
  constructor(api, app) {
    super(api);
    this._app = app;
  }

  // Return the last messages of trainings in order, the running trainings, and the runs.
  listTold() {
    return this._json("/graft/runs");
  }

  // Return a run with its sample pictures and the end of its log.
  readRun(name, events = MOST_EVENTS) {
    return this._json(`/graft/runs/${encodeURIComponent(name)}?events=${events}`);
  }

  // Save the user's title and note for a run: {title, note}.
  describeRun(name, notes) {
    return this._post(`/graft/runs/${encodeURIComponent(name)}/describe`, notes);
  }

  // Copy a save to where loaders list it, and return its name there as {adapter} or {embedding}.
  pickSave(name, step) {
    return this._post(`/graft/runs/${encodeURIComponent(name)}/pick`, { step });
  }

  // Return a page of the runs on disk, the last changed first; text: a part of their names or notes.
  listHistory(text, from, count) {
    return this._json(`/graft/history?${new URLSearchParams({ text, from, count })}`);
  }

  readWorkflow(name) {
    return this._json(`/graft/runs/${encodeURIComponent(name)}/workflow`);
  }

  deleteRun(name) {
    return this._post(`/graft/runs/${encodeURIComponent(name)}/delete`);
  }

  // Send a training the command "stop", "save" or "pause".
  ask(training, wish) {
    return this._post(`/graft/nodes/${encodeURIComponent(training.node)}/${wish}`);
  }

  // Choose the prompts that a training gives way to: "off", "to everything" or "to short prompts".
  setGiveWay(training, to) {
    return this._post(`/graft/nodes/${encodeURIComponent(training.node)}/give_way`, { to });
  }

  // Return the running and the waiting prompts in order, with their trainings.
  listQueue() {
    return this._json("/graft/queue");
  }

  // Remove a waiting prompt from ComfyUI's queue, also one that is ending to give way.
  removePrompt(prompt) {
    return this._post("/graft/queue/remove", { prompt_id: prompt });
  }

  // Move a waiting prompt before another one, or behind all others with null.
  movePrompt(prompt, before) {
    return this._post("/graft/queue/move", { prompt_id: prompt, before });
  }

  // Set the hours of a prompt in the server's time: {not_before: "22:00", pause: ["08:00", "18:00"]}, "" for none.
  setHours(prompt, hours) {
    return this._post("/graft/queue/schedule", { prompt_id: prompt, ...hours });
  }

  // Queue a training's original prompt again. If the server has forgotten it, queue the open graph, which a node's training
  // comes from; a card of the history has no node.
  async resume({ run, node }) {
    const answer = run ? await this._post(`/graft/runs/${encodeURIComponent(run)}/resume`) : {};
    if (!answer.prompt && !node) throw new Error(t("This run has no saved workflow"));
    if (!answer.prompt) return this._app.queuePrompt(0, 1);
    const open = node ? (this._app.rootGraph ?? this._app.graph).serialize() : undefined;
    return this._api.queuePrompt(0, { output: answer.prompt, workflow: answer.workflow ?? open });
  }

  // Return the URL of a sample picture; `version` changes if another picture may have the same name.
  imageUrl(sample, version) {
    const query = new URLSearchParams({ ...sample, version });
    return this._api.apiURL(`/view?${query}`);
  }
}
