// The hours in which a training does not run, in the server's time.
import { make, say } from "./make.js";
import { t } from "../texts.js";

export class Hours {
  // changed: called with {not_before, pause: [from, to]}, each a time such as "22:00" or "".
  constructor(changed) {
    this._fields = [t("Not before"), t("Pause from"), t("to")].map((label) => {
      const input = make("input", { type: "time" });
      input.addEventListener("change", () => changed(this._values()));
      return { input, element: make("label", {}, label, " ", input) };
    });
    this._clock = make("span", { class: "graft-quiet" });
    this.element = make("div", { class: "graft-hours" }, ...this._fields.map(({ element }) => element), this._clock);
    this.element.hidden = true;
    // The graph has shortcuts for digits.
    this.element.addEventListener("keydown", (event) => event.stopPropagation());
  }

  show({ not_before: start, pause, clock }) {
    [start, ...pause].forEach((value, place) => {
      const { input } = this._fields[place];
      if (input !== document.activeElement && input.value !== value) input.value = value;
    });
    say(this._clock, t("The server's time, now $time", { time: clock }));
  }

  _values() {
    const [start, ...pause] = this._fields.map(({ input }) => input.value);
    return { not_before: start, pause };
  }
}
