// What the panel and the history ask of the server.

const MOST_EVENTS = 5000;

export class Routes {
  constructor(api, app) {
    this._api = api;
    this._app = app;
  }

  // What trainings told last, in order, and those that run.
  listTold() {
    return this._json("/graft/runs");
  }

  // A run's sample pictures and the end of its log.
  readRun(name, events = MOST_EVENTS) {
    return this._json(`/graft/runs/${encodeURIComponent(name)}?events=${events}`);
  }

  // Keeps what the user calls a run and says of it: {title, note}.
  describeRun(name, notes) {
    return this._post(`/graft/runs/${encodeURIComponent(name)}/describe`, notes);
  }

  // Copies a save to where loaders list it; its name there, as {adapter} or {embedding}.
  pickSave(name, step) {
    return this._post(`/graft/runs/${encodeURIComponent(name)}/pick`, { step });
  }

  // A page of the runs on disk, those that changed last first; text: what their names and notes hold.
  listHistory(text, from, count) {
    return this._json(`/graft/history?${new URLSearchParams({ text, from, count })}`);
  }

  // What a run was queued as.
  readWorkflow(name) {
    return this._json(`/graft/runs/${encodeURIComponent(name)}/workflow`);
  }

  deleteRun(name) {
    return this._post(`/graft/runs/${encodeURIComponent(name)}/delete`);
  }

  // Asks a training to "stop", "save" or "pause".
  ask(training, wish) {
    return this._post(`/graft/nodes/${encodeURIComponent(training.node)}/${wish}`);
  }

  // Queues a training's prompt again, as it was; where the server has forgotten it, the graph as it is now.
  async resume(training) {
    const answer = training.run ? await this._post(`/graft/runs/${encodeURIComponent(training.run)}/resume`) : {};
    if (!answer.prompt) return this._app.queuePrompt(0, 1);
    const workflow = (this._app.rootGraph ?? this._app.graph).serialize();
    return this._api.queuePrompt(0, { output: answer.prompt, workflow });
  }

  // Address of a sample picture; `version` changes when a picture of the same name may be another.
  imageUrl(sample, version) {
    const query = new URLSearchParams({ ...sample, version });
    return this._api.apiURL(`/view?${query}`);
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
