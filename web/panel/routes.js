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

// The routes that the dataset page calls. A folder is a choice of Graft Load Dataset, a name a picture inside.
// Inputs that name folders of pictures that belong to those of the dataset.
const PAIRED = /^(mask|control|worse)_folder/;

export class DatasetRoutes extends Server {
  // Return the pictures of a folder as training reads them; values: the node's inputs, {name: value}.
  readDataset(folder, values) {
    return this._json(`/graft/dataset?${new URLSearchParams({ folder, ...values })}`);
  }

  // isMoving: the first seconds of a clip instead of its first frame.
  thumbnailUrl(folder, { name, mark }, isMoving = false) {
    const query = new URLSearchParams({ folder, name, mark, ...(isMoving && { moving: 1 }) });
    return this._api.apiURL(`/graft/dataset/thumbnail?${query}`);
  }

  pictureUrl(folder, { name, mark }) {
    return this._api.apiURL(`/graft/dataset/picture?${new URLSearchParams({ folder, name, mark })}`);
  }

  // Return {folders: the node's choices, uploads: those to which a page can upload}.
  listFolders() {
    return this._json("/graft/dataset/folders");
  }

  // Return the pairs of pictures that look alike, {pairs: [[name, name]], broken: [{name, reason}]}. Takes time.
  findAlike(folder, values) {
    return this._json(`/graft/dataset/alike?${new URLSearchParams({ folder, ...values })}`);
  }

  // Return {run: name of the last run on the folder, losses: {name of a picture: [relative loss, mark]}}.
  readLosses(folder) {
    return this._json(`/graft/dataset/losses?${new URLSearchParams({ folder })}`);
  }

  // Return a picture's mask as a PNG, white where training learns.
  async readMask(folder, name, { masks, mask_folder: maskFolder }) {
    const query = new URLSearchParams({ folder, name, masks, mask_folder: maskFolder });
    const answer = await this._api.fetchApi(`/graft/dataset/mask?${query}`);
    if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
    return answer.blob();
  }

  // Save a picture's mask; null removes it.
  saveMask(folder, name, png, { masks, mask_folder: maskFolder }) {
    const headers = { "Content-Type": "image/png" };
    const options = { method: "POST", headers, body: png ?? new Blob([]) };
    const query = new URLSearchParams({ folder, name, masks, mask_folder: maskFolder });
    return this._json(`/graft/dataset/mask?${query}`, options);
  }

  // Save captions: [{name, text, was: the text that the page last saw}]. isByLine: each line is one.
  saveCaptions(folder, edits, isByLine = false) {
    return this._post("/graft/dataset/captions", { folder, edits, lines_are_variants: isByLine });
  }

  exclude(folder, names, excluded) {
    return this._post("/graft/dataset/exclude", { folder, names, excluded });
  }

  // Move the center of a picture's crop: [x, y] in fractions, null for the middle.
  setCenter(folder, name, center) {
    return this._post("/graft/dataset/center", { folder, name, center });
  }

  // Set the repeats of a folder inside the dataset; null for those in its name.
  setRepeats(folder, subfolder, repeats) {
    return this._post("/graft/dataset/repeats", { folder, subfolder, repeats });
  }

  trash(folder, names) {
    return this._post("/graft/dataset/trash", { folder, names });
  }

  restore(folder, names) {
    return this._post("/graft/dataset/restore", { folder, names });
  }

  // Turn a picture and all that belongs to it clockwise by 90, 180 or 270 degrees; values: as for readDataset.
  rotate(folder, name, degrees, values) {
    const folders = Object.entries(values).filter(([input]) => PAIRED.test(input));
    const paired = Object.fromEntries(folders.map(([input, choice]) => [input, choice.trim()]));
    return this._post("/graft/dataset/rotate", { folder, name, degrees, ...paired });
  }

  // Upload a file into a folder of ComfyUI's input folder, and return its name there.
  async upload(file, folder) {
    const body = new FormData();
    body.append("image", file, file.name);
    body.append("type", "input");
    body.append("subfolder", folder);
    return (await this._json("/upload/image", { method: "POST", body })).name;
  }

  // Check uploaded files: which are kept, which are copies of others, and which cannot be read.
  added(folder, names) {
    return this._post("/graft/dataset/added", { folder, names });
  }
}
