// Dialog that changes the captions of many pictures, with a preview of every change.
import { button, make, openDialog, say } from "../panel/make.js";
import { t, text } from "../texts.js";
import { askToLeave } from "./conflict.js";
import * as tags from "./tags.js";

const MOST_SHOWN = 50;
const MOST_TAGS = 500;

// [name, fields, change: (caption, field values, trigger) => caption]
const CHANGES = [
  [text("Add a tag at the end"), ["tag"], (caption, { tag }) => tags.addTag(caption, tag)],
  [text("Add a tag in front"), ["tag"], (caption, { tag }) => tags.addTag(caption, tag, true)],
  [text("Remove a tag"), ["tag"], (caption, { tag }) => tags.removeTag(caption, tag)],
  [text("Replace a tag"), ["tag", "other"], (caption, { tag, other }) => tags.replaceTag(caption, tag, other)],
  [text("Move a tag to the front"), ["tag"], (caption, { tag }) => tags.moveToFront(caption, tag)],
  [text("Find and replace"), ["find", "by", "exact"], (caption, row) => tags.replaceText(caption, row)],
  [text("Put the trigger in front"), [], (caption, _, trigger) => tags.addTrigger(caption, trigger)],
  [text("Sort the tags"), [], (caption, _, trigger) => tags.sortTags(caption, trigger)],
];

// Name of each field; those of tags are trimmed.
const FIELDS = {
  tag: text("Tag"),
  other: text("Replace with"),
  find: text("Find"),
  by: text("Replace with"),
};

// Open the dialog for the selected pictures, or else for all that are shown.
export function openBulkEdit({ dataset, actions, trigger, isByLine }) {
  const pictures = dataset.chosen;
  const kind = make("select", {}, ...CHANGES.map(([name], place) => make("option", { value: place }, t(name))));
  const known = dataset.countTags().slice(0, MOST_TAGS).map(([tag]) => make("option", { value: tag }));
  const choices = make("datalist", { id: "graft-known-tags" }, ...known);
  const makeField = () => make("input", { type: "text", maxlength: 10000 });
  const fields = Object.fromEntries(Object.keys(FIELDS).map((name) => [name, makeField()]));
  for (const name of ["tag", "other"]) fields[name].setAttribute("list", choices.id);
  [fields.tag.value] = [...dataset.filter.tags, ""];
  const exact = make("input", { type: "checkbox" });
  const labels = Object.entries(fields).map(([name, field]) => [name, make("label", {}, t(FIELDS[name]), field)]);
  labels.push(["exact", make("label", { class: "graft-check" }, exact, t("Match upper and lower case"))]);
  const count = make("p", { role: "status" });
  const list = make("div", { class: "graft-changes", tabindex: 0, "aria-label": t("Edit captions"), role: "region" });
  const apply = button(t("Save"), () => {
    const [rows, name] = [list.rows, t(CHANGES[kind.value][0])];
    dialog.close();
    actions.setCaptions(rows, name);
  });
  apply.classList.add("graft-chief");

  const preview = () => {
    const [, wanted, change] = CHANGES[kind.value];
    for (const [name, label] of labels) label.hidden = !wanted.includes(name);
    const values = { tag: fields.tag.value.trim(), other: fields.other.value.trim(), find: fields.find.value };
    Object.assign(values, { by: fields.by.value, exact: exact.checked });
    const changeOne = (caption) => change(caption, values, trigger);
    const edit = isByLine ? tags.byLine(changeOne) : changeOne;
    const rows = pictures.map((picture) => [picture, edit(picture.text)]);
    list.rows = rows.filter(([picture, now]) => picture.text !== now);
    say(count, t("Changes $count of $total captions.", { count: list.rows.length, total: pictures.length }));
    apply.disabled = !list.rows.length;
    list.replaceChildren(...list.rows.slice(0, MOST_SHOWN).map(showChange));
  };
  for (const field of [kind, exact, ...Object.values(fields)]) field.addEventListener("input", preview);
  const title = t("Edit captions");
  const { selected, shown, pictures: all } = dataset;
  const scope = selected.size
    ? t("$count selected", { count: selected.size })
    : t("$shown of $total pictures", { shown: shown.length, total: all.size });
  const dialog = make(
    "dialog",
    { class: "graft-comparison graft-notes graft-bulk", "aria-label": title },
    make("h2", {}, title),
    make("p", { class: "graft-quiet" }, scope),
    make("label", {}, t("Change"), kind),
    ...labels.map(([, label]) => label),
    choices,
    count,
    list,
    make("div", { class: "graft-buttons" }, apply, button(t("Cancel"), () => dialog.close())),
  );
  preview();
  const read = () => Object.values(fields).map(({ value }) => value).join("\n");
  const before = read();
  askToLeave(dialog, () => read() !== before);
  openDialog(dialog, true);
}

// Return a caption before and after; what both begin and end with is not marked.
function showChange([{ name, text: before }, after]) {
  let start = 0;
  while (start < Math.min(before.length, after.length) && before[start] === after[start]) start += 1;
  let end = 0;
  while (end < Math.min(before.length, after.length) - start && before.at(-1 - end) === after.at(-1 - end)) end += 1;
  const show = (tag, caption) => {
    const middle = make(tag, {}, caption.slice(start, caption.length - end));
    return make("p", {}, caption.slice(0, start), middle, caption.slice(caption.length - end));
  };
  const heading = make("span", { class: "graft-quiet" }, name);
  return make("div", { class: "graft-change" }, heading, show("del", before), show("ins", after));
}
