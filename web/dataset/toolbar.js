// The bars around the grid: above it what is open, undo and redo, search, order, and what applies to the selected pictures;
// beside it the filters, and the folders with their repeats.
import { iconButton } from "../history/card.js";
import { button, make, mark, say } from "../panel/make.js";
import { t, text } from "../texts.js";

const PAUSE = 200; // milliseconds from the last key to the search

// [name of the order, its text]
const ORDERS = [
  ["name", text("Name")],
  ["size", text("Size")],
  ["flags", text("Flags")],
  ["tags", text("Number of tags")],
  ["loss", text("Loss")],
];

export class Toolbar {
  // acts: {filtered, selectAll, selectNone, editCaptions, exclude, rotate, trash, add, close}.
  constructor(dataset, stack, acts) {
    this._dataset = dataset;
    this._stack = stack;
    this._undo = iconButton("pi-undo", t("Undo"), () => acts.undo());
    this._redo = iconButton("pi-refresh", t("Redo"), () => acts.redo());
    this._count = make("span", { class: "graft-quiet" });
    this.search = make("input", { type: "search", "aria-label": t("Find in names and captions") });
    this.search.placeholder = t("Find in names and captions");
    this.search.addEventListener("input", () => {
      clearTimeout(this._waiting);
      this._waiting = setTimeout(() => this._find(acts), PAUSE);
    });
    this._selected = make("span", { class: "graft-quiet", role: "status" });
    this._all = button(t("Select all"), acts.selectAll);
    this._none = button(t("Select none"), acts.selectNone);
    this._captions = button(t("Edit captions"), acts.editCaptions);
    this._many = [
      button(t("Exclude"), () => acts.exclude(true)),
      button(t("Include"), () => acts.exclude(false)),
      button(t("Rotate left"), () => acts.rotate(270)),
      button(t("Rotate right"), () => acts.rotate(90)),
      button(t("To the trash"), acts.trash),
    ];
    this.element = make(
      "div",
      { class: "graft-dataset-bars" },
      make(
        "header",
        {},
        make("h2", {}, t("Dataset $folder", { folder: dataset.folder })),
        this._count,
        make("span", { class: "graft-space" }),
        this._undo,
        this._redo,
        button(t("Add pictures"), acts.add),
        button(t("Close"), acts.close),
      ),
      make(
        "div",
        { class: "graft-dataset-bar" },
        this.search,
        ...this._makeOrder(acts),
        make("span", { class: "graft-space" }),
        this._selected,
        this._all,
        this._none,
        this._captions,
        ...this._many,
      ),
    );
  }

  update() {
    const { shown, pictures, selected } = this._dataset;
    say(this._count, t("$shown of $total pictures", { shown: shown.length, total: pictures.size }));
    say(this._selected, selected.size ? t("$count selected", { count: selected.size }) : "");
    this._none.disabled = !selected.size;
    this._all.disabled = !shown.length;
    this._captions.disabled = !this._dataset.chosen.length;
    for (const act of this._many) act.disabled = !selected.size;
    showStep(this._undo, t("Undo"), this._stack.last);
    showStep(this._redo, t("Redo"), this._stack.next);
  }

  _makeOrder({ filtered }) {
    const options = ORDERS.map(([name, label]) => make("option", { value: name }, t(label)));
    const order = make("select", { "aria-label": t("Sort by") }, ...options);
    order.addEventListener("change", () => {
      this._dataset.order = order.value;
      filtered();
    });
    const turn = iconButton("pi-sort-alt", t("Reverse the order"), () => {
      this._dataset.isReversed = !this._dataset.isReversed;
      mark(turn, "aria-pressed", this._dataset.isReversed);
      filtered();
    });
    mark(turn, "aria-pressed", false);
    return [order, turn];
  }

  _find({ filtered }) {
    this._dataset.filter.text = this.search.value;
    filtered();
  }
}

function showStep(element, name, step) {
  element.disabled = !step;
  const label = step ? `${name}: ${step.label}` : name;
  mark(element, "aria-label", label);
  mark(element, "title", label);
}

