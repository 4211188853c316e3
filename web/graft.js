// The live panel: puts one on every training node and keeps all of them at what their trainings told last.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nodeOf, isOf } from "./panel/graph.js";
import { Routes } from "./panel/routes.js";
import { Store } from "./panel/store.js";
import { throttled } from "./panel/throttle.js";
import { Panel, HEIGHT, WIDTH } from "./panel/view.js";
import { loadTexts } from "./texts.js";

const EVENT = "graft.progress";
const TRAINERS = new Set(["GraftTrainLoRA", "GraftTrainEmbedding", "GraftTrainDreamBooth", "GraftFineTune"]);
const PAUSE = 100; // milliseconds between two updates of the panels, at least

const panels = new WeakMap();
const routes = new Routes(api, app);
const show = throttled(showAll, PAUSE);
const store = new Store(routes, show);

// Inside subgraphs one node may stand for several trainings: the one that runs is shown, else the one that ran last.
function showAll() {
  const shown = new Map();
  for (const training of store.list()) {
    const node = isOf(training, app.rootGraph ?? app.graph) ? nodeOf(app.rootGraph ?? app.graph, training.node) : null;
    if (node && panels.has(node) && (training.isLive || !shown.get(node)?.isLive)) shown.set(node, training);
  }
  for (const [node, training] of shown) {
    panels.get(node).show(training);
    store.recall(training);
  }
}

function addPanel(node) {
  const panel = new Panel(routes);
  const widget = node.addDOMWidget("graft_panel", "graft.panel", panel.element, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // nor in the workflow
  // Sample pictures are in the panel: the host's own preview of them would make the node longer (see panel.css too).
  node.onDrawBackground = () => {};
  node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]);
  panels.set(node, panel);
}

app.registerExtension({
  name: "Graft.Panel",
  async setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./panel/panel.css", import.meta.url).href;
    document.head.append(style);
    api.addEventListener(EVENT, ({ detail }) => store.take(detail));
    api.addEventListener("reconnected", () => store.restore());
    await loadTexts(api, app);
    store.restore();
  },
  nodeCreated(node) {
    if (TRAINERS.has(node.comfyClass)) addPanel(node);
  },
  afterConfigureGraph() {
    show();
  },
});
