// The pictures of an open dataset in the page, what the inspection says about them, and which are shown in which order.
import { t, text } from "../texts.js";
import { hasWord, splitTags } from "./tags.js";

// [pattern of the server's flag, with the value that belongs to it, name of the filter]
const FLAGS = [
  [/^no caption$/, text("No caption")],
  [/^trigger missing$/, text("Trigger missing")],
  [/^(\d+) tokens$/, text("Long caption")],
  [/^like (.*)$/s, text("Near-duplicate")],
  [/^loses (.*)$/, text("Much cropped")],
  [/^small$/, text("Small")],
  [/^enlarged$/, text("Enlarged")],
  [/^short clip$/, text("Short clip")],
  [/^hardest$/, text("Hardest")],
  [/^memorized$/, text("Memorized")],
];

// Filters by the picture's own state: [name, test]
const STATES = [
  [text("Cannot be read"), ({ problem }) => Boolean(problem)],
  [text("Excluded"), ({ excluded }) => excluded],
  [text("Held out"), ({ held_out: isHeldOut }) => isHeldOut],
  [text("With a mask"), ({ mask }) => mask],
  [text("Not saved"), ({ state }) => state === "conflict" || state === "failed"],
];

export function describeFlag(flag) {
  for (const [pattern, name] of FLAGS) {
    const match = pattern.exec(flag);
    if (match) return [t(name), match[1]].filter(Boolean).join(": ");
  }
  return flag;
}

function filterOf(flag) {
  return FLAGS.find(([pattern]) => pattern.test(flag))?.[1] ?? flag;
}

export function describeStates(picture) {
  return STATES.slice(1, -1)
    .filter(([, test]) => test(picture))
    .map(([name]) => t(name));
}

// Return the English names of all filters that a picture passes.
export function filtersOf(picture) {
  const states = STATES.filter(([, test]) => test(picture)).map(([name]) => name);
  return [...new Set([...picture.flags.map(filterOf), ...states])];
}

// Return a picture's flags after an edit of its caption, as far as the page can tell.
export function flagsAfterEdit({ flags, text: caption }, trigger) {
  const others = flags.filter((flag) => !["No caption", "Trigger missing", "Long caption"].includes(filterOf(flag)));
  // The trigger alone is a caption.
  if (!caption.trim()) return trigger ? others : ["no caption", ...others];
  const isMissing = trigger && !hasWord(caption, trigger) && !caption.includes("[trigger]");
  return isMissing ? ["trigger missing", ...others] : others;
}

const compareNames = new Intl.Collator(undefined, { numeric: true }).compare;

// How pictures are compared, by the name of the order.
const ORDERS = {
  name: (a, b) => compareNames(a.name, b.name),
  size: (a, b) => areaOf(a) - areaOf(b),
  flags: (a, b) => b.flags.length - a.flags.length,
  tags: (a, b) => tagsOf(a).length - tagsOf(b).length,
  loss: (a, b) => lossOf(b) - lossOf(a),
};

const known = new WeakMap(); // picture -> [caption, its tags]: most captions stay as they are

function tagsOf(picture) {
  const { text } = picture;
  if (known.get(picture)?.[0] !== text) known.set(picture, [text, splitTags(text)]);
  return known.get(picture)[1];
}

function areaOf({ size }) {
  return size ? size[0] * size[1] : 0;
}

// Pictures that the run did not train on come last.
function lossOf({ loss }) {
  return loss ?? -1;
}

export class Dataset {
  constructor(folder) {
    this.folder = folder;
    this.pictures = new Map(); // name -> picture
    this.shown = []; // pictures that pass the filter, in order
    this.selected = new Set(); // names
    this.filter = { text: "", flags: new Set(), tags: new Set() };
    this.order = "name";
    this.isReversed = false;
    this.folders = [];
    this.leftOut = [];
    this.edits = 0; // number of captions edited or saved so far
    this._alike = [];
    this._losses = {}; // name of a picture -> [relative loss, mark]
    this.run = ""; // name of the run that they are from
  }

  noteEdit(picture) {
    this.edits += 1;
    picture.edited = this.edits;
  }

