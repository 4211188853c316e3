// Sample pictures: the strip below the chart, and one of them large.

import { t } from "../texts.js";
import { button, make, mark, openDialog, say } from "./make.js";

// Open the viewer. pictures: [{name, url}], the base model's first; place: index of the chosen one.
export function openViewer(pictures, place) {
  const [base, chosen] = [makeFigure(), makeFigure()];
  const back = button(t("Earlier"), () => show(place - 1));
  const on = button(t("Later"), () => show(place + 1));
  const dialog = make(
    "dialog",
    { class: "graft-viewer", "aria-label": t("Sample pictures") },
    make("div", { class: "graft-pair" }, base.element, chosen.element),
    make("div", { class: "graft-buttons" }, back, on, button(t("Close"), () => dialog.close())),
  );
  const show = (number) => {
    place = Math.min(pictures.length - 1, Math.max(0, number));
    base.show(pictures[0]);
    chosen.show(pictures[place]);
    base.element.hidden = place === 0;
    back.disabled = place === 0;
    on.disabled = place === pictures.length - 1;
  };
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

const MOST_NEW = 12; // pictures added per frame: a hundred at once would block the page

export class Strip {
  // address: function from a picture's description to its URL.
  constructor(address) {
    this._address = address;
    this._prompt = 0;
    this._training = null;
    this._seen = -1;
    this._thumbs = new Map(); // step -> {button, image}
    this._row = make("div", { class: "graft-row", role: "group", "aria-label": t("Sample pictures by step") });
    this._choice = makeChoice();
    this.element = make("div", { class: "graft-strip" }, this._choice, this._row);
  }

  show(training) {
    // Do not read the scroll position at each step: it forces a layout.
    if (training === this._training && training.shown === this._seen) return;
    this._seen = training.shown;
    if (training !== this._training) {
      this._training = training;
      this._thumbs.clear();
      this._row.replaceChildren();
    }
    this.element.hidden = training.samples.size === 0;
    const isAtEnd = this._row.scrollLeft + this._row.clientWidth >= this._row.scrollWidth - 8;
    const known = this._thumbs.size;
    const steps = [...training.samples.keys()].sort((a, b) => a - b);
    const shown = steps.filter((step, place) => this._thumbs.has(step) || place < known + MOST_NEW);
    shown.forEach((step, place) => this._place(step, place));
    if (shown.length < steps.length) {
      this._seen = -1;
      requestAnimationFrame(() => this.show(this._training));
    }
    this._offerPrompts(Math.max(0, ...steps.map((step) => training.samples.get(step).length)));
    if (isAtEnd && this._thumbs.size > known) this._row.scrollLeft = this._row.scrollWidth;
  }

  _place(step, place) {
    let thumb = this._thumbs.get(step);
    if (!thumb) {
      const caption = make("span", {}, step === 0 ? t("Base") : String(step));
      thumb = makeThumb(nameOf(step), caption, () => this._open(step));
      this._thumbs.set(step, thumb);
      this._row.insertBefore(thumb.button, this._row.children[place] ?? null);
    }
    const sample = this._sample(step);
    thumb.button.hidden = !sample;
    if (sample) mark(thumb.image, "src", this._address(sample, this._training));
  }

  _sample(step) {
    return this._training.samples.get(step)[this._prompt];
  }

  _offerPrompts(count) {
    this._choice.hidden = count < 2;
    while (this._choice.children.length < count) {
      const number = this._choice.children.length;
      const pick = () => {
        this._prompt = number;
        this._seen = -1;
        this.show(this._training);
      };
      this._choice.append(makePick(number, pick));
    }
    while (this._choice.children.length > count) this._choice.lastChild.remove();
    markPicked(this._choice, this._prompt);
  }

  _open(step) {
    const steps = [...this._training.samples.keys()].sort((a, b) => a - b).filter((key) => this._sample(key));
    const pictures = steps.map((key) => ({ name: nameOf(key), url: this._address(this._sample(key), this._training) }));
    openViewer(pictures, steps.indexOf(step));
  }
}

export function nameOf(step) {
  return step === 0 ? t("Base") : t("Step $step", { step });
}

// Return a button with a picture that opens enlarged when pressed, with an optional caption.
export function makeThumb(name, caption, open) {
  // The alt text is empty: the button's label has the name.
  const image = make("img", { alt: "", loading: "lazy", decoding: "async" });
  const label = t("$name, enlarge", { name });
  const element = make("button", { type: "button", class: "graft-thumb", "aria-label": label }, image, caption);
  element.addEventListener("click", open);
  return { button: element, image };
}

// Return a group of buttons to choose a prompt; one of them is pressed.
export function makeChoice(...buttons) {
  return make("div", { class: "graft-choice", role: "group", "aria-label": t("Prompt of the pictures") }, ...buttons);
}

export function makePick(number, pick) {
  const element = button(String(number + 1), pick);
  mark(element, "aria-label", t("Prompt $number", { number: number + 1 }));
  return element;
}

export function markPicked(choice, picked) {
  [...choice.children].forEach((button, number) => mark(button, "aria-pressed", number === picked));
}
