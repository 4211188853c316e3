// The server routes that the panel and the history call.

const MOST_EVENTS = 5000;

export class Routes {
  constructor(api, app) {
    this._api = api;
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

  // Return the graph that a run was queued with.
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

  // Queue a training's original prompt again; if the server has forgotten it, queue the current graph.
  async resume(training) {
    const answer = training.run ? await this._post(`/graft/runs/${encodeURIComponent(training.run)}/resume`) : {};
    if (!answer.prompt) return this._app.queuePrompt(0, 1);
    const workflow = (this._app.rootGraph ?? this._app.graph).serialize();
    return this._api.queuePrompt(0, { output: answer.prompt, workflow });
  }

  // Return the URL of a sample picture; `version` changes if another picture may have the same name.
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
