// Captions as comma-separated tags. Each function returns the same text if nothing changes.

export function splitTags(caption) {
  return caption
    .split(/[,\n]/)
    .map((tag) => tag.trim())
    .filter(Boolean);
}

function joinTags(tags) {
  return tags.join(", ");
}

// Report whether a caption contains a word or phrase that stands by itself.
export function hasWord(caption, word) {
  return new RegExp(`(?<![\\p{L}\\p{N}_])${escape(word)}(?![\\p{L}\\p{N}_])`, "iu").test(caption);
}

function escape(text) {
  return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}

export function addTag(caption, tag, isFirst = false) {
  const tags = splitTags(caption);
  if (!tag || tags.includes(tag)) return caption;
  return joinTags(isFirst ? [tag, ...tags] : [...tags, tag]);
}

export function removeTag(caption, tag) {
  const tags = splitTags(caption);
  return tags.includes(tag) ? joinTags(tags.filter((other) => other !== tag)) : caption;
}

export function replaceTag(caption, tag, other) {
  const tags = splitTags(caption);
  if (!tags.includes(tag)) return caption;
  return joinTags([...new Set(tags.map((known) => (known === tag ? other : known)))].filter(Boolean));
}

export function moveToFront(caption, tag) {
  const tags = splitTags(caption);
  if (!tags.includes(tag) || tags[0] === tag) return caption;
  return joinTags([tag, ...tags.filter((other) => other !== tag)]);
}

// Sort the tags; those with the trigger stay in front.
export function sortTags(caption, trigger = "") {
  const tags = splitTags(caption);
  const isFirst = (tag) => Boolean(trigger) && hasWord(tag, trigger);
  const sorted = [...tags].sort((a, b) => isFirst(b) - isFirst(a) || a.localeCompare(b));
  return sorted.every((tag, place) => tag === tags[place]) ? caption : joinTags(sorted);
}

export function addTrigger(caption, trigger) {
  if (!trigger || hasWord(caption, trigger) || caption.includes("[trigger]")) return caption;
  return caption.trim() ? `${trigger}, ${caption}` : trigger;
}

// Replace a text within a caption; exact: with the same upper and lower case.
export function replaceText(caption, { find, by, exact }) {
  if (!find) return caption;
  return caption.replace(new RegExp(escape(find), exact ? "gu" : "giu"), () => by);
}

// Apply a change to each line of a caption file whose lines are separate captions.
export function byLine(change) {
  return (caption) => caption.split("\n").map((line) => (line.trim() ? change(line) : line)).join("\n");
}
