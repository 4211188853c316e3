// The mask editor: paint over a picture what training learns of it.
import { button, make, mark, openDialog, say } from "../panel/make.js";
import { t } from "../texts.js";
import { askToLeave } from "./conflict.js";

const MOST_PIXELS = 48e6; // pixels that the steps to undo may hold together

// A mask at its picture's full size. The canvas holds what training leaves out: black, as opaque as it is left out.
class MaskCanvas {
  // Nothing is learned at first. changed: called after each change.
  constructor(width, height, changed) {
    this.element = document.createElement("canvas");
    Object.assign(this.element, { width, height });
    this._pen = this.element.getContext("2d", { willReadFrequently: true });
    this._pen.lineCap = "round";
    this._pen.lineJoin = "round";
    this._pen.fillRect(0, 0, width, height);
    this._changed = changed;
    this._past = []; // pixels before each change: {x, y, pixels}
    this._future = [];
    this._stroke = null;
  }

  get canUndo() {
    return this._past.length > 0;
  }

  get canRedo() {
    return this._future.length > 0;
  }

  // Begin a stroke of a brush that lets training learn, or leaves out.
  beginStroke(point, size, learns) {
    this._stroke = { size, learns, points: [point], before: this._copy() };
    this._draw(point, point);
  }

  moveStroke(point) {
    if (!this._stroke) return;
    this._draw(this._stroke.points.at(-1), point);
    this._stroke.points.push(point);
  }

  endStroke() {
    if (!this._stroke) return;
    const { size, points, before } = this._stroke;
    this._stroke = null;
    const half = size / 2 + 2;
    const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
    const left = Math.max(0, Math.floor(Math.min(...xs) - half));
    const top = Math.max(0, Math.floor(Math.min(...ys) - half));
    const right = Math.min(this.element.width, Math.ceil(Math.max(...xs) + half));
    const bottom = Math.min(this.element.height, Math.ceil(Math.max(...ys) + half));
    if (right <= left || bottom <= top) return;
    const pixels = before.getContext("2d").getImageData(left, top, right - left, bottom - top);
    this._keep({ x: left, y: top, pixels });
  }

  fill() {
    this._changeAll(() => this._pen.clearRect(0, 0, this.element.width, this.element.height));
  }

  invert() {
    const { width, height } = this.element;
    this._changeAll(() => this._compose("source-out", () => this._pen.fillRect(0, 0, width, height)));
  }

  soften(pixels) {
    const { width, height } = this.element;
    const copy = this._copy();
    this._changeAll(() => {
      this._pen.clearRect(0, 0, width, height);
      this._pen.filter = `blur(${pixels / 2}px)`;
      // The frame's colors go on beyond it: a blur would else let training learn along the frame.
      const pad = Math.ceil(pixels * 2);
      this._pen.drawImage(extend(copy, pad), -pad, -pad);
      this._pen.filter = "none";
    });
  }

  // Take a picture as the mask: white is learned; black and transparent are not.
  async load(blob, isStep = true) {
    const image = await createImageBitmap(blob);
    const { width, height } = this.element;
    const pen = newCanvas(width, height).getContext("2d");
    pen.drawImage(image, 0, 0, width, height);
    const read = pen.getImageData(0, 0, width, height);
    const { data } = read;
    for (let place = 0; place < data.length; place += 4) {
      const light = 0.299 * data[place] + 0.587 * data[place + 1] + 0.114 * data[place + 2];
      data[place + 3] = 255 - Math.round((light * data[place + 3]) / 255);
      data.fill(0, place, place + 3);
    }
    const put = () => this._pen.putImageData(read, 0, 0);
    if (isStep) this._changeAll(put);
    else put();
  }

  undo() {
    this._swap(this._past, this._future);
  }

  redo() {
    this._swap(this._future, this._past);
  }

  // Return the mask as a PNG: white is learned.
  toBlob() {
    const { width, height } = this.element;
    const canvas = newCanvas(width, height);
    const pen = canvas.getContext("2d");
    pen.fillStyle = "white";
    pen.fillRect(0, 0, width, height);
    pen.drawImage(this.element, 0, 0);
    return new Promise((take, fail) =>
      canvas.toBlob((blob) => (blob ? take(blob) : fail(new Error("The browser cannot make this mask."))), "image/png"),
    );
  }

