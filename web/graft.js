// Entry point of the pack's page extension: live panels on training nodes and their subgraphs, the history of runs,
// commands and toasts.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { makeCommands, TAB } from "./commands.js";
import { DatasetNodes, LOADER } from "./dataset/node.js";
import { History } from "./history/tab.js";
import { allNodes, dropQuarantine, hasSources, keepEdits, keepLinks, pathOf } from "./panel/graph.js";
import { addElement, throttled } from "./panel/make.js";
import { DatasetRoutes, Routes } from "./panel/routes.js";
import { Store } from "./panel/training.js";
import { Panel, HEIGHT, WIDTH } from "./panel/view.js";
import { listQueue } from "./panel/words.js";
import { addRemarks, addReport, APPLIER, INSPECTOR } from "./report.js";
import { loadTexts, t } from "./texts.js";
import { Toasts } from "./toasts.js";
import { forgetChanged, learn, showUnset, UnsetFields } from "./unset.js";

const EVENT = "graft.progress";
const NAMED = /^(?:.*\/)?extensions\/graft\//; // start of a link between help pages
const TRAINERS = new Set([
  "GraftTrainLoRA",
  "GraftTrainEmbedding",
  "GraftTrainDreamBooth",
  "GraftFineTune",
  "GraftTrainPreference",
  "GraftTrainSlider",
]);
const PAUSE = 100; // minimum milliseconds between two updates of the panels
const LOOK = 2000; // minimum milliseconds between two reads of the runs on disk
const READ = 300; // minimum milliseconds between two reads of the graph

// Events after which the history's view of a run is outdated.
const MILESTONES = new Set(["run", "validation", "sample", "saved", "done", "paused", "waiting", "cancelled", "failed"]);

let history = null;
let fields = null;
let prompt = {}; // the graph as Run would queue it
let opened = 0; // number of graphs opened so far
let queued = ""; // the trainings of ComfyUI's queue, as the panels name them
let isProbing = false; // a node is made only to read its inputs
const panels = new WeakMap();
const routes = new Routes(api, app);
const show = throttled(showAll, PAUSE);
const store = new Store(routes, show, hear);
const toasts = new Toasts(() => app.extensionManager.toast);
const refresh = throttled(() => history?.isSeen && history.refresh(), LOOK);
const read = throttled(look, READ);
const readQueue = throttled(lookAtQueue, LOOK);
const datasets = new DatasetNodes({ app, routes: new DatasetRoutes(api), toasts });
const openDataset = () => datasets.openAny();
const commands = makeCommands({ openHistory, openDataset, store, routes, toasts });

function hear(message, training) {
  toasts.hear(message, training);
  history?.progress(training);
  // A new run is on disk once its first step is done.
  if (MILESTONES.has(message.event) || (message.event === "step" && history?.misses(training.run))) refresh();
  if (message.event === "begin") read();
  if (history?.isSeen || queued || MILESTONES.has(message.event)) readQueue();
}

// Read ComfyUI's queue, if the sidebar or a panel shows it or a training waits in it.
async function lookAtQueue() {
  const shown = [...allNodes(rootGraph())].map((node) => panels.get(node)).filter(Boolean);
  if (!history?.isSeen && !store.waiting.length && !shown.length) return;
  try {
    const queue = await routes.listQueue();
    const { prompts } = queue;
    store.settle(queue);
    history?.showQueue(prompts);
    queued = listQueue(prompts);
    for (const panel of shown) panel.showQueue(queued);
  } catch (error) {
    console.warn("Graft: cannot read the queue:", error.message);
  }
}

async function restore() {
  await store.restore();
  read();
  readQueue();
}

function openHistory() {
  const { sidebarTab, command } = app.extensionManager;
  if (sidebarTab.activeSidebarTabId !== TAB) command.execute(`Workspace.ToggleSidebarTab.${TAB}`);
}

function addHistory() {
  history = new History(routes, app, toasts, openDataset);
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-chart-line",
    title: t("Training runs"),
    tooltip: t("Training runs"),
    label: t("Graft runs"),
    type: "custom",
    render: (element) => {
      history.render(element);
      readQueue();
    },
  });
}

function addStyle() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("./graft.css", import.meta.url).href;
  document.head.append(style);
}

// Repair a link in a help page, which assumes the registry's folder name, if the pack's folder has another name.
function rehome({ target }) {
  const link = target.closest?.('a[href*="extensions/graft/docs/"]');
  if (link) link.href = new URL(link.getAttribute("href").replace(NAMED, ""), import.meta.url).href;
}

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

// Read the graph as Run would queue it. The panels choose runs by what the graph's trainers would train.
async function look() {
  for (const node of allNodes(rootGraph())) offerPanel(node);
  if (!store.list().length) return;
  const graph = opened;
  try {
    const { output } = await app.graphToPrompt();
    if (graph === opened) prompt = output;
  } catch (error) {
    console.warn("Graft: cannot read the graph:", error.message);
  }
  show();
}

