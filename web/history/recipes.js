// Recipes as rows of text, and what differs among them.
import { formatRate } from "../panel/words.js";
import { t } from "../texts.js";

// Settings that only say where a run's files are called.
const PASSED_OVER = new Set(["recipe.name", "recipe.on_existing"]);

// {name: text} of everything that a run was made with, nested names with points between: objective.loss.
function flatten(run) {
  const rows = {};
  const add = (name, value) => {
    if (PASSED_OVER.has(name)) return;
    if (value !== null && typeof value === "object" && !Array.isArray(value)) {
      for (const [key, part] of Object.entries(value)) add(name ? `${name}.${key}` : key, part);
    } else {
      rows[name.replace(/^(recipe|made_from)\./, "")] = textOf(value);
    }
  };
  add("recipe", run.recipe);
  add("", run.facts);
  return rows;
}

function textOf(value) {
  if (Array.isArray(value)) return value.map(textOf).join(", ");
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(6)));
  // Digests are told apart by their first digits.
  if (typeof value === "string" && /^[0-9a-f]{40,}$/.test(value)) return value.slice(0, 8);
  return value === null || value === undefined ? "" : String(value);
}

// [name, texts by run, whether they differ] of every setting, by name.
export function compare(runs) {
  const rows = runs.map(flatten);
  const names = [...new Set(rows.flatMap((one) => Object.keys(one)))].sort();
  return names.map((name) => {
    const values = rows.map((one) => one[name] ?? "");
    return [name, values, values.some((value) => value !== values[0])];
  });
}

// What a run trained, in a line: LoRA, SD1, rank 16, 1e-4.
export function shortly({ recipe }) {
  const rate = recipe.learning_rate || recipe.embedding_learning_rate;
  const parts = [recipe.method, recipe.family, recipe.rank ? `${t("rank")} ${recipe.rank}` : "", rate ? formatRate(rate) : ""];
  return parts.filter(Boolean).join(", ");
}
