// A grid of tiles of which only those in view are in the page, however many there are. A tile shows a picture's thumbnail,
// its caption in a text box, and what is known of it.
import { make, mark, say } from "../panel/make.js";
import { t } from "../texts.js";
import { describeFlag, describeStates } from "./dataset.js";

export const TILE_HEIGHT = 164;
const TILE_WIDTH = 380; // at least
const GAP = 8;
const REST = 80; // milliseconds without scrolling after which pictures load

export class Grid {
  // makeTile: returns the tile of a picture: {element, update, setPlace, setCurrent, load, remove}.
  constructor(makeTile) {
    this._makeTile = makeTile;
    this._tiles = new Map(); // name -> tile in the page
    this._pictures = [];
    this._columns = 1;
    this._current = null; // name of the picture that the keys reach
    this._list = make("div", { class: "graft-tiles", role: "list", "aria-label": t("Pictures") });
    this.element = make("div", { class: "graft-grid", tabindex: -1 }, this._list);
    this.element.addEventListener("scroll", () => this._draw());
    this._list.addEventListener("focusin", ({ target }) => this._enter(target));
    new ResizeObserver(() => this._draw()).observe(this.element);
  }

  get tiles() {
    return [...this._tiles.values()];
  }

  show(pictures) {
    this._pictures = pictures;
    this._places = new Map(pictures.map(({ name }, place) => [name, place]));
    if (!this._places.has(this._current)) this._current = pictures[0]?.name ?? null;
    this._draw();
  }

  update(pictures) {
    for (const { name } of pictures) this._tiles.get(name)?.update();
  }

  placeOf(name) {
    return this._places.get(name) ?? -1;
  }

  // Move to the picture at a place, and return its tile; null past the ends.
  goTo(place) {
    const picture = this._pictures[place];
    if (!picture) return null;
    this._current = picture.name;
    const top = this._topOf(place);
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + TILE_HEIGHT > scrollTop + clientHeight) this.element.scrollTop = top + TILE_HEIGHT - clientHeight;
    this._draw();
    return this._tiles.get(picture.name);
  }

  placeAfter(place, key) {
    const page = this._columns * Math.max(1, Math.floor(this.element.clientHeight / (TILE_HEIGHT + GAP)));
    const last = this._pictures.length - 1;
    const steps = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -this._columns,
      ArrowDown: this._columns,
      PageUp: -page,
      PageDown: page,
      Home: -place,
      End: last - place,
    };
    return key in steps ? Math.min(last, Math.max(0, place + steps[key])) : -1;
  }

  // Let the keys reach the tile that the focus went to.
  _enter(element) {
    for (const [name, tile] of this._tiles) {
      const isCurrent = tile.element.contains(element);
      tile.setCurrent(isCurrent);
      if (isCurrent) this._current = name;
    }
  }

  _topOf(place) {
    return Math.floor(place / this._columns) * (TILE_HEIGHT + GAP);
  }

  _draw() {
    const { clientWidth, clientHeight, scrollTop } = this.element;
    if (!clientHeight) return;
    this._columns = Math.max(1, Math.floor((clientWidth + GAP) / (TILE_WIDTH + GAP)));
    const rows = Math.ceil(this._pictures.length / this._columns);
    this._list.style.height = `${Math.max(0, rows * (TILE_HEIGHT + GAP) - GAP)}px`;
    const first = Math.floor(scrollTop / (TILE_HEIGHT + GAP)) * this._columns;
    const end = Math.ceil((scrollTop + clientHeight) / (TILE_HEIGHT + GAP)) * this._columns;
    const shown = this._pictures.slice(first, end);
    this._dropAllBut(new Set(shown.map(({ name }) => name)));
    const width = (clientWidth - GAP * (this._columns - 1)) / this._columns;
    shown.forEach((picture, place) => this._place(picture, first + place, width));
    this._order(shown);
    clearTimeout(this._resting);
    this._resting = setTimeout(() => this.tiles.forEach((tile) => tile.load()), REST);
  }

  _place(picture, place, width) {
    let tile = this._tiles.get(picture.name);
    if (!tile) {
      tile = this._makeTile(picture);
      this._tiles.set(picture.name, tile);
    }
    const { style } = tile.element;
    style.width = `${width}px`;
    style.transform = `translate(${(place % this._columns) * (width + GAP)}px, ${this._topOf(place)}px)`;
    tile.setPlace(place, this._pictures.length);
    tile.setCurrent(picture.name === this._current);
  }

  // Remove the tiles out of view, but not the one that the user is in.
  _dropAllBut(names) {
    for (const [name, tile] of this._tiles) {
      const isUsed = this._places.has(name) && tile.element.contains(document.activeElement);
      if (names.has(name) || isUsed) continue;
      tile.remove();
      this._tiles.delete(name);
    }
  }

  // Let the elements have the pictures' order, for screen readers and the Tab key. A moved element loses the focus.
  _order(shown) {
    const focused = document.activeElement;
    shown.forEach(({ name }, place) => {
      const { element } = this._tiles.get(name);
      if (this._list.children[place] !== element) this._list.insertBefore(element, this._list.children[place] ?? null);
    });
    if (focused !== document.activeElement && this._list.contains(focused)) focused.focus({ preventScroll: true });
  }
}

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
