"""Make locales/: the pack's texts in each language, in the files that ComfyUI reads.

    python -m docs.build.make_locales            write them; print untranslated texts
    python -m docs.build.make_locales --missing  only print those, as lines for a table of translations

English texts come from the nodes in nodes/, the page's scripts in web/, and below. Each other language has one table in
docs/build/translations, {English text: translation}. If one English text needs two translations, the table also
holds a place (`GraftTrainDreamBooth.inputs.train.name`), which applies to that place alone.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from tests.support import pack
from tests.support.host import ROOT

LOCALES = ROOT / "locales"
FOLDER = LOCALES / "en"
TABLES = Path(__file__).with_name("translations")
LANGUAGES = ("zh", "ja", "ko", "fr", "de", "es", "ru")

# Names that the frontend needs and no node contains. Categories of general words are shared with other packs.
MAIN = {
    "nodeCategories": {"graft": "Graft"},
    "dataTypes": {
        "GRAFT_DATASET": "Graft dataset",
        "GRAFT_EMBEDDING": "Graft embedding",
        "GRAFT_OPTIONS": "Graft options",
    },
}

# The settings dialog's entries from web/settings.js; the frontend looks for ids with underscores.
SETTINGS = {
    "Graft_DatasetRoots": {
        "name": "Folders that datasets may come from",
        "tooltip": "Absolute paths, separated by semicolons, in addition to ComfyUI's input folder. Press R "
        "afterwards, then choose a folder below them in Graft Load Dataset.",
    },
    "Graft_CacheLimit": {
        "name": "Size limit of cached latents and texts (GB)",
        "tooltip": "When a run starts, Graft deletes the least recently used files in output/graft/cache until it is "
        "no larger. It never deletes files that the run needs.",
    },
    "Graft_GiveWay": {
        "name": "Trainings give way to other prompts",
        "tooltip": "When another prompt waits, the training pauses and continues behind it. Short prompts have no "
        "training. It holds for trainings that start afterwards, unless Graft Run Options say otherwise.",
        "options": {way: way for way in ("off", "to everything", "to short prompts")},
    },
    "Graft_GiveWayAfter": {
        "name": "Least training time before a training gives way (seconds)",
        "tooltip": "Each pause costs a save and the loading of the models.",
    },
    "Graft_GiveWayKeep": {
        "name": "Time that a training that gave way stays prepared in memory (minutes)",
        "tooltip": "Its return is faster then. ComfyUI frees this memory when it needs it. 0: not at all.",
    },
}

# A text in a script of the page: t("...") shows it, text("...") marks it.
SHOWN = re.compile(r'\b(?:t|text)\(\s*"((?:[^"\\]|\\.)*)"')


def list_nodes():
    """Return the pack's node classes; their schemas need ComfyUI."""
    pack.use_comfy()
    pack.load_pack()
    from graft_pack.nodes import NODES

    return NODES


def describe_nodes(nodes):
    """Return the nodes' texts in the frontend's nodeDefs format.

    Deflate looks back only 32 kB: nodes whose ids end alike have like texts and are near each other, and the inputs
    that most nodes have come first.
    """
    schemas = sorted((node.define_schema() for node in nodes), key=lambda schema: schema.node_id[::-1])
    counts = Counter(given.id for schema in schemas for given in schema.inputs)
    found = {}
    for schema in schemas:
        inputs = sorted(schema.inputs, key=lambda given: -counts[given.id])
        found[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {given.id: _describe(given.display_name or given.id, given.tooltip) for given in inputs},
            "outputs": {
                str(place): _describe(made.display_name or made.id, made.tooltip)
                for place, made in enumerate(schema.outputs)
            },
        }
    return found


def _describe(name, tooltip):
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def list_page_texts():
    """Return the texts that the page's scripts show, in order."""
    found = {}
    for path in sorted((ROOT / "web").rglob("*.js")):
        for match in SHOWN.finditer(path.read_text(encoding="utf-8")):
            found[json.loads(f'"{match.group(1)}"')] = None
    return list(found)


def describe(nodes):
    """Return {part: its English content}. The page's texts are a list, in the same order in every language."""
    return {
        "nodeDefs": describe_nodes(nodes),
        "main": {**MAIN, "graft": {"texts": list_page_texts()}},
        "settings": SETTINGS,
    }


def list_texts(value, place=()):
    """Yield (place, text) of all texts in a tree."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from list_texts(inner, (*place, key))
    elif isinstance(value, list):
        for text in value:
            yield from list_texts(text, (*place, text))
    else:
        yield ".".join(place), value


def read_table(language):
    """Return {English text or place: translation}."""
    path = TABLES / f"{language}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def translate(value, table, place=()):
    """Return a tree in another language, without texts that are missing or as in English. In a list they are empty."""
    if isinstance(value, list):
        return [translate(text, table, place) or "" for text in value]
    if not isinstance(value, dict):
        translation = table.get(".".join(place)) or table.get(value)
        return None if translation == value else translation
    made = {key: translate(inner, table, (*place, key)) for key, inner in value.items()}
    return {key: inner for key, inner in made.items() if inner}


def list_missing(parts, table):
    """Return {place: English text} of texts that a table does not translate."""
    texts = (row for tree in parts.values() for row in list_texts(tree))
    return {place: text for place, text in texts if not (table.get(place) or table.get(text))}


def list_stale(parts, table):
    """Return the entries of a translation table that no text uses any more."""
    rows = [row for tree in parts.values() for row in list_texts(tree)]
    return sorted(set(table) - {place for place, _ in rows} - {text for _, text in rows})


def files_of(language, parts, table):
    """Return {file: its content} of a language, without parts that have no text.

    ComfyUI takes the parts from files of their own, or by their names from main.json: one file is smaller, and
    smallest with its largest part first.
    """
    if language == "en":
        # Nodes and settings have their English texts themselves: those files are for translators.
        return parts
    said = {name: translate(tree, table) for name, tree in parts.items()}
    main = said.pop("main")
    return {"main": {**said, **main}}


def dump(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n"


def write(language, files):
    """Write the files of one language."""
    folder = LOCALES / language
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        if path.stem not in files:
            path.unlink()
    for name, value in files.items():
        (folder / f"{name}.json").write_text(dump(value), encoding="utf-8")
    print(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="write nothing")
    args = parser.parse_args()
    parts = describe(list_nodes())
    if not args.missing:
        write("en", files_of("en", parts, {}))
    for language in LANGUAGES:
        table = read_table(language)
        missing = dict.fromkeys(list_missing(parts, table).values(), "")
        if missing:
            print(
                f"{TABLES / language}.json lacks {len(missing)}:\n{json.dumps(missing, indent=0, ensure_ascii=False)}",
                file=sys.stderr,
            )
        if not args.missing:
            write(language, files_of(language, parts, table))


if __name__ == "__main__":
    main()
