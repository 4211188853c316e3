// The server routes that the dataset page calls. A folder is a choice of Graft Load Dataset, a name a picture inside.
import { Server } from "../panel/routes.js";

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