function showAll() {
  const root = rootGraph();
  const shown = new Map(); // panel -> [training, whether the graph's values match it]
  const trainings = store.list();
  for (const [id, { class_type: kind }] of Object.entries(prompt)) {
    if (!TRAINERS.has(kind)) continue;
    const [training, isSame] = choose(trainings, id);
    if (training?.settings) learn(pathOf(root, id).at(-1), training.settings);
    for (const node of training ? pathOf(root, id) : []) {
      const panel = panels.get(node);
      // A node in a subgraph may stand for several trainings, and a subgraph may hold several trainers. Show the
      // running training, else the last one.
      const [known] = shown.get(panel) ?? [];
      const isLater = trainings.indexOf(training) > trainings.indexOf(known);
      if (panel && (!known || training.isLive > known.isLive || (training.isLive === known.isLive && isLater))) {
        shown.set(panel, [training, isSame, prompt[id].inputs.steps]);
      }
    }
  }
  for (const [panel, [training, isSame, steps]] of shown) {
    panel.show(training, isSame, steps);
    store.recall(training);
  }
  fields?.refresh();
}

// Return the training for a node's panel, and whether Run would train the same: the one that runs there, else the last
// one with the node's own inputs, else the one that the panel has shown since the graph was opened.
function choose(trainings, id) {
  const isHere = (training) => training.node === id && training.workflow !== "" && training.workflow === rootGraph()?.id;
  const isSame = (training) =>
    training.sources ? hasSources(prompt, id, training.sources, training.node, inputsOf) : isHere(training);
  const live = trainings.findLast((training) => training.isLive && isHere(training));
  if (live) return [live, isSame(live)];
  const same = trainings.findLast(isSame);
  if (same) return [same, true];
  const node = pathOf(rootGraph(), id).at(-1);
  const kept = panels.get(node)?.training;
  return kept && trainings.includes(kept) ? [kept, false] : [null, false];
}

function inputsOf(kind) {
  const { required, optional } = LiteGraph.registered_node_types[kind]?.nodeData?.input ?? {};
  return { ...required, ...optional };
}

function offerPanel(node) {
  const isTrainer = TRAINERS.has(node.comfyClass);
  const hasTrainer = isTrainer || [...allNodes(node.subgraph)].some(({ comfyClass }) => TRAINERS.has(comfyClass));
  if (hasTrainer && !panels.has(node)) addPanel(node);
}

function addPanel(node) {
  const panel = new Panel(routes);
  addElement(node, "graft_panel", "graft.panel", panel.element, HEIGHT);
  if (node.subgraph) {
    leaveOut(node);
    dropQuarantine(node.properties);
  }
  // The panel shows the sample pictures: ComfyUI's own preview would make the node longer (see graft.css too).
  node.onDrawBackground = () => {};
  node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]);
  panels.set(node, panel);
}

// Remove the panel from the subgraph node's saved list of inner widgets, to which it does not belong.
function leaveOut(node) {
  const { onSerialize } = node;
  node.onSerialize = function (data) {
    onSerialize?.call(this, data);
    const shown = data.properties?.proxyWidgets;
    if (Array.isArray(shown)) data.properties.proxyWidgets = shown.filter(([, name]) => name !== "graft_panel");
  };
}

// Return the names of the inputs that a new node of the pack has, in order; none if a saved node has the same ones.
function inputNames(type, saved) {
  const declared = type.startsWith("Graft") && LiteGraph.registered_node_types[type]?.nodeData?.input;
  const names = Object.keys({ ...declared?.required, ...declared?.optional });
  if (names.every((name) => saved.some((input) => input.name === name))) return [];
  isProbing = true;
  try {
    return LiteGraph.createNode(type).inputs.map(({ name }) => name);
  } finally {
    isProbing = false;
  }
}

app.registerExtension({
  name: "Graft",
  commands,
  menuCommands: [{ path: ["Graft"], commands: commands.map(({ id }) => id) }],
  async setup() {
    addStyle();
    for (const event of ["pointerdown", "click"]) document.addEventListener(event, rehome, true);
    await loadTexts(api, app);
    addHistory();
    api.addEventListener(EVENT, ({ detail }) => store.take(detail));
    // Cached nodes send no training messages, so read the graph here.
    api.addEventListener("execution_cached", read);
    api.addEventListener("status", () => {
      readQueue();
      if (store.waiting.length) refresh();
    });
    api.addEventListener("reconnected", () => restore());
    fields = new UnsetFields((id) => app.canvas?.graph?.getNodeById(id));
    api.addEventListener("graphChanged", () => {
      forgetChanged(app.canvas?.graph?.nodes ?? []);
      fields.refresh();
      read();
    });
    restore();
  },
  nodeCreated(node) {
    if (isProbing) return;
    showUnset(node);
    if (TRAINERS.has(node.comfyClass)) addPanel(node);
    if (node.comfyClass === INSPECTOR) addReport(node);
    if (node.comfyClass === APPLIER) addRemarks(node);
    if (node.comfyClass === LOADER) datasets.prepare(node);
  },
  beforeConfigureGraph(workflow) {
    keepEdits(workflow, TRAINERS);
    keepLinks(workflow, inputNames);
  },
  afterConfigureGraph() {
    prompt = {};
    opened += 1;
    read();
  },
});
