// Dialogs for captions that could not simply be saved.
import { button, make, openDialog } from "../panel/make.js";
import { t } from "../texts.js";

// Show both texts of a caption, and let the user choose or mix them. decide: called with the text to save.
export function openConflict({ name, text, theirs }, decide) {
  const mine = make("textarea", { rows: 6 });
  const other = make("textarea", { rows: 6, readonly: "" });
  mine.value = text;
  other.value = theirs;
  const before = mine.value; // with the line ends of a text field
  const title = t("Two texts for $name", { name });
  const choose = (choice) => () => {
    dialog.close();
    decide(choice());
  };
  const dialog = make(
    "dialog",
    { class: "graft-comparison graft-notes", "aria-label": title },
    make("h2", {}, title),
    make("label", {}, t("Your text"), mine),
    make("label", {}, t("The text in the file"), other),
    make(
      "div",
      { class: "graft-buttons" },
      button(t("Save your text"), choose(() => mine.value)),
      button(t("Keep the file's text"), choose(() => theirs)),
      button(t("Close"), () => leave()),
    ),
  );
  const leave = askToLeave(dialog, () => mine.value !== before);
  openDialog(dialog, true);
}

// Ask before a dialog with unsaved work is closed by Escape. Return a function that closes it in the same way.
export function askToLeave(dialog, isUnsaved) {
  const close = () => dialog.close();
  const leave = () => (isUnsaved() ? openUnsaved(t("Not saved"), close) : close());
  const leaveInstead = (event) => {
    event.preventDefault();
    leave();
  };
  // A file chooser inside the dialog sends this event too.
  dialog.addEventListener("cancel", (event) => event.target === dialog && leaveInstead(event));
  // The browser itself would close the dialog at the second press.
  dialog.addEventListener("keydown", (event) => event.key === "Escape" && leaveInstead(event));
  return leave;
}

// Ask before unsaved work is given up. close: called if the user wants that.
export function openUnsaved(title, close) {
  const dialog = make(
    "dialog",
    { class: "graft-comparison graft-notes", "aria-label": title },
    make("h2", {}, title),
    make(
      "div",
      { class: "graft-buttons" },
      button(t("Cancel"), () => dialog.close()),
      button(t("Close without saving"), () => {
        dialog.close();
        close();
      }),
    ),
  );
  openDialog(dialog);
}
