// Files that the user drops or chooses for a dataset, sorted by what they are.

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
