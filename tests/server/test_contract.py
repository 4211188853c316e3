"""The frozen contract of the nodes: what users' workflows hold, texts, and the cost of the pack's start."""

import json
import os

from tests.support.host import ROOT

SNAPSHOT = ROOT / "tests" / "contract.json"


def contract(info):
    """Describe a node as users' workflows hold it: id, inputs with their kind and choices, outputs, in order."""
    rows = {}
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *rest = info["input"][group][name]
            limits = {key: (rest[0] if rest else {}).get(key) for key in ("default", "min", "max")}
            if name in {"folder", "adapter_name", "embedding_name"}:
                limits = {}
            rows[name] = [group, kind if isinstance(kind, str) else "COMBO", _choices(name, kind, rest), limits]
    return {"inputs": rows, "order": list(rows), "outputs": info["output"], "names": info["output_name"]}


def _choices(name, kind, rest):
    """A combo's fixed strings; lists of files and of the host's samplers are not ours to freeze."""
    if name in {"folder", "adapter_name", "embedding_name", "sampler_name", "scheduler"}:
        return None
    if isinstance(kind, list):
        return kind
    return (rest[0] if rest else {}).get("options")


def test_the_contract_is_frozen(server):
    """New nodes, inputs and choices may come, the last in order; nothing that landed may change.

    After a wanted addition, write the snapshot anew: GRAFT_WRITE_CONTRACT=1.
    """
    found = {name: contract(info) for name, info in server.object_info().items() if name.startswith("Graft")}
    if os.environ.get("GRAFT_WRITE_CONTRACT"):
        SNAPSHOT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    frozen = json.loads(SNAPSHOT.read_text())
    for name, node in frozen.items():
        now = found[name]
        assert now["order"][: len(node["order"])] == node["order"]
        assert now["outputs"][: len(node["outputs"])] == node["outputs"]
        assert now["names"][: len(node["names"])] == node["names"]
        for field, (group, kind, choices, limits) in node["inputs"].items():
            assert now["inputs"][field][:2] == [group, kind]
            _assert_no_tighter(now["inputs"][field][3], limits)
            if choices:
                assert now["inputs"][field][2][: len(choices)] == choices
        added = now["order"][len(node["order"]) :]
        assert all(now["inputs"][field][0] == "optional" for field in added)


def _assert_no_tighter(now, frozen):
    """Check that saved values stay valid, and that an untouched field keeps its meaning."""
    assert now.get("default") == frozen.get("default")
    if frozen.get("min") is not None:
        assert now["min"] <= frozen["min"]
    if frozen.get("max") is not None:
        assert now["max"] >= frozen["max"]


def test_every_input_and_node_is_explained(server):
    for name, info in server.object_info().items():
        if not name.startswith("Graft"):
            continue
        assert info["description"], name
        for group in ("required", "optional"):
            for field, (_, *rest) in info["input"].get(group, {}).items():
                assert rest and rest[0].get("tooltip"), f"{name}.{field}"


def test_the_pack_adds_little_to_the_start(server, make_server):
    """At most 0.3 s, by the host's own figures; medians of processes are in `make bench`."""
    seconds = _seconds_added(server)
    for number in range(3):
        if seconds <= 0.3:
            return
        # Other work on the machine adds to the figure, and nothing takes from it: the least of a few counts.
        with make_server(f"start {number}") as another:
            seconds = min(seconds, _seconds_added(another))
    assert seconds <= 0.3


def _seconds_added(server):
    lines = [line for line in server.read_log().splitlines() if "seconds: " in line and "graft" in line.lower()]
    return float(lines[-1].split("seconds")[0].strip().split()[-1])