  _draw([fromX, fromY], [toX, toY]) {
    const { size, learns } = this._stroke;
    this._pen.lineWidth = size;
    this._compose(learns ? "destination-out" : "source-over", () => {
      this._pen.beginPath();
      this._pen.moveTo(fromX, fromY);
      this._pen.lineTo(toX, toY);
      this._pen.stroke();
    });
  }

  _compose(way, work) {
    this._pen.globalCompositeOperation = way;
    work();
    this._pen.globalCompositeOperation = "source-over";
  }

  _copy() {
    const copy = newCanvas(this.element.width, this.element.height);
    copy.getContext("2d").drawImage(this.element, 0, 0);
    return copy;
  }

  _changeAll(work) {
    const pixels = this._pen.getImageData(0, 0, this.element.width, this.element.height);
    work();
    this._keep({ x: 0, y: 0, pixels });
  }

  _keep(step) {
    this._past.push(step);
    this._future = [];
    const held = () => this._past.reduce((sum, { pixels }) => sum + pixels.width * pixels.height, 0);
    while (this._past.length > 1 && held() > MOST_PIXELS) this._past.shift();
    this._changed();
  }

  _swap(from, to) {
    const step = from.pop();
    if (!step) return;
    const { x, y, pixels } = step;
    to.push({ x, y, pixels: this._pen.getImageData(x, y, pixels.width, pixels.height) });
    this._pen.putImageData(pixels, x, y);
    this._changed();
  }
}

function newCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

// Return a picture with its outermost pixels repeated around it.
function extend(image, pad) {
  const { width, height } = image;
  const canvas = newCanvas(width + 2 * pad, height + 2 * pad);
  const pen = canvas.getContext("2d");
  const columns = [[0, 1, 0, pad], [0, width, pad, width], [width - 1, 1, pad + width, pad]];
  const rows = [[0, 1, 0, pad], [0, height, pad, height], [height - 1, 1, pad + height, pad]];
  for (const [x, wide, toX, toWide] of columns) {
    for (const [y, high, toY, toHigh] of rows) pen.drawImage(image, x, y, wide, high, toX, toY, toWide, toHigh);
  }
  return canvas;
}

const ZOOMS = [0.1, 0.25, 0.5, 1, 2, 4];

export async function openMaskEditor({ page, routes, picture }) {
  try {
    const before = picture.mask ? await routes.readMask(page.dataset.folder, picture.name, page.values) : null;
    const editor = new MaskEditor(page, picture, before, routes.pictureUrl(page.dataset.folder, picture));
    await editor.open();
  } catch (error) {
    page.note(error.message, true);
  }
}

class MaskEditor {
  constructor(page, picture, before, url) {
    this._page = page;
    this._picture = picture;
    this._before = before;
    this._learns = true;
    const [width, height] = picture.size;
    this._mask = new MaskCanvas(width, height, () => this._update());
    this._build(url);
    this._listen();
  }

  async open() {
    if (this._before) await this._mask.load(this._before, false);
    openDialog(this.dialog, true);
    const { clientWidth, clientHeight } = this._scroller;
    const [width, height] = this._picture.size;
    this._show(Math.min(1, clientWidth / width, clientHeight / height));
    this._update();
  }

