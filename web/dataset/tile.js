// A picture in the grid: its thumbnail, its caption in a text box, and what is known of it.
import { make, mark, say } from "../panel/make.js";
import { t } from "../texts.js";
import { describeFlag, describeStates } from "./dataset.js";

const ORIGINS = {
  table: () => t("from a table"),
  folder: () => t("from the folder's name"),
};

export class Tile {
  // acts: {url: function from whether it moves to the thumbnail's address, aboutLoss: text, isSelected, select, type, leave, open, settle, retry}.
  constructor(picture, acts) {
    this.picture = picture;
    this._acts = acts;
    const { name } = picture;
    this._image = make("img", { alt: "", decoding: "async", draggable: "false" });
    const label = `${t("Picture")}: ${name}`;
    this._thumb = make("button", { type: "button", class: "graft-thumb", "aria-label": label }, this._image);
    this._thumb.addEventListener("click", (event) =>
      event.ctrlKey || event.metaKey ? acts.select(event) : acts.open(),
    );
    for (const event of ["pointerenter", "focus"]) this._thumb.addEventListener(event, () => this.load(true));
    for (const event of ["pointerleave", "blur"]) this._thumb.addEventListener(event, () => this.load());
    this._box = make("input", { type: "checkbox", "aria-label": t("Select $name", { name }) });
    this._box.addEventListener("click", (event) => acts.select(event));
    this.text = make("textarea", { "aria-label": t("Caption of $name", { name }), spellcheck: "false" });
    this.text.addEventListener("input", () => acts.type(this.text.value));
    this.text.addEventListener("blur", () => acts.leave());
    this._facts = make("span", { class: "graft-quiet" });
    this._loss = make("span", { class: "graft-loss" });
    this._flags = make("span", { class: "graft-flags" });
    this._state = make("span", { class: "graft-quiet" });
    this._help = make("button", { type: "button" });
    this._help.addEventListener("click", () => (this.picture.state === "conflict" ? acts.settle() : acts.retry()));
    const head = make("label", { class: "graft-tile-name", title: name }, this._box, make("span", {}, name));
    this.element = make(
      "div",
      { class: "graft-tile", role: "listitem", "aria-label": name, tabindex: -1 },
      this._thumb,
      make(
        "div",
        { class: "graft-tile-body" },
        head,
        this.text,
        make("div", { class: "graft-tile-foot" }, this._state, this._help, this._facts, this._loss, this._flags),
      ),
    );
    this.element.dataset.name = name;
    this.update();
  }

  setPlace(place, count) {
    mark(this.element, "aria-posinset", place + 1);
    mark(this.element, "aria-setsize", count);
  }

  // Let the Tab key reach this tile, and no other.
  setCurrent(isCurrent) {
    const parts = [this.element, this._thumb, this._box, this.text, this._help];
    for (const part of parts) part.tabIndex = isCurrent ? 0 : -1;
  }

  // Load the thumbnail, and play a clip; a tile that was only scrolled past loads none. An unreadable picture has none.
  load(isPlaying = false) {
    const { mark: state, frames } = this.picture;
    if (state) mark(this._image, "src", this._acts.url(isPlaying && Boolean(frames)));
  }

  remove() {
    // An image out of the page would go on loading.
    this._image.removeAttribute("src");
    this.element.remove();
  }

  update() {
    const { picture } = this;
    if (this.text.value !== picture.text.replace(/\r\n?/g, "\n")) this.text.value = picture.text;
    this._box.checked = this._acts.isSelected();
    this.element.dataset.state = picture.state;
    this.element.classList.toggle("graft-selected", this._box.checked);
    this.element.classList.toggle("graft-excluded", picture.excluded || Boolean(picture.problem));
    say(this._facts, describeFacts(picture));
    this._showLoss();
    const repeats = picture.repeats > 1 ? `\u00d7 ${picture.repeats}` : "";
    const flags = [picture.problem, repeats, ...describeStates(picture), ...picture.flags.map(describeFlag)];
    const show = (flag) => make("span", { class: "graft-flag", title: flag }, flag);
    this._flags.replaceChildren(...flags.filter(Boolean).map(show));
    this._showState();
    if (this._image.hasAttribute("src")) this.load();
  }

  _showLoss() {
    const { loss } = this.picture;
    say(this._loss, loss === undefined ? "" : `${t("Loss")} ${loss.toFixed(2)}`);
    if (loss === undefined) return;
    this._loss.style.setProperty("--graft-share", Math.min(1, loss / 2));
    mark(this._loss, "title", this._acts.aboutLoss());
  }

  _showState() {
    const { state, error, origin } = this.picture;
    const texts = {
      waiting: t("Saving"),
      conflict: t("Changed elsewhere."),
      failed: `${t("Not saved")}: ${error}`,
    };
    say(this._state, texts[state] ?? ORIGINS[origin]?.() ?? "");
    this._help.hidden = state !== "conflict" && state !== "failed";
    say(this._help, state === "conflict" ? t("Compare") : t("Try again"));
  }
}

// Return a picture's size and the one that it is trained at, and a clip's length and frames per second.
export function describeFacts({ size, bucket, frames, frame_rate: rate }) {
  const say = (sides) => sides.join(" \u00d7 ");
  const sizes = [size, bucket].filter(Boolean).map(say).join(" \u2192 ");
  if (!frames) return sizes;
  return [sizes, t("$count frames", { count: frames }), rate && `${Number(rate.toFixed(2))}/s`].filter(Boolean).join(", ");
}
