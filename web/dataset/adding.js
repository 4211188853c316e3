// Pictures and captions that are dropped on a node or chosen, and their upload.

import { button, make, mark, openDialog, say } from "../panel/make.js";
import { t } from "../texts.js";

const PICTURE = /\.(png|apng|jpe?g|jfif|mpo|webp|bmp|gif|avif|tiff?|hei[cf]|jxl|mp4|m4v|mov|mkv|webm|avi)$/i;
const CAPTION = /\.(txt|caption)$/i;
const TABLE = /\.(json|jsonl|csv)$/i;

export function hasFiles({ dataTransfer }) {
  return Boolean(dataTransfer?.types.includes("Files"));
}

// Call a function with the data of each drop of files on an element.
export function takeDrops(element, take) {
  element.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  element.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    take(event.dataTransfer);
  });
}

// Collect the files of a drop, or of a file field, those inside folders included; a promise of [{file, path}]. A drop's
// entries must be taken during its event, so call this at once.
export function collectFiles(given) {
  if (!given.items) {
    return Promise.resolve([...given].map((file) => ({ file, path: file.webkitRelativePath || file.name })));
  }
  const items = [...given.items].filter(({ kind }) => kind === "file");
  const entries = items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  return Promise.all(entries.map(readEntry)).then((lists) => lists.flat());
}

