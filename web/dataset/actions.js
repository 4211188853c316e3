// Edits of captions and pictures, each with its way back.
import { t } from "../texts.js";
import { flagsAfterEdit } from "./flags.js";

const PAUSE = 1500; // milliseconds without a key after which the next key begins a new edit

export class Actions {
  // values: the node's inputs; changed: called with the changed pictures; arranged: called when other pictures are shown;
  // reread: reads the folder again; note: shows a line of text.
  constructor({ routes, dataset, saver, stack, values, changed, arranged, reread, note }) {
    this._routes = routes;
    this._dataset = dataset;
    this._saver = saver;
    this._stack = stack;
    this._values = values;
    this._changed = changed;
    this._arranged = arranged;
    this._reread = reread;
    this._note = note;
    this._typing = null;
  }

  // Take a text that the user is writing. One edit lasts until a pause, or until another caption is edited.
  type(picture, text) {
    if (this._typing?.picture !== picture) this.endTyping();
    this._typing ??= { picture, before: picture.text };
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this.endTyping(), PAUSE);
    this._setText(picture, text);
    this._changed([picture]);
  }

  endTyping() {
    clearTimeout(this._timer);
    const { picture, before } = this._typing ?? {};
    this._typing = null;
    if (picture && picture.text !== before) this._pushOne(picture, before);
  }

  // Change many captions: [[picture, text]].
  setCaptions(rows, label) {
    this.endTyping();
    const changed = rows.filter(([picture, text]) => picture.text !== text);
    const changes = changed.map(([picture, text]) => [picture, picture.text, text]);
    if (!changes.length) return;
    this._write(changes, 2);
    this._push(changes, label);
  }

  // Take the other text of a conflict, or write one over it.
  settle(picture, text) {
    this.endTyping();
    const before = picture.text;
    this._setText(picture, text);
    if (text !== before) this._pushOne(picture, before);
    this._changed([picture]);
    return this._saver.settle(picture);
  }

  _pushOne(picture, before) {
    this._push([[picture, before, picture.text]], `${t("Edit captions")}: ${picture.name}`);
  }

  _push(changes, label) {
    this._stack.push({ label, undo: () => this._write(changes, 1), redo: () => this._write(changes, 2) });
  }

  _write(changes, place) {
    for (const change of changes) {
      // A picture of the trash has no caption to write.
      const picture = this._dataset.pictures.get(change[0].name);
      if (picture) this._setText(picture, change[place]);
    }
    this._changed(changes.map(([picture]) => picture));
  }

  _setText(picture, text) {
    picture.text = text;
    this._dataset.noteEdit(picture);
    picture.flags = flagsAfterEdit(picture, this._values.trigger);
    this._saver.queue(picture);
  }

  exclude(pictures, isExcluded) {
    const names = pictures.filter(({ excluded }) => excluded !== isExcluded).map(({ name }) => name);
    if (!names.length) return null;
    const act = async (value) => {
      const { excluded } = await this._routes.exclude(this._dataset.folder, names, value);
      const all = new Set(excluded);
      for (const picture of this._dataset.pictures.values()) picture.excluded = all.has(picture.name);
      this._changed(names.map((name) => this._dataset.pictures.get(name)).filter(Boolean));
    };
    const label = isExcluded ? t("Exclude") : t("Include");
    return this._run(label, names, () => act(isExcluded), () => act(!isExcluded));
  }

  trash(pictures) {
    const names = pictures.map(({ name }) => name);
    let moved = [];
    const trash = async () => {
      await this._saver.flush();
      const answer = await this._routes.trash(this._dataset.folder, names);
      moved = this._dataset.remove(answer.moved);
      this._noteFailed(answer.failed);
      this._arranged();
    };
    const restore = async () => {
      const answer = await this._routes.restore(this._dataset.folder, moved.map(({ name }) => name));
      const back = new Set(answer.restored);
      this._dataset.add(moved.filter(({ name }) => back.has(name)));
      this._noteFailed(answer.failed);
      this._arranged();
    };
    return this._run(t("To the trash"), names, trash, restore);
  }

  rotate(pictures, degrees) {
    let names = pictures.map(({ name }) => name);
    const act = async (turn) => {
      const failed = [];
      for (const name of names) {
        const fail = ({ message }) => failed.push({ name, error: message });
        await this._routes.rotate(this._dataset.folder, name, turn, this._values).catch(fail);
      }
      // Only those that were turned are turned back.
      names = names.filter((name) => !failed.some((row) => row.name === name));
      await this._reread();
      this._noteFailed(failed);
    };
    const label = degrees === 90 ? t("Rotate right") : t("Rotate left");
    return this._run(label, names, () => act(degrees), () => act(360 - degrees));
  }

  setCenter(picture, center) {
    const { name, center: before } = picture;
    const act = async (value) => {
      const answer = await this._routes.setCenter(this._dataset.folder, name, value);
      const now = this._dataset.pictures.get(name);
      Object.assign(now, { crop: moveCrop(now.crop, answer.center) }, answer);
      this._changed([now]);
    };
    return this._run(t("Crop"), [name], () => act(center), () => act(before));
  }

  setRepeats({ name, repeats: before, chosen }, repeats) {
    const act = async (value) => {
      await this._routes.setRepeats(this._dataset.folder, name, value);
      await this._reread();
    };
    return this._run(t("Repeats by folder"), [name], () => act(repeats), () => act(chosen ? before : null));
  }

  // Save a mask, null for none; before: the one that it replaces.
  setMask({ name }, png, before) {
    const act = async (value) => {
      const { mask } = await this._routes.saveMask(this._dataset.folder, name, value, this._values);
      const now = this._dataset.pictures.get(name);
      now.mask = mask;
      this._changed([now]);
    };
    return this._run(t("Edit the mask"), [name], () => act(png), () => act(before));
  }

  _run(act, names, redo, undo) {
    this.endTyping();
    return this._stack.run({ label: `${act}: ${names.length === 1 ? names[0] : names.length}`, redo, undo });
  }

  _noteFailed(failed) {
    if (failed.length) this._note(failed.map(({ name, error }) => `${name}: ${error}`).join("; "), true);
  }
}

// Return a crop, [left, top, width, height] in fractions, moved as near to a center as the picture's edges allow.
export function moveCrop(crop, center) {
  if (!crop) return crop;
  const [, , width, height] = crop;
  const [x, y] = center ?? [0.5, 0.5];
  const place = (middle, side) => Math.min(1 - side, Math.max(0, middle - side / 2));
  return [place(x, width), place(y, height), width, height];
}
