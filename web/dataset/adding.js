// Dialog that adds pictures to a dataset: choose files or a folder, name the dataset's folder, follow the upload.
import { button, make, mark, openDialog, say } from "../panel/make.js";
import { t } from "../texts.js";
import { collectFiles, sortFiles, takeDrops } from "./files.js";
import { uploadAll } from "./upload.js";

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
