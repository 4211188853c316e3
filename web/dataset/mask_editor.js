// The mask editor: paint over a picture what training learns of it.
import { button, make, mark, openDialog, say } from "../panel/make.js";
import { t } from "../texts.js";
import { askToLeave } from "./conflict.js";
import { MaskCanvas } from "./mask_canvas.js";

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
