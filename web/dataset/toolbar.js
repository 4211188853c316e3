// The bars above the grid: what is open, undo and redo, search, order, and what applies to the selected pictures.
import { button, make, mark, say } from "../panel/make.js";
import { iconButton } from "../history/card.js";
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
