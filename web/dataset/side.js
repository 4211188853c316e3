// The side bar of the dataset page: filters by what the inspection says and by tag, and the folders with their repeats.
import { make, say } from "../panel/make.js";
import { t } from "../texts.js";

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
