// Recipes as rows of text, and the differences among them.
import { formatRate } from "../panel/words.js";
import { t } from "../texts.js";

// Settings that only decide the names of a run's files.
const PASSED_OVER = new Set(["recipe.name", "recipe.on_existing"]);

// Return {name: text} of everything that made a run, nested names joined by points: objective.loss.
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
  // The first digits suffice to tell digests apart.
  if (typeof value === "string" && /^[0-9a-f]{40,}$/.test(value)) return value.slice(0, 8);
  return value === null || value === undefined ? "" : String(value);
}

// Return [name, texts by run, whether they differ] of every setting, sorted by name.
export function compare(runs) {
  const rows = runs.map(flatten);
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))].sort();
  return names.map((name) => {
    const values = rows.map((row) => row[name] ?? "");
    return [name, values, values.some((value) => value !== values[0])];
  });
}

// Return the main settings of a run in one line: LoRA, SD1, rank 16, 1e-4.
export function shortly({ recipe }) {
  const rate = recipe.learning_rate || recipe.embedding_learning_rate;
  const parts = [recipe.method, recipe.family, recipe.rank ? `${t("rank")} ${recipe.rank}` : "", rate ? formatRate(rate) : ""];
  return parts.filter(Boolean).join(", ");
}