async function readEntry(entry) {
  if (entry instanceof File) return [{ file: entry, path: entry.name }];
  if (entry.isFile) {
    const file = await new Promise((take, fail) => entry.file(take, fail));
    return [{ file, path: entry.fullPath.replace(/^\//, "") }];
  }
  const inside = await readFolder(entry.createReader());
  return (await Promise.all(inside.map(readEntry))).flat();
}

async function readFolder(reader) {
  const entries = [];
  for (;;) {
    // A reader gives a hundred entries at a time.
    const batch = await new Promise((take, fail) => reader.readEntries(take, fail));
    if (!batch.length) return entries;
    entries.push(...batch);
  }
}

// Sort files into {pictures, captions, tables, others}: [{file, path}], each path relative to the dropped folder, whose
// name is `folder`; "" if no folder was dropped alone.
export function sortFiles(files) {
  const isHidden = ({ path }) => path.split("/").some((part) => part.startsWith("."));
  const all = files.filter((row) => !isHidden(row)).sort((a, b) => (a.path < b.path ? -1 : 1));
  const roots = new Set(all.map(({ path }) => (path.includes("/") ? path.slice(0, path.indexOf("/")) : "")));
  const [root] = roots;
  const folder = roots.size === 1 && root ? root : "";
  const rows = folder ? all.map(({ file, path }) => ({ file, path: path.slice(folder.length + 1) })) : all;
  const take = (pattern) => rows.filter(({ path }) => pattern.test(path));
  const isKnown = ({ path }) => [PICTURE, CAPTION, TABLE].some((pattern) => pattern.test(path));
  return {
    folder,
    pictures: take(PICTURE),
    captions: take(CAPTION),
    tables: take(TABLE),
    others: rows.filter((row) => !isKnown(row)),
  };
}

export function stemOf(path) {
  return path.replace(/\.[^./]*$/, "");
}

// Return the text of a caption file: UTF-8, or UTF-16 with a byte order mark.
export async function readText(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const mark = (bytes[0] << 8) | bytes[1];
  const encoding = { 0xfffe: "utf-16le", 0xfeff: "utf-16be" }[mark] ?? "utf-8";
  return new TextDecoder(encoding, { fatal: true }).decode(bytes);
}

const AT_ONCE = 3;
const MOST_CAPTIONS = 100; // captions in one request

// Upload sorted files into a folder. progress: called with (done, total). Return {added: number of new
// pictures, problems: lines about files that were not taken}.
export async function uploadAll(routes, folder, { pictures, captions, tables, others }, progress) {
  const rows = [...pictures, ...tables];
  const problems = others.map(({ path }) => `${path}: ${t("neither a picture nor a caption")}`);
  const names = new Map(); // path -> name in the folder
  const total = rows.length + captions.length;
  let done = 0;
  progress(done, total);
  const before = await listPictures(routes, folder);
  await forEach(rows, AT_ONCE, async ({ file, path }) => {
    try {
      const inside = path.includes("/") ? path.slice(0, path.lastIndexOf("/") + 1) : "";
      const name = await routes.upload(file, `${folder}/${inside}`.replace(/\/$/, ""));
      names.set(path, inside + name);
    } catch (error) {
      problems.push(`${path}: ${error.message}`);
    }
    progress((done += 1), total);
  });
  if (!names.size && !captions.length) return { added: 0, problems };
  const existed = ({ path }) => before.has(names.get(path));
  const taken = rows.filter(({ path }) => names.has(path));
  // Of two equal files, the first one stays.
  const uploaded = taken.filter((row) => !existed(row)).map(({ path }) => names.get(path));
  const answer = await routes.added(folder, uploaded);
  // ComfyUI writes no file that is there already, and gives its name.
  for (const { path } of taken.filter(existed)) {
    problems.push(t("$name: skipped, a copy of $other", { name: path, other: names.get(path) }));
  }
  problems.push(...answer.duplicates.map(({ name, of }) => t("$name: skipped, a copy of $other", { name, other: of })));
  problems.push(...answer.unreadable.map(({ name, reason }) => `${name}: ${reason}`));
  const kept = new Set(answer.kept);
  const added = pictures.filter(({ path }) => kept.has(names.get(path)));
  const present = [...added, ...pictures.filter(existed)];
  const known = new Map(present.map(({ path }) => [stemOf(path), names.get(path)]));
  await saveCaptions(routes, folder, captions, known, problems, (count) => progress((done += count), total));
  return { added: added.length, problems };
}

async function listPictures(routes, folder) {
  const { uploads } = await routes.listFolders();
  if (!uploads.includes(folder)) return new Set();
  const { pictures, left_out: leftOut } = await routes.readDataset(folder, {});
  return new Set([...pictures, ...leftOut].map(({ name }) => name));
}

// Save caption files as the captions of the pictures with their names. A caption that a picture has is not overwritten.
async function saveCaptions(routes, folder, captions, known, problems, progress) {
  if (!captions.length) return;
  const { pictures } = await routes.readDataset(folder, {});
  const held = new Map(pictures.map((picture) => [picture.name, picture]));
  const edits = [];
  for (const { file, path } of captions) {
    // 01.txt or 01.jpg.txt for 01.jpg; a caption without a new picture is for one that is there.
    const stem = stemOf(path);
    const isOf = ({ name }) => stemOf(name) === stem || name === stem;
    const picture = held.get(known.get(stem) ?? known.get(stemOf(stem))) ?? pictures.find(isOf);
    try {
      if (!picture) throw new Error(t("no picture of this name"));
      const was = picture.origin === "file" ? "" : picture.caption;
      edits.push({ name: picture.name, text: await readText(file), was });
    } catch (error) {
      problems.push(`${path}: ${error.message}`);
    }
  }
  progress(captions.length - edits.length);
  for (let place = 0; place < edits.length; place += MOST_CAPTIONS) {
    const batch = edits.slice(place, place + MOST_CAPTIONS);
    const { results } = await routes.saveCaptions(folder, batch);
    const sent = new Map(batch.map(({ name, text }) => [name, text]));
    for (const { name, status, text, error } of results) {
      const isOther = status === "conflict" && text !== sent.get(name);
      if (isOther) problems.push(t("$name: has a caption already, which was kept", { name }));
      if (status === "failed") problems.push(`${name}: ${error}`);
    }
    progress(batch.length);
  }
}

async function forEach(list, atOnce, work) {
  const rest = list.values();
  const run = async () => {
    for (const item of rest) await work(item);
  };
  await Promise.all(Array.from({ length: atOnce }, run));
}

const ACCEPT = "image/*,.heic,.heif,.avif,.txt,.caption,.json,.jsonl,.csv";
// Names that every file system takes, with folders inside folders.
const PART = "[^\\\\/:*?\"<>|.\\s][^\\\\/:*?\"<>|]*";
const NAME = new RegExp(`^${PART}(/${PART})*$`);

// Open the dialog. folder: the node's folder, "" without one; files: a promise of files; done: called with the folder
// after an upload.
export function openAdding({ routes, folder, files }, done) {
  new Adding(routes, folder, done).take(files);
}

class Adding {
  constructor(routes, folder, done) {
    this._routes = routes;
    this._done = done;
    this._files = [];
    this._sorted = sortFiles([]);
    this._isBusy = false;
    this._isNamed = false;
    this._build(folder);
    openDialog(this.dialog, true);
  }

  async take(files) {
    try {
      this._files.push(...(await files));
    } catch (error) {
      this._fail(error);
      return;
    }
    this._sorted = sortFiles(this._files);
    // A dropped folder is a dataset of its own; loose files go to the node's.
    if (!this._isNamed && this._sorted.folder) this._name.value = this._sorted.folder;
    this._update();
  }

  _build(folder) {
    this._name = make("input", { type: "text", maxlength: 200 });
    this._name.value = folder;
    this._name.addEventListener("input", () => {
      this._isNamed = true;
      this._update();
    });
    const choose = (label, attributes) => {
      const field = make("input", { type: "file", multiple: "", hidden: "", "aria-label": label, ...attributes });
      field.addEventListener("change", () => this.take(collectFiles(field.files)));
      return [button(label, () => field.click()), field];
    };
    this._count = make("p", { role: "status" });
    this._progress = make("progress", { "aria-label": t("Progress"), hidden: "" });
    this._problems = make("ul", { class: "graft-problems", "aria-label": t("Not saved"), tabindex: 0 });
    this._start = button(t("Upload"), () => this._upload());
    this._start.classList.add("graft-chief");
    this._close = button(t("Cancel"), () => this.dialog.close());
    const title = t("Add pictures");
    const hint = t("Drop pictures, captions or a folder here, or choose them. A new name makes a new dataset.");
    this._form = make(
      "div",
      { class: "graft-add-form" },
      make("p", { class: "graft-quiet" }, hint),
      make(
        "div",
        { class: "graft-buttons" },
        ...choose(t("Choose files"), { accept: ACCEPT }),
        ...choose(t("Choose a folder"), { webkitdirectory: "" }),
      ),
      make("label", {}, t("Dataset"), this._name),
    );
    this.dialog = make(
      "dialog",
      { class: "graft-comparison graft-notes graft-add", "aria-label": title },
      make("h2", {}, title),
      this._form,
      this._count,
      this._progress,
      this._problems,
      make("div", { class: "graft-buttons" }, this._start, this._close),
    );
    this._listen();
    this._update();
  }

  _listen() {
    this.dialog.addEventListener("cancel", (event) => this._isBusy && event.preventDefault());
    takeDrops(this.dialog, (dropped) => !this._isBusy && this.take(collectFiles(dropped)));
  }

  _update() {
    const { pictures, captions, others } = this._sorted;
    const counts = { pictures: pictures.length, captions: captions.length, others: others.length };
    const name = this._name.value.trim();
    const isWrong = name !== "" && !NAME.test(name);
    const summary = this._files.length ? t("$pictures pictures, $captions captions, $others other files", counts) : "";
    say(this._count, isWrong ? t("A folder cannot have this name.") : summary);
    mark(this._name, "aria-invalid", isWrong);
    this._start.disabled = !name || isWrong || !(pictures.length || captions.length);
  }

  async _upload() {
    const folder = this._name.value.trim();
    this._isBusy = true;
    for (const part of [this._form, this._start]) part.hidden = true;
    this._progress.hidden = false;
    this._close.disabled = true;
    const show = (done, total) => {
      mark(this._progress, "max", Math.max(1, total));
      mark(this._progress, "value", done);
      say(this._count, `${done} / ${total}`);
    };
    try {
      const { added, problems } = await uploadAll(this._routes, folder, this._sorted, show);
      say(this._count, t("$count pictures added", { count: added }));
      this._problems.replaceChildren(...problems.map((line) => make("li", {}, line)));
      await this._done(folder);
      if (!problems.length) this.dialog.close();
    } catch (error) {
      this._fail(error);
    }
    this._isBusy = false;
    this._progress.hidden = true;
    this._close.disabled = false;
    say(this._close, t("Close"));
    this._close.focus();
  }

  _fail({ message }) {
    say(this._count, `${t("That did not work")}: ${message}`);
  }
}
