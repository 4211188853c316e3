// A run's name and note, and the use of its adapter in the graph.

import { make, openDialog } from "../panel/make.js";
import { t } from "../texts.js";

// Add ComfyUI's own loader with a LoRA chosen, in the middle of the visible area.
export function addLoader(app, name) {
  const node = window.LiteGraph.createNode("LoraLoader");
  const [x, y, width, height] = app.canvas.visible_area;
  node.pos = [Math.round(x + (width - node.size[0]) / 2), Math.round(y + (height - node.size[1]) / 2)];
  app.canvas.graph.add(node);
  node.widgets.find((widget) => widget.name === "lora_name").value = name;
  app.canvas.selectNode?.(node);
}

const TITLE_LIMIT = 80;
const NOTE_LIMIT = 2000;

// Open the dialog. save: called with {title, note}; if it fails, the dialog stays open.
export function openNotes(run, save) {
  const title = make("input", { type: "text", maxlength: TITLE_LIMIT, placeholder: run.name });
  const note = make("textarea", { maxlength: NOTE_LIMIT, rows: 5 });
  [title.value, note.value] = [run.title, run.note];
  const keep = make("button", { type: "submit", class: "graft-chief" }, t("Save"));
  const cancel = make("button", { type: "button" }, t("Cancel"));
  const problem = make("p", { class: "graft-quiet", role: "alert" });
  const form = make(
    "form",
    {},
    make("label", {}, t("Name"), title),
    make("label", {}, t("Note"), note),
    problem,
    make("div", { class: "graft-buttons" }, keep, cancel),
  );
  const name = t("Name and note of $run", { run: run.name });
  const dialog = make("dialog", { class: "graft-comparison graft-notes", "aria-label": name }, make("h2", {}, name), form);
  cancel.addEventListener("click", () => dialog.close());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    keep.disabled = true;
    try {
      await save({ title: title.value, note: note.value });
      dialog.close();
    } catch (error) {
      problem.textContent = error.message;
    }
    keep.disabled = false;
  });
  openDialog(dialog);
}
