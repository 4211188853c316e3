// Saving of edits by themselves, and their undo.

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
