// A grid of tiles of which only those in view are in the page, however many there are.
import { make } from "../panel/make.js";
import { t } from "../texts.js";

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
