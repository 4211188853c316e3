// One picture at full size, with the part that training sees; a press moves its center.
import { button, make, mark, openDialog, say } from "../panel/make.js";
import { t } from "../texts.js";
import { describeFacts } from "./grid.js";
import { openMaskEditor } from "./mask_editor.js";

const STEP = 0.02; // how far an arrow key moves the center, in fractions of the picture

// Open the view of a picture of the page; the others can be reached from it.
export function openPicture({ page, routes, name }) {
  const view = new PictureView(page, routes, name);
  page.shown = () => view.update();
  view.dialog.addEventListener("close", () => {
    page.shown = null;
    page.grid.goTo(page.grid.placeOf(view.name))?.element.focus();
  });
  openDialog(view.dialog);
}

class PictureView {
  constructor(page, routes, name) {
    this._page = page;
    this._routes = routes;
    this.name = name;
    this._image = make("img", { draggable: "false" });
    this._crop = make("div", { class: "graft-crop", "aria-hidden": "true" });
    const hint = t("Press where the middle of the crop shall be, or move it with the arrow keys and Shift.");
    this._frame = make("div", { class: "graft-frame" }, this._image, this._crop);
    this._frame.addEventListener("click", (event) => this._pick(event));
    this._title = make("h2");
    this._facts = make("p", { class: "graft-quiet", role: "status" });
    this._back = button(t("Earlier"), () => this._move(-1));
    this._on = button(t("Later"), () => this._move(1));
    this._middle = button(t("Crop in the middle"), () => this._act((picture) => page.actions.setCenter(picture, null)));
    this._exclude = button("", () => this._act((picture) => page.actions.exclude([picture], !picture.excluded)));
    this._mask = button(t("Edit the mask"), () => this._act((picture) => openMaskEditor({ page, routes, picture })));
    const turn = (degrees) => () => this._act((picture) => page.actions.rotate([picture], degrees));
    this._acts = [button(t("Rotate left"), turn(270)), button(t("Rotate right"), turn(90))];
    this.dialog = make(
      "dialog",
      { class: "graft-viewer graft-picture-view", "aria-label": t("Picture") },
      this._title,
      this._facts,
      this._frame,
      make("p", { class: "graft-quiet" }, hint),
      make(
        "div",
        { class: "graft-buttons" },
        this._back,
        this._on,
        this._middle,
        ...this._acts,
        this._mask,
        this._exclude,
        button(t("Close"), () => this.dialog.close()),
      ),
    );
    this.dialog.addEventListener("keydown", (event) => this._key(event));
    this.update();
  }

  get _picture() {
    return this._page.dataset.pictures.get(this.name);
  }

  update() {
    const picture = this._picture;
    if (!picture) {
      this.dialog.close();
      return;
    }
    const { shown } = this._page.dataset;
    const place = this._page.grid.placeOf(this.name);
    const isReadable = Boolean(picture.size);
    say(this._title, this.name);
    say(this._facts, picture.problem || this._page.problem || describeFacts(picture));
    mark(this._image, "alt", this.name);
    if (isReadable) mark(this._image, "src", this._routes.pictureUrl(this._page.dataset.folder, picture));
    else this._image.removeAttribute("src");
    if (isReadable) this._frame.style.aspectRatio = picture.size.join("/");
    this._frame.style.setProperty("--graft-shape", isReadable ? picture.size[0] / picture.size[1] : 1);
    this._crop.hidden = !picture.crop;
    const [left, top, width, height] = (picture.crop ?? [0, 0, 1, 1]).map((share) => `${share * 100}%`);
    Object.assign(this._crop.style, { left, top, width, height });
    this._back.disabled = place <= 0;
    this._on.disabled = place < 0 || place >= shown.length - 1;
    this._middle.disabled = !picture.center;
    const { masks, mask_folder: maskFolder } = this._page.values;
    const isIgnored = masks === "off" || maskFolder.trim() !== "";
    const why = t("Training would ignore this mask: the node's masks are off, or its mask_folder is set.");
    this._mask.disabled = !isReadable || isIgnored;
    mark(this._mask, "title", isIgnored ? why : "");
    for (const act of this._acts) act.disabled = !isReadable;
    say(this._exclude, picture.excluded ? t("Include") : t("Exclude"));
  }

  _act(work) {
    if (this._picture) work(this._picture);
  }

  _move(step) {
    const next = this._page.dataset.shown[this._page.grid.placeOf(this.name) + step];
    if (!next) return;
    this.name = next.name;
    this.update();
  }

  _pick(event) {
    const { left, top, width, height } = this._frame.getBoundingClientRect();
    this._center([(event.clientX - left) / width, (event.clientY - top) / height]);
  }

  _center(point) {
    const inside = point.map((share) => Number(Math.min(1, Math.max(0, share)).toFixed(4)));
    this._act((picture) => picture.crop && this._page.actions.setCenter(picture, inside));
  }

  _key(event) {
    const isCommand = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (isCommand && key === "z") return event.shiftKey ? this._page.redo() : this._page.undo();
    if (isCommand && key === "y") return this._page.redo();
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (!move || isCommand) return null;
    event.preventDefault();
    if (!event.shiftKey) return this._move(move[0]);
    const [left, top, width, height] = this._picture?.crop ?? [0, 0, 1, 1];
    const [x, y] = this._picture?.center ?? [left + width / 2, top + height / 2];
    return this._center([x + move[0] * STEP, y + move[1] * STEP]);
  }
}
