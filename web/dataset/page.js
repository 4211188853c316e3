// The dataset page: the pictures and captions of a folder in a dialog, to look at and to edit.
import { button, make, openDialog, say, throttled } from "../panel/make.js";
import { ABOUT_LOSS } from "../panel/words.js";
import { t } from "../texts.js";
import { Actions, Saver, UndoStack } from "./actions.js";
import { takeDrops } from "./adding.js";
import { openBulkEdit } from "./bulk.js";
import { openConflict, openUnsaved } from "./conflict.js";
import { Dataset } from "./dataset.js";
import { Grid, Tile } from "./grid.js";
import { openPicture } from "./picture.js";
import { SideBar, Toolbar } from "./toolbar.js";

const PAUSE = 1000; // minimum milliseconds between two counts of tags and flags

export class DatasetPage {
  // values: the node's inputs, {name: text}; add: opens the dialog that adds pictures, called with files or none.
  constructor({ routes, folder, values, add }) {
    this._routes = routes;
    this.values = values;
    this._isByLine = values.lines_are_variants === "1";
    this.dataset = new Dataset(folder);
    this.stack = new UndoStack(() => this._toolbar.update(), (error) => this.note(error.message, true));
    this.saver = new Saver(routes, this.dataset, this._isByLine, (pictures) => this._show(pictures));
    this.actions = new Actions({
      routes,
      dataset: this.dataset,
      saver: this.saver,
      stack: this.stack,
      values,
      changed: (pictures) => this._show(pictures),
      arranged: () => this._arrange(),
      reread: () => this.read(),
      note: (line, isError) => this.note(line, isError),
    });
    this._build(add);
  }

  async open() {
    openDialog(this.dialog, true);
    window.addEventListener("beforeunload", this._warn);
    this.note(t("Getting ready"));
    await this.read();
    this.grid.goTo(0)?.element.focus();
    this.readLosses();
    this.findAlike();
  }

  // Read the folder again. Edits that are not saved yet stay.
  async read() {
    try {
      const { edits } = this.dataset;
      const answer = await this._routes.readDataset(this.dataset.folder, this.values);
      this.dataset.take(answer, edits);
      const training = answer.training ? [t("This dataset is being trained. The run keeps what it encoded.")] : [];
      this.note([...training, ...answer.warnings].join(" "));
    } catch (error) {
      this.note(`${t("That did not work")}: ${error.message}`, true);
    }
    this._arrange();
  }

  async reread() {
    await this.read();
    this.findAlike();
  }

  async readLosses() {
    try {
      this.dataset.takeLosses(await this._routes.readLosses(this.dataset.folder));
      this._show([...this.dataset.pictures.values()]);
    } catch (error) {
      console.warn("Graft: cannot read the loss of the pictures:", error.message);
    }
  }

  async findAlike() {
    try {
      this.dataset.takeAlike(await this._routes.findAlike(this.dataset.folder, this.values));
      this._show([...this.dataset.pictures.values()]);
    } catch (error) {
      console.warn("Graft: cannot compare the pictures:", error.message);
    }
  }

  _build(add) {
    const { dataset, actions } = this;
    const selected = () => [...dataset.selected].map((name) => dataset.pictures.get(name));
    this.grid = new Grid((picture) => this._makeTile(picture));
    this._toolbar = new Toolbar(dataset, this.stack, {
      filtered: () => this._arrange(),
      undo: () => this.undo(),
      redo: () => this.redo(),
      selectAll: () => this.select(dataset.shown),
      selectNone: () => this.select([]),
      editCaptions: () => openBulkEdit({ dataset, actions, trigger: this.values.trigger, isByLine: this._isByLine }),
      exclude: (isExcluded) => actions.exclude(selected(), isExcluded),
      rotate: (degrees) => actions.rotate(selected(), degrees),
      trash: () => actions.trash(selected()),
      add: () => add([]),
      close: () => this.close(),
    });
    this._side = new SideBar(dataset, {
      filtered: () => {
        this._arrange();
        this._side.update();
      },
      setRepeats: (folder, repeats) => actions.setRepeats(folder, repeats),
    });
    this._status = make("p", { class: "graft-dataset-note", role: "status" });
    this._trouble = make("div", { class: "graft-dataset-note graft-trouble", role: "alert" });
    const body = make("div", { class: "graft-dataset-body" }, this._side.element, this.grid.element);
    const name = t("Dataset $folder", { folder: dataset.folder });
    const parts = [this._toolbar.element, this._status, this._trouble, body];
    this.dialog = make("dialog", { class: "graft-dataset", "aria-label": name }, ...parts);
    this._count = throttled(() => this._side.update(), PAUSE);
    this._listen(add);
  }

  _listen(add) {
    this._warn = (event) => this.saver.isBehind && event.preventDefault();
    this.dialog.addEventListener("keydown", (event) => handleKey(this, event));
    this.dialog.addEventListener("cancel", (event) => {
      // A file chooser inside the dialog sends this event too.
      if (event.target !== this.dialog) return;
      event.preventDefault();
      this.close();
    });
    this.dialog.addEventListener("close", () => window.removeEventListener("beforeunload", this._warn));
    takeDrops(this.dialog, add);
  }

