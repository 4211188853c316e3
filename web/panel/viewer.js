// A full-size sample picture beside the base model's.
import { make, mark, openDialog, say } from "./make.js";
import { t } from "../texts.js";

// Open the viewer. pictures: [{name, url}], the base model's first; place: index of the chosen one.
export function openViewer(pictures, place) {
  const [base, chosen] = [makeFigure(), makeFigure()];
  const back = make("button", { type: "button" }, t("Earlier"));
  const on = make("button", { type: "button" }, t("Later"));
  const close = make("button", { type: "button" }, t("Close"));
  const dialog = make(
    "dialog",
    { class: "graft-viewer", "aria-label": t("Sample pictures") },
    make("div", { class: "graft-pair" }, base.element, chosen.element),
    make("div", { class: "graft-buttons" }, back, on, close),
  );
  const show = (number) => {
    place = Math.min(pictures.length - 1, Math.max(0, number));
    base.show(pictures[0]);
    chosen.show(pictures[place]);
    base.element.hidden = place === 0;
    back.disabled = place === 0;
    on.disabled = place === pictures.length - 1;
  };
  back.addEventListener("click", () => show(place - 1));
  on.addEventListener("click", () => show(place + 1));
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(place - 1);
    if (event.key === "ArrowRight") show(place + 1);
  });
  show(place);
  openDialog(dialog);
}

function makeFigure() {
  const image = make("img");
  const caption = make("figcaption", { "aria-live": "polite" });
  const show = ({ name, url }) => {
    mark(image, "src", url);
    mark(image, "alt", t("Sample picture: $name", { name }));
    say(caption, name);
  };
  return { element: make("figure", {}, image, caption), show };
}
