"""Tests of the code structure: allowed imports, forbidden calls, and the frozen contract of the nodes."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.host import ROOT

DOORS = [ROOT / "__init__.py", ROOT / "job.py"]
SHIPPED = [*DOORS, *sorted((ROOT / "nodes").rglob("*.py")), *sorted((ROOT / "trainers").rglob("*.py"))]
HOST_MODULES = {
    "comfy",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "server",
    "nodes",
    "execution",
    "latent_preview",
}
FORBIDDEN_MODULES = {"subprocess", "pickle", "marshal", "shelve", "socket", "urllib", "requests", "http", "pip"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
SNAPSHOT = Path(__file__).with_name("contract.json")


def imports_of(path):
    """Yield (level, module) of each import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def top_of(name):
    return name.split(".")[0]


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_arrows_point_one_way(path):
    name = relative(path)
    for level, module in imports_of(path):
        if name.startswith("nodes/host/"):
            assert level != 2, f"{name} imports from nodes: {module}"
            continue
        if level == 0:
            assert top_of(module) not in HOST_MODULES, f"{name} imports {module}"
        if name.startswith("trainers/"):
            assert level == 0 or not _leaves(path, level, "trainers"), f"{name} imports {module}"
            assert level > 0 or top_of(module) != "comfy_api", f"{name} imports {module}"


def _leaves(path, level, folder):
    """Report whether a relative import of that level climbs out of a top folder."""
    return level > len(path.relative_to(ROOT / folder).parts)


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_nothing_that_runs_or_reaches_out_is_used(path):
    text = path.read_text()
    assert text.isascii()
    for level, module in imports_of(path):
        assert level > 0 or top_of(module) not in FORBIDDEN_MODULES, f"{module} in {relative(path)}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{node.func.id} in {relative(path)}"
        assert not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"cuda"}), relative(path)
        assert not _calls_torch_load(node), relative(path)
        assert not (isinstance(node, ast.Constant) and node.value in {"cuda", "mps", "xpu"}), relative(path)


def _calls_torch_load(node):
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    return node.func.attr == "load" and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"


LAZY = {"accelerate", "diffusers", "peft", "matplotlib", "transformers"}


def test_processes_are_started_in_one_place():
    """Several GPUs need several processes, by torch.multiprocessing; any other use must be justified here."""
    wanted = {"multiprocessing", "torch.multiprocessing", "concurrent.futures.ProcessPoolExecutor"}
    found = set()
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            if any(name in wanted or name.startswith("multiprocessing.") for name in names):
                found.add(relative(path))
    assert found == {"nodes/host/jobs/launcher.py"}


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_heavy_imports_are_inside_functions(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {top_of(name) for name in names} & LAZY


def test_importing_the_trainers_needs_no_host_and_no_heavy_library():
    code = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('p', {str(ROOT / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT)!r}])\n"
        "m = importlib.util.module_from_spec(spec); sys.modules['p'] = m; spec.loader.exec_module(m)\n"
        "import p.trainers.session, p.trainers.settings, p.trainers.data.sheet, p.trainers.formats.adapter\n"
        "print(sorted(set(sys.modules) & {'comfy', 'torch', 'diffusers', 'peft', 'matplotlib', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.sep, check=True)
    assert done.stdout.strip() == "[]"


def contract(info):
    """Return what users' workflows hold of a node: id, inputs with kind and choices, outputs, both in order."""
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
    """Return a combo's fixed strings; lists of files and of the host's samplers are not ours to freeze."""
    if name in {"folder", "adapter_name", "embedding_name", "sampler_name", "scheduler"}:
        return None
    if isinstance(kind, list):
        return kind
    return (rest[0] if rest else {}).get("options")


def test_the_contract_is_frozen(server):
    """New nodes, inputs and choices may be added, new inputs last; nothing already released may change.

    After an intended addition, rewrite the snapshot: GRAFT_WRITE_CONTRACT=1.
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
    """Check that a saved workflow's values stay valid, and that an untouched field keeps its meaning."""
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
    """At most 0.3 s, by the host's own figures; `make bench` has medians of processes."""
    seconds = _seconds_added(server)
    for number in range(3):
        if seconds <= 0.3:
            return
        # Other load on the machine only adds to the figure, so the least of a few counts.
        with make_server(f"start {number}") as another:
            seconds = min(seconds, _seconds_added(another))
    assert seconds <= 0.3


def _seconds_added(server):
    lines = [line for line in server.read_log().splitlines() if "seconds: " in line and "graft" in line.lower()]
    return float(lines[-1].split("seconds")[0].strip().split()[-1])
