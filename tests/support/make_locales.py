"""locales/en, written from the nodes' own schemas: the English texts that a translator starts from.

    python -m tests.support.make_locales

The nodes say every name and tooltip once, in nodes/; a test compares these files with them.
"""

import json

from . import pack
from .host import ROOT

FOLDER = ROOT / "locales" / "en"

# What the frontend has to name and no node says. Categories of general words are shared with other packs.
MAIN = {
    "nodeCategories": {"graft": "Graft"},
    "dataTypes": {
        "GRAFT_DATASET": "Graft dataset",
        "GRAFT_EMBEDDING": "Graft embedding",
        "GRAFT_OPTIONS": "Graft options",
    },
}

# The settings dialog's entries, as web/settings.js has them; the frontend looks for ids with underscores.
SETTINGS = {
    "Graft_DatasetRoots": {
        "name": "Folders that datasets may come from",
        "tooltip": "Absolute paths, separated by semicolons, besides ComfyUI's input folder. Press R afterwards: the "
        "folders below them can then be chosen in Graft Load Dataset.",
    },
    "Graft_CacheLimit": {
        "name": "Size limit of cached latents and texts (GB)",
        "tooltip": "When a run starts, what was not used for longest is removed until output/graft/cache is no larger. "
        "What that run needs always stays.",
    },
}


def list_nodes():
    """The pack's node classes; ComfyUI is imported for their schemas."""
    pack.use_comfy()
    pack.load_pack()
    from graft_pack.nodes import NODES

    return NODES


def describe_nodes(nodes):
    """The nodes' texts in the frontend's nodeDefs format."""
    found = {}
    for node in sorted(nodes, key=lambda node: node.define_schema().node_id):
        schema = node.define_schema()
        found[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {given.id: _describe(given.display_name or given.id, given.tooltip) for given in schema.inputs},
            "outputs": {
                str(place): _describe(made.display_name or made.id, made.tooltip)
                for place, made in enumerate(schema.outputs)
            },
        }
    return found


def _describe(name, tooltip):
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def dump(value):
    return json.dumps(value, indent=2) + "\n"


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, value in (("nodeDefs", describe_nodes(list_nodes())), ("main", MAIN), ("settings", SETTINGS)):
        path = FOLDER / f"{name}.json"
        path.write_text(dump(value), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
