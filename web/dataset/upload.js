// Upload of pictures and their captions into a folder of ComfyUI's input folder, a few at a time.
import { t } from "../texts.js";
import { readText, stemOf } from "./files.js";

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
