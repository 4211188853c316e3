// Sidebar tab with the history of runs on disk: search by name or note, select and compare, rename, use, open, delete.
import { button, keepKeys, make, openDialog, say } from "../panel/make.js";
import { describeQueue, formatBytes, formatTime, nameOf } from "../panel/words.js";
import { t } from "../texts.js";
import { Card, iconButton } from "./card.js";
import { openComparison } from "./comparison.js";

// Add ComfyUI's own loader with a LoRA chosen, in the middle of the visible area.
function addLoader(app, name) {
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
function openNotes(run, save) {
  const title = make("input", { type: "text", maxlength: TITLE_LIMIT, placeholder: run.name });
  const note = make("textarea", { maxlength: NOTE_LIMIT, rows: 5 });
  [title.value, note.value] = [run.title, run.note];
  const keep = make("button", { type: "submit", class: "graft-chief" }, t("Save"));
  const cancel = button(t("Cancel"), () => dialog.close());
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

// The trainings of ComfyUI's queue in order, above the runs: what runs, what waits, and the time left.
export class Queue {
  // acts: {remove, move}: remove a waiting prompt; move it before another one, or behind all others with null.
  constructor(acts) {
    this._acts = acts;
    this._shown = "";
    this._title = make("h3");
    this._list = make("ol", { "aria-label": t("Queue") });
    this.element = make("div", { class: "graft-queue" }, this._title, this._list);
    this.element.hidden = true;
  }

  // Show the prompts of the queue, in order: [{prompt_id, running, trainings}].
  show(prompts) {
    const rows = rowsOf(prompts);
    const trainings = prompts.flatMap((prompt) => prompt.trainings);
    // A new list loses the focus, so make one only if other rows are shown.
    const shown = JSON.stringify(rows.map(({ prompts, name, training, running }) => [prompts, name, training?.node, running]));
    if (shown !== this._shown) {
      this._shown = shown;
      const { ariaLabel: focused } = this._list.contains(document.activeElement) ? document.activeElement : {};
      this._list.replaceChildren(...rows.map((row, place) => this._makeRow(row, place, rows)));
      // The button of a moved training keeps the focus.
      [...this._list.querySelectorAll("button")].find(({ ariaLabel }) => ariaLabel === focused)?.focus();
    }
    this.element.hidden = !trainings.length;
    say(this._title, describeQueue(trainings));
    const states = this._list.querySelectorAll(".graft-quiet");
    rows.forEach((row, place) => say(states[place], stateOf(row)));
  }

  _makeRow({ prompts, name, training, running, isFirst }, place, rows) {
    const state = make("div", { class: "graft-quiet" });
    if (!training) return make("li", {}, state);
    const [prompt] = prompts;
    const buttons = [];
    if (!running && isFirst) {
      const add = (icon, label, act) => buttons.push(iconButton(icon, `${label}: ${name}`, act));
      const before = rows.findLast((row, other) => other < place && !row.running && !row.prompts.includes(prompt));
      if (before) add("pi-arrow-up", t("Move up"), () => this._acts.move(prompt, before.prompts[0]));
      const later = rows.filter((row, other) => other > place && !row.prompts.includes(prompt));
      const behind = later.find((row) => row.prompts[0] !== later[0].prompts[0]);
      if (later.length) add("pi-arrow-down", t("Move down"), () => this._acts.move(prompt, behind?.prompts[0] ?? null));
      add("pi-times", t("Remove from queue"), () => this._acts.remove(prompt));
    }
    return make("li", {}, make("div", { class: "graft-body" }, make("div", {}, name), state), ...buttons);
  }
}

// Return a row for each training, and one for each series of other prompts, with the prompts in it.
function rowsOf(queued) {
  const rows = [];
  for (const { prompt_id: prompt, running, trainings, starts } of queued) {
    trainings.forEach((training, place) => {
      rows.push({ prompts: [prompt], training, running, starts, name: nameOf(training), isFirst: place === 0 });
    });
    if (trainings.length) continue;
    const last = rows.at(-1);
    if (last && !last.training && last.running === running) last.prompts.push(prompt);
    else rows.push({ prompts: [prompt], running });
  }
  return rows;
}

function stateOf({ prompts, training, running, starts }) {
  const { length: count } = prompts;
  if (!training) return running ? t("Other prompts, running now: $count", { count }) : t("Other prompts: $count", { count });
  const { step, steps, seconds_left: left, gave_way: gaveWay } = training;
  const waiting = starts ? t("Waiting until $time", { time: starts }) : gaveWay ? t("Waiting for other prompts") : t("Waiting");
  const state = running ? t("Training") : waiting;
  const parts = [state];
  if (steps) parts.push(t("$step of $steps steps", { step, steps }));
  if (Number.isFinite(left)) parts.push(t("$time left", { time: formatTime(left) }));
  return parts.join(", ");
}

const PAGE = 50;
const PAUSE = 300; // milliseconds from the last key to the search

export class History {
  constructor(routes, app, toasts, openDataset) {
    this._routes = routes;
    this._app = app;
    this._openDataset = openDataset;
    this._toasts = toasts;
    this._cards = new Map();
    this._chosen = new Map(); // name -> run; kept during a search for other names
    this._asked = 0;
    this._isBusy = false;
    this._build();
  }

  // Attach the tab to an element of ComfyUI's, which may ask more than once.
  render(element) {
    if (this.element.parentElement === element) return;
    element.classList.add("graft-tab");
    element.replaceChildren(this.element);
    this.refresh();
  }

  get isSeen() {
    return this.element.isConnected;
  }

  async refresh() {
    await this._read(0, Math.max(PAGE, this._cards.size));
  }

  showQueue(prompts) {
    this._queue.show(prompts);
  }

  progress({ run, step, steps, isLive }) {
    if (isLive && this.isSeen) this._cards.get(run)?.progress(step, steps);
  }

  misses(name) {
    return this.isSeen && !this._search.value && !this._cards.has(name);
  }

  _build() {
    const dataset = iconButton("pi-images", t("Open dataset"), () => this._openDataset());
    const refresh = iconButton("pi-refresh", t("Refresh"), () => this.refresh());
    this._search = make("input", { type: "search", "aria-label": t("Filter by name or note") });
    this._search.placeholder = t("Filter by name or note");
    this._search.addEventListener("input", () => {
      clearTimeout(this._waiting);
      this._waiting = setTimeout(() => this._read(0, PAGE), PAUSE);
    });
    this._queue = new Queue({
      remove: (prompt) => this._try(() => this._routes.removePrompt(prompt)),
      move: (prompt, before) => this._try(() => this._routes.movePrompt(prompt, before)),
    });
    this._note = make("div", { class: "graft-empty", role: "status" });
    this._list = make("ul", { class: "graft-cards", "aria-label": t("Training runs") });
    this._more = button(t("Show more"), () => this._read(this._cards.size, PAGE));
    this._compare = button("", () => this._show([...this._chosen.values()]));
    this._compare.classList.add("graft-chief");
    this._clear = iconButton("pi-times", t("Clear the selection"), () => this._chooseNone());
    this._foot = make("div", { class: "graft-foot" }, this._compare, this._clear);
    this.element = make(
      "section",
      { class: "graft-history", "aria-label": t("Graft runs") },
      make("header", {}, make("h2", {}, t("Training runs")), dataset, refresh),
      this._queue.element,
      make("div", { class: "graft-search" }, this._search),
      this._note,
      this._list,
      this._more,
      this._foot,
    );
    keepKeys(this.element);
    this._more.hidden = true;
    this._showFoot();
  }

  async _read(from, count) {
    const request = (this._asked += 1);
    const searched = this._search.value.trim();
    try {
      const { runs, total } = await this._routes.listHistory(searched, from, count);
      // A later search replaces this answer.
      if (request !== this._asked) return;
      if (from === 0) this._dropAllBut(new Set(runs.map(({ name }) => name)));
      runs.forEach((run, place) => this._place(run, from + place));
      this._more.hidden = this._cards.size >= total;
      const nothing = searched ? t("No run has this in its name or note.") : t("No runs yet. Your trainings appear here.");
      this._say(this._cards.size ? "" : nothing);
    } catch (error) {
      if (request === this._asked) this._say(t("Cannot read the runs: $problem", { problem: error.message }));
    }
    this._showFoot();
  }

  _say(note) {
    say(this._note, note);
    this._note.hidden = !note;
  }

  _dropAllBut(names) {
    for (const [name, card] of this._cards) {
      if (names.has(name)) continue;
      card.element.remove();
      this._cards.delete(name);
    }
  }

  _place(run, place) {
    let card = this._cards.get(run.name);
    if (card) {
      card.update(run);
    } else {
      card = new Card(run, {
        imageUrl: (picture, version) => this._routes.imageUrl(picture, version),
        choose: (name, isChosen) => this._choose(name, isChosen),
        show: (name) => this._show([this._cards.get(name).run]),
        use: (current) => this._use(current, current.saves.at(-1)),
        edit: (current) => this._edit(current),
        open: (name) => this._open(name),
        resume: (name) => this._try(() => this._routes.resume({ run: name })),
        remove: (current) => this._remove(current),
      });
      this._cards.set(run.name, card);
    }
    if (this._chosen.has(run.name)) this._chosen.set(run.name, run);
    card.box.checked = this._chosen.has(run.name);
    // Move a card only if its place changed: a moved element loses the focus.
    const there = this._list.children[place];
    if (there !== card.element) this._list.insertBefore(card.element, there ?? null);
  }

  _choose(name, isChosen) {
    if (isChosen) this._chosen.set(name, this._cards.get(name).run);
    else this._chosen.delete(name);
    this._showFoot();
  }

  _chooseNone() {
    this._chosen.clear();
    for (const card of this._cards.values()) card.box.checked = false;
    this._showFoot();
    this._search.focus();
  }

  _showFoot() {
    const count = this._chosen.size;
    this._foot.hidden = !count;
    this._compare.disabled = count < 2;
    say(this._compare, count < 2 ? t("Choose another run to compare") : t("Compare $count runs", { count }));
  }

  async _show(runs) {
    await this._try(async () => {
      const details = await Promise.all(runs.map(({ name }) => this._routes.readRun(name, 1)));
      openComparison(
        runs.map((run, place) => ({ ...run, samples: details[place].samples, saves: details[place].saves })),
        {
          imageUrl: (sample, version) => this._routes.imageUrl(sample, version),
          open: (name) => this._open(name),
          use: (run, step) => this._use(run, step),
        },
      );
    });
  }

  async _open(name) {
    await this._try(async () => {
      const { workflow, prompt } = await this._routes.readWorkflow(name);
      if (workflow) await this._app.loadGraphData(workflow, true, true, name);
      else await this._app.loadApiJson(prompt, name);
    });
  }

  // Copy a save to where loaders list it, and add a loader for it to the graph.
  async _use(run, step) {
    await this._try(async () => {
      const { adapter, embedding } = await this._routes.pickSave(run.name, step);
      await this._app.refreshComboInNodes();
      if (adapter) {
        addLoader(this._app, adapter);
        this._toasts.show("success", t("Loader added"), adapter);
      }
      if (embedding) {
        const word = `embedding:${embedding.replace(/\.[^.]+$/, "")}`;
        this._toasts.show("success", t("Write this in prompts"), word);
      }
    });
  }

  _edit(run) {
    openNotes(run, async (notes) => {
      await this._routes.describeRun(run.name, notes);
      await this.refresh();
    });
  }

  async _remove(run) {
    const { name } = run;
    const size = formatBytes(run.size);
    const sure = await this._app.extensionManager.dialog.confirm({
      title: t("Delete this run?"),
      message: t("This deletes the settings, loss, saved steps and sample pictures of $name ($size).", { name, size }),
      hint: t("Files in output/loras and output/embeddings stay."),
      type: "delete",
    });
    if (!sure) return;
    await this._try(async () => {
      const names = [...this._list.children].map((element) => element.dataset.run);
      const place = names.indexOf(name);
      await this._routes.deleteRun(name);
      this._chosen.delete(name);
      await this.refresh();
      this._toasts.show("success", t("Run deleted"), name);
      // Focus a neighbor, so that keyboard users keep their place.
      (this._cards.get(names[place + 1] ?? names[place - 1]) ?? this._search).focus();
    });
  }

  // Ignore a second press until the first action is done.
  async _try(work) {
    if (this._isBusy) return;
    this._isBusy = true;
    await this._toasts.attempt(work);
    this._isBusy = false;
  }
}
