// Graft Load Dataset in the graph: buttons, drag and drop, and the pages that they open.
import { allNodes } from "../panel/graph.js";
import { t } from "../texts.js";
import { collectFiles, hasFiles, openAdding } from "./adding.js";
import { DatasetPage } from "./page.js";

export const LOADER = "GraftLoadDataset";

// The node's inputs that decide how a picture is read.
const READ = [
  "trigger",
  "resolution",
  "upscale",
  "lines_are_variants",
  "masks",
  "mask_folder",
  "validation_folder",
  "control_folder",
  "control_folder_2",
  "control_folder_3",
  "sources_optional",
  "worse_folder",
  "frames",
  "frame_rate",
  "clips",
];

export class DatasetNodes {
  constructor({ app, routes, toasts }) {
    this._app = app;
    this._routes = routes;
    this._toasts = toasts;
  }

  // Give a node its buttons, and let it take dropped files.
  prepare(node) {
    addButton(node, t("Open dataset"), () => this.open(node));
    addButton(node, t("Add pictures"), () => this.add(node, []));
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    node.onDragOver = hasFiles;
    // The files can be read during the event only.
    node.onDragDrop = (event) => {
      if (!hasFiles(event)) return false;
      this.add(node, event.dataTransfer);
      return true;
    };
  }

  // Open the page of the selected node, or else of the graph's first one.
  openAny() {
    const all = [...allNodes(this._app.rootGraph ?? this._app.graph)];
    const nodes = all.filter(({ comfyClass }) => comfyClass === LOADER);
    const selected = this._app.canvas.selected_nodes;
    const node = nodes.find((candidate) => selected?.[candidate.id] === candidate) ?? nodes[0];
    if (node) return this.open(node);
    return this._toasts.show("info", t("Add the node Graft Load Dataset to the graph first."));
  }

  // Open the page of a node; without a folder, the dialog that makes one.
  open(node) {
    const folder = valueOf(node, "folder");
    if (!folder) return this.add(node, []);
    const read = (value) => String(typeof value === "boolean" ? Number(value) : (value ?? ""));
    const values = Object.fromEntries(READ.map((name) => [name, read(valueOf(node, name))]));
    const page = new DatasetPage({
      routes: this._routes,
      folder,
      values,
      add: (dropped) => this.add(node, dropped, page),
    });
    return page.open();
  }

  // Open the dialog that adds pictures to a node's folder. dropped: a drop's data, or a list of files.
  async add(node, dropped, page) {
    const files = collectFiles(dropped);
    const folder = valueOf(node, "folder") ?? "";
    await this._toasts.attempt(async () => {
      const { uploads } = await this._routes.listFolders();
      openAdding({ routes: this._routes, folder: uploads.includes(folder) ? folder : "", files }, async (chosen) => {
        if (chosen !== folder) await this._choose(node, chosen);
        else if (page) await page.reread();
      });
    });
  }

  async _choose(node, folder) {
    await this._app.refreshComboInNodes();
    const widget = node.widgets.find(({ name }) => name === "folder");
    widget.value = folder;
    widget.callback?.(folder, this._app.canvas, node);
    node.setDirtyCanvas?.(true, true);
  }
}

function valueOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

// Add a button. Its name is its text, because Nodes 2.0 in older frontends shows the name.
function addButton(node, label, act) {
  const widget = node.addWidget("button", label, null, act, { serialize: false }); // omitted from the prompt
  widget.serialize = false; // and from the workflow
}
