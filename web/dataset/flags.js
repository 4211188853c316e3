// What the inspection says about a picture, as filters with names in the page's language.
import { t, text } from "../texts.js";
import { hasWord } from "./tags.js";

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