  async close() {
    this.actions.endTyping();
    await this.saver.flush();
    if (!this.saver.isBehind) this.dialog.close();
    else openUnsaved(t("Some captions are not saved"), () => this.dialog.close());
  }

  undo() {
    this.actions.endTyping();
    return this.stack.undo();
  }

  redo() {
    this.actions.endTyping();
    return this.stack.redo();
  }

  select(pictures) {
    const { selected } = this.dataset;
    selected.clear();
    for (const { name } of pictures) selected.add(name);
    for (const tile of this.grid.tiles) tile.update();
    this._toolbar.update();
  }

  // Select or deselect a picture; with the shift key, all from the last one to this.
  toggle(picture, { shiftKey = false } = {}) {
    const { selected, shown } = this.dataset;
    const isSelected = !selected.has(picture.name);
    const [from, to] = [this.grid.placeOf(shiftKey ? this._anchor : picture.name), this.grid.placeOf(picture.name)];
    const range = from < 0 ? [picture] : shown.slice(Math.min(from, to), Math.max(from, to) + 1);
    for (const { name } of range) {
      if (isSelected) selected.add(name);
      else selected.delete(name);
    }
    this._anchor = picture.name;
    this.select([...selected].map((name) => ({ name })));
  }

  openSearch() {
    this._toolbar.search.focus();
  }

  _makeTile(picture) {
    const { actions } = this;
    return new Tile(picture, {
      url: (isMoving) => this._routes.thumbnailUrl(this.dataset.folder, picture, isMoving),
      aboutLoss: () => `${this.dataset.run}: ${t(ABOUT_LOSS)}`,
      isSelected: () => this.dataset.selected.has(picture.name),
      select: (event) => this.toggle(picture, event),
      type: (text) => actions.type(picture, text),
      leave: () => {
        actions.endTyping();
        this.saver.flush();
      },
      open: () => openPicture({ page: this, routes: this._routes, name: picture.name }),
      settle: () => this._settle(picture),
      retry: () => this.saver.retry(),
    });
  }

  _arrange() {
    this.dataset.arrange();
    this.grid.show(this.dataset.shown);
    this._show([...this.dataset.pictures.values()]);
  }

  // Show the current state of pictures, wherever they appear.
  _show(pictures) {
    this.grid.update(pictures);
    this._toolbar.update();
    this._count();
    this._showTrouble();
    this.shown?.();
  }

  get _conflicts() {
    return [...this.dataset.pictures.values()].filter(({ state }) => state === "conflict");
  }

  _showTrouble() {
    const count = this._conflicts.length;
    this._trouble.hidden = !count;
    if (this._trouble.dataset.count === String(count)) return;
    this._trouble.dataset.count = count;
    const line = t("Captions that were changed elsewhere meanwhile: $count. Nothing was overwritten.", { count });
    const compare = button(t("Compare"), () => this._settle(this._conflicts[0]));
    this._trouble.replaceChildren(...(count ? [line, compare] : []));
  }

  _settle(picture) {
    openConflict(picture, (text) => this.actions.settle(picture, text));
  }

  // Show a line above the pictures, and an error in the view of a picture too.
  note(line, isError = false) {
    this.problem = isError ? line : "";
    this.shown?.();
    say(this._status, line);
    this._status.hidden = !line;
    this._status.classList.toggle("graft-trouble", isError);
  }
}

// Keys: arrows move, Enter edits the caption, Tab goes to the next one, Ctrl+Z takes an edit back.
function handleKey(page, event) {
  const { target } = event;
  const tile = page.grid.tiles.find(({ element }) => element.contains(target));
  const isCommand = event.ctrlKey || event.metaKey;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  // Search fields and numbers have their own undo.
  const isField = target.matches("input:not([type=checkbox])");
  const act =
    (isCommand && !isField && findCommand(page, key, event.shiftKey)) ||
    (isCommand && key === "f" && (() => page.openSearch())) ||
    (tile && !isCommand && findMove(page, tile, target, event)) ||
    (isCommand && key === "a" && target === tile?.element && (() => page.select(page.dataset.shown))) ||
    // The browser itself would close the dialog at the second press, whatever is not saved.
    (key === "Escape" && !(target.type === "search" && target.value) && (() => page.close()));
  if (!act) return;
  event.preventDefault();
  act();
}

function findCommand(page, key, isShifted) {
  if (key === "z") return isShifted ? () => page.redo() : () => page.undo();
  return key === "y" ? () => page.redo() : null;
}

function findMove(page, tile, target, event) {
  const { key, shiftKey } = event;
  const { grid, dataset, actions } = page;
  const place = grid.placeOf(tile.picture.name);
  if (target === tile.text) {
    if (key === "Escape") return () => tile.element.focus();
    const next = place + (shiftKey ? -1 : 1);
    return key === "Tab" && dataset.shown[next] ? () => grid.goTo(next).text.focus() : null;
  }
  if (target !== tile.element) return null;
  const there = grid.placeAfter(place, key);
  if (there >= 0) return () => grid.goTo(there).element.focus({ preventScroll: true });
  const acts = {
    Enter: () => tile.text.focus(),
    " ": () => page.toggle(tile.picture, event),
    Delete: () => actions.trash(dataset.selected.size ? dataset.chosen : [tile.picture]),
  };
  return acts[key];
}
