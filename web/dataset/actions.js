// Edits of captions and pictures, each with its way back, and their saving.
import { t } from "../texts.js";
import { flagsAfterEdit } from "./dataset.js";

export class UndoStack {
  // changed: called when there is something else to undo; failed: called with an edit's error.
  constructor(changed, failed) {
    this._changed = changed;
    this._failed = failed;
    this._past = [];
    this._future = [];
    this._work = Promise.resolve();
  }

  get last() {
    return this._past.at(-1);
  }

  get next() {
    return this._future.at(-1);
  }

  // Record an edit that is done already: {label, redo, undo}.
  push(step) {
    this._past.push(step);
    this._future.length = 0; // the same list, because an undo may be at work with it
    this._changed();
  }

  // Do an edit, and record it if it succeeds. Return whether it did.
  run(step) {
    return this._queue(async () => {
      await step.redo();
      this.push(step);
    });
  }

  undo() {
    return this._move(this._past, this._future, "undo");
  }

  redo() {
    return this._move(this._future, this._past, "redo");
  }

  _move(from, to, way) {
    return this._queue(async () => {
      const step = from.pop();
      if (!step) return;
      const place = from.length;
      try {
        await step[way]();
      } catch (error) {
        // Below the edits that were recorded meanwhile.
        from.splice(place, 0, step);
        throw error;
      }
      to.push(step);
      this._changed();
    });
  }

  _queue(work) {
    const done = this._work.then(work).then(
      () => true,
      (error) => {
        this._failed(error);
        return false;
      },
    );
    this._work = done;
    return done;
  }
}

const PAUSE = 500; // milliseconds from the last key to the request
const MOST = 1000; // edits in one request
const MOST_LETTERS = 4e6; // letters in one request

export class Saver {
  // isByLine: whether each line is a caption; changed: called with the pictures whose state changed.
  constructor(routes, dataset, isByLine, changed) {
    this._routes = routes;
    this._dataset = dataset;
    this._isByLine = isByLine;
    this._changed = changed;
    this._waiting = new Map(); // name -> picture
    this._timer = 0;
    this._work = Promise.resolve();
  }

  // Report whether a caption is not saved, for whatever reason.
  get isBehind() {
    return [...this._dataset.pictures.values()].some(({ state }) => state);
  }

  // Save a picture's text soon; a caption in conflict waits for the user's decision.
  queue(picture) {
    if (picture.state === "conflict") return;
    picture.state = "waiting";
    this._waiting.set(picture.name, picture);
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this.flush(), PAUSE);
  }

  flush() {
    clearTimeout(this._timer);
    this._work = this._work.then(() => this._save());
    return this._work;
  }

  retry() {
    for (const picture of this._dataset.pictures.values()) if (picture.state === "failed") this.queue(picture);
    return this.flush();
  }

  // Decide a conflict: the picture's text is written over the other one.
  settle(picture) {
    picture.saved = picture.theirs;
    picture.state = "";
    this.queue(picture);
    return this.flush();
  }

  async _save() {
    while (this._waiting.size) {
      const pictures = this._takeSome();
      const edits = pictures.map(({ name, text, saved }) => ({ name, text, was: saved }));
      try {
        const { results } = await this._routes.saveCaptions(this._dataset.folder, edits, this._isByLine);
        const answers = new Map(results.map((result) => [result.name, result]));
        pictures.forEach((picture, place) => this._hear(picture, answers.get(picture.name), edits[place].text));
      } catch (error) {
        for (const picture of pictures) fail(picture, error.message);
      }
      this._changed(pictures);
    }
  }

  _takeSome() {
    const taken = [];
    let letters = 0;
    for (const picture of this._waiting.values()) {
      letters += picture.text.length + picture.saved.length;
      if (taken.length && (taken.length === MOST || letters > MOST_LETTERS)) break;
      taken.push(picture);
    }
    for (const { name } of taken) this._waiting.delete(name);
    return taken;
  }

  _hear(picture, result, sent) {
    if (result?.status === "conflict") {
      this._waiting.delete(picture.name);
      Object.assign(picture, { theirs: result.text, state: "conflict" });
      return;
    }
    if (result?.status !== "saved") {
      fail(picture, result?.error ?? "");
      return;
    }
    Object.assign(picture, { saved: result.text, file: result.file, origin: "file", error: "" });
    this._dataset.noteEdit(picture);
    if (result.flags) picture.flags = result.flags;
    // The user may have gone on writing.
    if (picture.text === sent) picture.state = "";
  }
}

function fail(picture, error) {
  picture.state = "failed";
  picture.error = error;
}

const EDIT_PAUSE = 1500; // milliseconds without a key after which the next key begins a new edit

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
    this._timer = setTimeout(() => this.endTyping(), EDIT_PAUSE);
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