const MOST_TAGS = 200;

export class SideBar {
  // filtered: called when the filter changed; setRepeats: called with a folder and its new repeats.
  constructor(dataset, { filtered, setRepeats }) {
    this._dataset = dataset;
    this._filtered = filtered;
    this._setRepeats = setRepeats;
    this._flags = make("div", { class: "graft-chips" });
    this._tags = make("div", { class: "graft-chips" });
    this._more = make("p", { class: "graft-quiet" });
    this._search = make("input", { type: "search", "aria-label": `${t("Tags")}: ${t("Find")}` });
    this._search.placeholder = t("Find");
    this._search.addEventListener("input", () => this._showTags());
    this._folders = make("div", { class: "graft-folders" });
    this._folderPart = make("section", {}, make("h3", {}, t("Repeats by folder")), this._folders);
    this._leftOut = make("ul");
    this._leftOutPart = make("details", {}, make("summary"), this._leftOut);
    this.element = make(
      "aside",
      { class: "graft-side-bar", "aria-label": t("Filters"), tabindex: 0 },
      make("section", {}, make("h3", {}, t("Filters")), this._flags),
      make("section", {}, make("h3", {}, t("Tags")), this._search, this._tags, this._more),
      this._folderPart,
      this._leftOutPart,
    );
  }

  update() {
    const { filter } = this._dataset;
    const flags = this._dataset.countFlags();
    const names = new Set(flags.map(([name]) => name));
    // A chosen filter stays, to be taken back.
    const rows = [...flags, ...[...filter.flags].filter((name) => !names.has(name)).map((name) => [name, 0])];
    this._showChips(this._flags, rows, filter.flags, t);
    this._allTags = this._dataset.countTags();
    this._showTags();
    this._showFolders();
    this._showLeftOut();
  }

  _showTags() {
    const wanted = this._search.value.trim().toLowerCase();
    const { tags: chosen } = this._dataset.filter;
    const rows = this._allTags.filter(([tag]) => chosen.has(tag) || tag.toLowerCase().includes(wanted));
    rows.sort(([a], [b]) => chosen.has(b) - chosen.has(a));
    this._showChips(this._tags, rows.slice(0, MOST_TAGS), chosen, (tag) => tag);
    const count = rows.length - MOST_TAGS;
    say(this._more, count > 0 ? t("and $count more", { count }) : "");
  }

  _showChips(place, rows, chosen, nameOf) {
    const focused = [...place.children].indexOf(document.activeElement);
    const chips = rows.map(([value, count]) => {
      const number = make("span", { class: "graft-quiet" }, String(count));
      const name = make("span", { class: "graft-chip-name" }, nameOf(value));
      const chip = make("button", { type: "button", "aria-pressed": chosen.has(value), title: nameOf(value) }, name, number);
      chip.addEventListener("click", () => {
        if (!chosen.delete(value)) chosen.add(value);
        this._filtered();
      });
      return chip;
    });
    place.replaceChildren(...chips);
    if (focused >= 0) (chips[focused] ?? chips.at(-1))?.focus();
  }

  _showFolders() {
    const { folders } = this._dataset;
    this._folderPart.hidden = !folders.length;
    const rows = folders.map((folder) => {
      const field = make("input", { type: "number", min: 1, max: 10000 });
      field.value = folder.repeats;
      field.addEventListener("change", () => {
        if (field.validity.valid) this._setRepeats(folder, field.value === "" ? null : field.valueAsNumber);
      });
      return make("label", { title: folder.name }, make("span", {}, folder.name || this._dataset.folder), field);
    });
    if (!this._folders.contains(document.activeElement)) this._folders.replaceChildren(...rows);
  }

  _showLeftOut() {
    const { leftOut } = this._dataset;
    this._leftOutPart.hidden = !leftOut.length;
    say(this._leftOutPart.querySelector("summary"), t("Files left out: $count", { count: leftOut.length }));
    this._leftOut.replaceChildren(...leftOut.map(({ name, reason }) => make("li", {}, `${name}: ${reason}`)));
  }
}