  // Take the server's view of the folder. Captions that are not saved yet stay, and those that were edited or saved
  // since the request, when `edits` was `since`.
  take({ pictures, folders, left_out: leftOut }, since) {
    const before = this.pictures;
    const merge = (picture) => [picture.name, mergePicture(before.get(picture.name), picture, since)];
    this.pictures = new Map(pictures.map(merge));
    this.folders = folders;
    this.leftOut = leftOut;
    this.selected = new Set([...this.selected].filter((name) => this.pictures.has(name)));
    this._flagAlike();
    this._flagLosses();
    this.arrange();
  }

  takeLosses({ run, losses }) {
    this.run = run;
    this._losses = losses;
    this._flagLosses();
  }

  _flagLosses() {
    for (const [name, [loss, mark]] of Object.entries(this._losses)) {
      const picture = this.pictures.get(name);
      if (picture) Object.assign(picture, { loss, flags: withFlag(picture.flags, mark) });
    }
  }

  takeAlike({ pairs, broken }) {
    this._alike = pairs;
    for (const { name, reason } of broken) Object.assign(this.pictures.get(name) ?? {}, { problem: reason });
    this._flagAlike();
  }

  _flagAlike() {
    for (const [first, second] of this._alike) {
      const picture = this.pictures.get(second);
      if (picture) picture.flags = withFlag(picture.flags, `like ${first}`);
    }
  }

  // Remove pictures, and return them for `add`.
  remove(names) {
    const removed = names.map((name) => this.pictures.get(name)).filter(Boolean);
    for (const { name } of removed) {
      this.pictures.delete(name);
      this.selected.delete(name);
    }
    this.arrange();
    return removed;
  }

  add(pictures) {
    for (const picture of pictures) this.pictures.set(picture.name, picture);
    this.arrange();
  }

  // Choose and sort the shown pictures anew. Edits do not call this: a picture must not vanish while it is edited.
  arrange() {
    const { text, flags, tags } = this.filter;
    const wanted = text.trim().toLowerCase();
    const isShown = (picture) => {
      if (wanted && !`${picture.name}\n${picture.text}`.toLowerCase().includes(wanted)) return false;
      if (flags.size && !isWithin(flags, filtersOf(picture))) return false;
      return !tags.size || isWithin(tags, tagsOf(picture));
    };
    const compare = (a, b) => ORDERS[this.order](a, b) || ORDERS.name(a, b);
    this.shown = [...this.pictures.values()].filter(isShown).sort(compare);
    if (this.isReversed) this.shown.reverse();
  }

  // Return the pictures that an edit of many applies to: the selected ones, else all shown.
  get chosen() {
    return this.selected.size ? [...this.selected].map((name) => this.pictures.get(name)) : this.shown;
  }

  // Return [name of a filter, number of pictures], the most frequent first.
  countFlags() {
    return countAll([...this.pictures.values()].map(filtersOf));
  }

  // Return [tag, number of captions that contain it], the most frequent first.
  countTags() {
    return countAll([...this.pictures.values()].map((picture) => [...new Set(tagsOf(picture))]));
  }
}

function withFlag(flags, flag) {
  return !flag || flags.includes(flag) ? flags : [...flags, flag];
}

function isWithin(wanted, values) {
  return [...wanted].every((value) => values.includes(value));
}

function countAll(lists) {
  const counts = new Map();
  for (const value of lists.flat()) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].sort(([a, first], [b, second]) => second - first || compareNames(a, b));
}

// A picture of the page: the server's, with
// text: the caption in the page; saved: the one that the server gave last;
// state: "" | "waiting" | "conflict" | "failed"; theirs: the other text of a conflict;
// edited: number of its last edit among all.
function mergePicture(before, picture, since) {
  const fresh = { ...picture, text: picture.caption, saved: picture.caption, state: "", theirs: "", error: "" };
  if (!before?.state && !(before?.edited > since)) return Object.assign(before ?? {}, fresh);
  const { text, saved, origin, file, flags, state, theirs, error } = before;
  return Object.assign(before, fresh, { text, saved, origin, file, flags, state, theirs, error });
}
