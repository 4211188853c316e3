// Requests to the pack's own routes.

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
