// Reports inside nodes: that of Graft Inspect Dataset, warnings first, and what Graft Apply Adapter has to say.
import { addElement, keepKeys, make } from "./panel/make.js";
import { listWarnings } from "./panel/words.js";
import { t } from "./texts.js";

export const INSPECTOR = "GraftInspectDataset";
export const APPLIER = "GraftApplyAdapter";
const HEIGHT = 150;
const SMALL = 60;

export function addReport(node) {
  const element = addSection(node, "graft_report", HEIGHT);
  const show = (...children) => element.replaceChildren(...children);
  show(make("p", {}, t("Press Run to see here what training will see.")));
  const { onExecuted } = node;
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    const warnings = listWarnings({ warnings: output.warnings ?? [] });
    const lines = (output.text?.[0] ?? "").split("\n").map((line) => line.replace(/^- /, ""));
    show(...warnings.map(warning), ...lines.map((line) => make("p", {}, line)));
  };
}

// Show a node's remarks on its last result, such as keys without effect. Without any, the node has its usual size.
export function addRemarks(node) {
  const { onExecuted } = node;
  let shown = null; // the element
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    const lines = (output.text?.[0] ?? "").split("\n").filter(Boolean);
    if (shown && lines.length) shown.replaceChildren(...lines.map(warning));
    if (!shown === !lines.length) return;
    if (shown) node.removeWidget(node.widgets.find(({ element }) => element === shown));
    // A new name each time: the new renderer keeps the element of a name.
    shown = lines.length ? addSection(node, `graft_remarks_${Date.now()}`, SMALL) : null;
    shown?.append(...lines.map(warning));
    node.setSize([node.size[0], node.computeSize()[1]]);
  };
}

function warning(line) {
  return make("p", { class: "graft-warning" }, line);
}

function addSection(node, name, height) {
  const element = make("section", { class: "graft-report", "aria-label": t("Report"), tabindex: 0 });
  keepKeys(element);
  addElement(node, name, "graft.report", element, height);
  return element;
}
