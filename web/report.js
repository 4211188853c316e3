// The report of Graft Inspect Dataset inside the node, warnings first.
import { keepKeys, make } from "./panel/make.js";
import { listWarnings } from "./panel/words.js";
import { t } from "./texts.js";

export const INSPECTOR = "GraftInspectDataset";
const HEIGHT = 150;

export function addReport(node) {
  const element = make("section", { class: "graft-report", "aria-label": t("Report"), tabindex: 0 });
  const show = (...children) => element.replaceChildren(...children);
  show(make("p", {}, t("Press Run to see here what training will see.")));
  keepKeys(element);
  const widget = node.addDOMWidget("graft_report", "graft.report", element, {
    serialize: false, // omitted from the prompt
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // and from the workflow
  const { onExecuted } = node;
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    const warnings = listWarnings({ warnings: output.warnings ?? [] });
    const lines = (output.text?.[0] ?? "").split("\n").map((line) => line.replace(/^- /, ""));
    show(...warnings.map((line) => make("p", { class: "graft-warning" }, line)), ...lines.map((line) => make("p", {}, line)));
  };
}
