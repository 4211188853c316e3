// What the pack adds to the page: a live panel on every training node, the history of runs, commands and short notes.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { makeCommands, TAB } from "./commands.js";
import { followLinks } from "./help.js";
import { History } from "./history/tab.js";
import { nodeOf, isOf } from "./panel/graph.js";
import { Routes } from "./panel/routes.js";
import { Store } from "./panel/store.js";
import { throttled } from "./panel/throttle.js";
import { Panel, HEIGHT, WIDTH } from "./panel/view.js";
import { addReport, INSPECTOR } from "./report.js";
import { loadTexts, t } from "./texts.js";
import { Toasts } from "./toasts.js";
import { forgetChanged, learn, showUnset, UnsetFields } from "./unset.js";

const EVENT = "graft.progress";
const TRAINERS = new Set(["GraftTrainLoRA", "GraftTrainEmbedding", "GraftTrainDreamBooth", "GraftFineTune"]);
const PAUSE = 100; // milliseconds between two updates of the panels, at least
const LOOK = 2000; // and between two looks at the runs on disk

// After these the history shows something else of a run.
const MILESTONES = new Set(["run", "validation", "sample", "saved", "done", "paused", "cancelled", "failed"]);

let history = null;
let fields = null;
const panels = new WeakMap();
const routes = new Routes(api, app);
const show = throttled(showAll, PAUSE);
const store = new Store(routes, show, hear);
const toasts = new Toasts(() => app.extensionManager.toast);
const look = throttled(() => history?.isSeen && history.refresh(), LOOK);
const commands = makeCommands({ openHistory, store, routes, toasts });

function hear(message, training) {
  toasts.hear(message, training);
  history?.progress(training);
  // A run that has just begun is on disk when its first step is done.
  if (MILESTONES.has(message.event) || (message.event === "step" && history?.misses(training.run))) look();
}

function openHistory() {
  const { sidebarTab, command } = app.extensionManager;
  if (sidebarTab.activeSidebarTabId !== TAB) command.execute(`Workspace.ToggleSidebarTab.${TAB}`);
}

function addHistory() {
  history = new History(routes, app, toasts);
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-chart-line",
    title: t("Training runs"),
    tooltip: t("Training runs"),
    label: t("Graft runs"),
    type: "custom",
    render: (element) => history.render(element),
  });
}

function addStyles(...names) {
  for (const name of names) {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL(name, import.meta.url).href;
    document.head.append(style);
  }
}

// Inside subgraphs one node may stand for several trainings: the one that runs is shown, else the one that ran last.
function showAll() {
  const shown = new Map();
  for (const training of store.list()) {
    const node = isOf(training, app.rootGraph ?? app.graph) ? nodeOf(app.rootGraph ?? app.graph, training.node) : null;
    if (node && panels.has(node) && (training.isLive || !shown.get(node)?.isLive)) shown.set(node, training);
  }
  for (const [node, training] of shown) {
    panels.get(node).show(training);
    if (training.settings) learn(node, training.settings);
    store.recall(training);
  }
  fields?.refresh();
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
  name: "Graft",
  commands,
  menuCommands: [{ path: ["Graft"], commands: commands.map(({ id }) => id) }],
  async setup() {
    addStyles("./panel/panel.css", "./history/history.css");
    followLinks(document);
    await loadTexts(api, app);
    addHistory();
    api.addEventListener(EVENT, ({ detail }) => store.take(detail));
    api.addEventListener("reconnected", () => store.restore());
    store.restore();
    fields = new UnsetFields((id) => app.canvas?.graph?.getNodeById(id));
    api.addEventListener("graphChanged", () => {
      forgetChanged(app.canvas?.graph?.nodes ?? []);
      fields.refresh();
    });
  },
  nodeCreated(node) {
    showUnset(node);
    if (TRAINERS.has(node.comfyClass)) addPanel(node);
    if (node.comfyClass === INSPECTOR) addReport(node);
  },
  afterConfigureGraph() {
    show();
  },
});
