// Display of unset numbers, 0 or -1 in the workflow, as "auto" with the effective value if it is known.
import { formatRate } from "./panel/words.js";
import { t } from "./texts.js";

const RATE = /learning_rate$/;
const WORD_FIELDS = { vectors: "embedding_vectors", learning_rate: "embedding_learning_rate", stop_fraction: "embedding_stop" };

// A widget's name in a run's settings by the node's type, if it differs from the widget's own name.
const FIELDS = {
  GraftPreviewOptions: (name) => `preview_${name}`,
  GraftPivotalOptions: (name) => WORD_FIELDS[name],
};

// node -> settings of the last run that it was part of: {values, trainer, print}
const known = new WeakMap();

// Return the server's {value, usual} of an input that may be left unset; undefined for others.
function unsetOf(node, name) {
  const { input } = node.constructor.nodeData ?? {};
  return (input?.required?.[name] ?? input?.optional?.[name])?.[1]?.graft_unset;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function format(name, value) {
  return RATE.test(name) ? formatRate(value) : String(Number(value.toPrecision(6)));
}

// Return the text shown instead of a widget's number, "" if the number itself is shown.
export function textOf(node, widget) {
  const unset = unsetOf(node, widget.name);
  if (!unset || Number(widget.value) !== unset.value) return "";
  const field = (FIELDS[node.comfyClass] ?? String)(widget.name);
  const value = known.get(node)?.values[field];
  const isKnown = isNumber(value) && value !== unset.value && !(value === 0 && unset.usual === "none");
  const usual = isKnown ? format(widget.name, value) : usualOf(node, unset);
  if (usual === "none") return t("none");
  return usual ? t("auto ($value)", { value: usual }) : t("auto");
}

// Return the usual value, unless an input that the page cannot judge may change it.
function usualOf(node, { usual, when = {} }) {
  const holds = Object.entries(when).every(([name, wanted]) =>
    [...listUpstream(node)].every((source) => {
      const widget = source.widgets?.find((candidate) => candidate.name === name);
      return !widget || !isOurs(source) || widget.value === wanted;
    }),
  );
  return holds ? usual : "";
}

function isOurs(node) {
  return node.comfyClass?.startsWith("Graft");
}

function listUpstream(node, nodes = new Set()) {
  if (!node || nodes.has(node)) return nodes;
  nodes.add(node);
  for (let slot = 0; slot < (node.inputs?.length ?? 0); slot += 1) listUpstream(node.getInputNode(slot), nodes);
  return nodes;
}

// Return a fingerprint of all values that may decide the settings.
function printOf(trainer) {
  const isOwn = (node, { name }) => node === trainer && name !== "train";
  return JSON.stringify(
    [...listUpstream(trainer)].map((node) => [
      node.id,
      ...(node.widgets ?? []).filter((widget) => widget.options?.serialize !== false && !isOwn(node, widget)).map(({ value }) => value),
    ]),
  );
}

// Record a run's settings for its trainer and all nodes upstream.
export function learn(trainer, values) {
  if (known.get(trainer)?.values === values) return;
  const row = { values, trainer, print: printOf(trainer) };
  for (const node of listUpstream(trainer)) known.set(node, row);
}

// Forget settings once the values that decided them have changed in the graph.
export function forgetChanged(nodes) {
  for (const node of nodes) {
    const row = known.get(node);
    if (row && row.print !== printOf(row.trainer)) known.delete(node);
  }
}

export function showUnset(node) {
  for (const widget of node.widgets ?? []) {
    if (!unsetOf(node, widget.name)) continue;
    const drawn = findGetter(widget, "_displayValue");
    if (!drawn) continue;
    Object.defineProperty(widget, "_displayValue", {
      configurable: true,
      get() {
        return (!this.computedDisabled && textOf(node, this)) || drawn.call(this);
      },
    });
    // Nodes 2.0 in older frontends rounds to three digits without this option.
    widget.options.maxFractionDigits ??= Math.max(3, widget.options.precision ?? 0);
  }
}

function findGetter(object, name) {
  for (let owner = object; owner; owner = Object.getPrototypeOf(owner)) {
    const descriptor = Object.getOwnPropertyDescriptor(owner, name);
    if (descriptor) return descriptor.get;
  }
  return null;
}

// Texts for unset numbers in Nodes 2.0, whose fields are HTML elements: a text covers each field until it is edited.
export class UnsetFields {
  // nodeOf: returns the node of an id in the visible graph.
  constructor(nodeOf) {
    this._nodeOf = nodeOf;
    this._isAsked = false;
    const isInPanel = ({ target }) => target.closest?.(".graft-panel, .graft-report");
    const watch = { childList: true, subtree: true, attributes: true, attributeFilter: ["aria-valuenow"] };
    new MutationObserver((changes) => {
      if (!changes.every(isInPanel)) this.refresh();
    }).observe(document.body, watch);
  }

  refresh() {
    if (this._isAsked) return;
    this._isAsked = true;
    requestAnimationFrame(() => {
      this._isAsked = false;
      for (const element of document.querySelectorAll("[data-node-id]")) this._mark(element);
    });
  }

  _mark(element) {
    const node = this._nodeOf(element.dataset.nodeId);
    for (const widget of node?.widgets ?? []) {
      if (!unsetOf(node, widget.name)) continue;
      const field = element.querySelector(`[aria-label="${widget.name}"]`);
      const input = field?.matches("input") ? field : field?.querySelector("input");
      if (input) cover(input, textOf(node, widget));
    }
  }
}

function cover(input, text) {
  const holder = input.parentElement;
  let over = holder.querySelector(":scope > .graft-unset");
  if (!over && !text) return;
  if (!over) {
    over = document.createElement("span");
    over.className = "graft-unset";
    over.setAttribute("aria-hidden", "true");
    holder.append(over);
  }
  if (over.textContent !== text) over.textContent = text;
  holder.classList.toggle("graft-has-unset", Boolean(text));
  if (text) input.setAttribute("aria-valuetext", text);
  else input.removeAttribute("aria-valuetext");
}
