// The session's edits, to undo and to redo. Edits run one after the other, because each needs the server.

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