  _build(url) {
    const { name } = this._picture;
    this._paint = button(t("Paint: learn this"), () => this._choose(true));
    this._erase = button(t("Erase: leave this out"), () => this._choose(false));
    this._size = make("input", { type: "range", min: 1, max: 100, value: 30 });
    this._soft = make("input", { type: "number", min: 1, max: 200, value: 12, "aria-label": t("Soft edge") });
    const file = make("input", { type: "file", accept: "image/*", hidden: "", "aria-label": t("Load a file") });
    file.addEventListener("change", () => file.files[0] && this._try(() => this._mask.load(file.files[0])));
    this._undo = button(t("Undo"), () => this._mask.undo());
    this._redo = button(t("Redo"), () => this._mask.redo());
    this._remove = button(t("Remove the mask"), () => this._save(null));
    this._keep = button(t("Save the mask"), async () => this._save(await this._mask.toBlob()));
    this._keep.classList.add("graft-chief");
    const hint = t("Dark parts are left out. To leave out a little: fill, then erase.");
    this._note = make("p", { class: "graft-quiet", role: "status" }, hint);
    const image = make("img", { src: url, alt: name, draggable: "false" });
    mark(this._mask.element, "role", "img");
    mark(this._mask.element, "aria-label", t("Mask of $name", { name }));
    this._sheet = make("div", { class: "graft-mask-sheet" }, image, this._mask.element);
    const seen = { class: "graft-mask-scroller", tabindex: 0, role: "region", "aria-label": t("Picture") };
    this._scroller = make("div", seen, this._sheet);
    this.dialog = make(
      "dialog",
      { class: "graft-dataset graft-mask-editor", "aria-label": t("Mask of $name", { name }) },
      make("header", {}, make("h2", {}, t("Mask of $name", { name })), this._note),
      make(
        "div",
        { class: "graft-buttons" },
        this._paint,
        this._erase,
        make("label", {}, t("Brush"), this._size),
        button(t("Fill"), () => this._mask.fill()),
        button(t("Invert"), () => this._mask.invert()),
        this._soft,
        button(t("Soft edge"), () => this._soft.validity.valid && this._mask.soften(this._soft.valueAsNumber)),
        button(t("Load a file"), () => file.click()),
        file,
        button(t("Smaller"), () => this._zoom(-1)),
        button(t("Larger"), () => this._zoom(1)),
        this._undo,
        this._redo,
      ),
      this._scroller,
      make("div", { class: "graft-buttons" }, this._keep, this._remove, button(t("Cancel"), () => this._leave())),
    );
    this._leave = askToLeave(this.dialog, () => this._mask.canUndo || this._mask.canRedo);
    this._choose(true);
  }

  _listen() {
    const { element } = this._mask;
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      element.setPointerCapture(event.pointerId);
      const larger = Math.max(element.width, element.height);
      // The brush's size is part of the picture's: it grows faster than the slider.
      const size = Math.max(1, larger * 0.4 * (this._size.valueAsNumber / 100) ** 2);
      this._mask.beginStroke(this._pointOf(event), size, this._learns);
    });
    element.addEventListener("pointermove", (event) => {
      for (const point of event.getCoalescedEvents?.() ?? [event]) this._mask.moveStroke(this._pointOf(point));
    });
    for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, () => this._mask.endStroke());
    this.dialog.addEventListener("keydown", (event) => {
      if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z") return;
      event.preventDefault();
      if (event.shiftKey) this._mask.redo();
      else this._mask.undo();
    });
  }

  _pointOf({ clientX, clientY }) {
    const { element } = this._mask;
    const { left, top, width, height } = element.getBoundingClientRect();
    return [((clientX - left) / width) * element.width, ((clientY - top) / height) * element.height];
  }

  _choose(learns) {
    this._learns = learns;
    mark(this._paint, "aria-pressed", learns);
    mark(this._erase, "aria-pressed", !learns);
  }

  _zoom(step) {
    const next = step > 0 ? ZOOMS.find((zoom) => zoom > this._scale) : ZOOMS.findLast((zoom) => zoom < this._scale);
    if (next) this._show(next);
  }

  _show(scale) {
    this._scale = scale;
    const [width, height] = this._picture.size;
    Object.assign(this._sheet.style, { width: `${width * scale}px`, height: `${height * scale}px` });
  }

  _update() {
    this._undo.disabled = !this._mask.canUndo;
    this._redo.disabled = !this._mask.canRedo;
    this._remove.disabled = !this._before;
  }

  async _save(png) {
    this._keep.disabled = true;
    const isSaved = await this._page.actions.setMask(this._picture, png, this._before);
    this._keep.disabled = false;
    if (isSaved) this.dialog.close();
    else say(this._note, t("Not saved"));
  }

  async _try(work) {
    try {
      await work();
    } catch {
      say(this._note, t("Cannot be read"));
    }
  }
}
