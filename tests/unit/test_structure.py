"""Layout of the code: the direction of imports, sizes of modules, forbidden modules, language."""

import ast
import functools
import os
import subprocess
import sys

import pytest

from tests.support import language
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


@functools.cache
def nodes_of(path):
    """Return all syntax nodes of a file."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports_of(path):
    """(level, module) of each import in a file."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def top_of(name):
    return name.split(".")[0]


def relative(path):
    return path.relative_to(ROOT).as_posix()


# Packages from the bottom up. A package imports from rows below its own; within a row there is no cycle.
LAYERS = (
    {"trainers.errors", "trainers.text", "trainers.regex", "trainers.rng", "trainers.families"},
    {"trainers.protocols", "trainers.process_group", "trainers.fingerprints", "trainers.option", "trainers.video"},
    {"trainers.formats", "trainers.objective", "trainers.data", "trainers.lowrank"},
    {"trainers.recipe", "trainers.inspection"},
    {"trainers.optimizers"},
    {"trainers.preprocessing", "trainers.methods", "trainers.memory", "trainers.runs"},
    {"trainers.distributed", "trainers.tools", "trainers.curation"},
    {"trainers.steps"},
    {"trainers.engine"},
    {"nodes.host.settings", "nodes.host.dataset_folders", "nodes.host.paths"},
    {"nodes.host.server"},
    {"nodes.host.model"},
    {"nodes.host.jobs"},
    {"nodes.host.actions"},
    {"nodes"},
)
RANKS = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SHIPPED
    if path not in DOORS
}


def package_of(module):
    """Return the package that a module counts to, as in LAYERS."""
    parts = module.split(".")
    if parts[0] == "trainers":
        return ".".join(parts[:2])
    return ".".join(parts[:3]) if parts[:2] == ["nodes", "host"] else "nodes"


def imported_modules(module):
    """List the pack's own modules that a module imports, type hints and imports within functions included."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in nodes_of(path):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        assert node.level <= len(package) + 1, f"{module} imports from above the pack"
        base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            found = f"{base}.{alias.name}"
            yield found if found in MODULES else base


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("trainers", "nodes.host")])
def test_imports_go_one_way(module):
    own = package_of(module)
    for imported in imported_modules(module):
        package = package_of(imported)
        assert RANKS[package] <= RANKS[own], f"{module} imports {imported}"


def test_packages_import_each_other_in_no_cycle():
    arrows = {}
    for module in MODULES:
        own = package_of(module)
        if own in RANKS:
            arrows.setdefault(own, set()).update({package_of(other) for other in imported_modules(module)} - {own})
    while arrows:
        leaves = {package for package, others in arrows.items() if not others & arrows.keys()}
        assert leaves, f"a cycle among {sorted(arrows)}"
        arrows = {package: others for package, others in arrows.items() if package not in leaves}


def test_the_packs_own_module_imports_the_nodes():
    assert (1, "nodes") in set(imports_of(ROOT / "__init__.py"))


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_only_the_host_package_imports_comfyui(path):
    name = relative(path)
    if name.startswith("nodes/host/"):
        return
    for level, module in imports_of(path):
        assert level > 0 or top_of(module) not in HOST_MODULES, f"{name} imports {module}"
        if name.startswith("trainers/"):
            assert level > 0 or top_of(module) != "comfy_api", f"{name} imports {module}"


def test_modules_and_packages_stay_small():
    for path in (ROOT / "trainers").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, relative(path)
    for folder in {path.parent for path in MODULES.values()}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 18, relative(folder)


def test_language_is_plain():
    """Check the rules that a program can: first lines of docstrings, replaced and filler names, American spelling."""
    assert language.list_problems() == []


@pytest.mark.parametrize(
    "code",
    [
        "found = 1",
        "for one in rows: pass",
        "[one for one in rows]",
        "key, (some, rest) = row",
        "told: list = []",
        "if made := read(): pass",
        "with open(path) as things: pass",
        "def say(said): pass",
        "async def run(*, told): pass",
        "lambda one: one",
        "try: run()\nexcept OSError as found: pass",
    ],
)
def test_filler_variables_are_reported(code):
    (problem,) = language.fillers_in(code, "file.py")
    assert problem.startswith("file.py:")


@pytest.mark.parametrize("code", ["row.found = 1", "row['said'] = 1", "run(made=1)", "print(one)", "is_found = 1"])
def test_attributes_keys_and_keywords_are_no_fillers(code):
    assert list(language.fillers_in(code, "file.py")) == []


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_nothing_that_runs_or_reaches_out_is_used(path):
    text = path.read_text()
    assert text.isascii()
    for level, module in imports_of(path):
        assert level > 0 or top_of(module) not in FORBIDDEN_MODULES, f"{module} in {relative(path)}"
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{node.func.id} in {relative(path)}"
        assert not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"cuda"}), relative(path)
        assert not _calls_torch_load(node), relative(path)
        assert not (isinstance(node, ast.Constant) and node.value in {"cuda", "mps", "xpu"}), relative(path)


def _calls_torch_load(node):
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    return node.func.attr == "load" and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"


LAZY = {"accelerate", "diffusers", "imagehash", "matplotlib", "msgspec", "peft", "transformers"}


def test_processes_are_started_in_one_place():
    """Several GPUs need several processes, by torch.multiprocessing; whatever else wants some has to say why here."""
    wanted = {"multiprocessing", "torch.multiprocessing", "concurrent.futures.ProcessPoolExecutor"}
    found = set()
    for path in SHIPPED:
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            if any(name in wanted or name.startswith("multiprocessing.") for name in names):
                found.add(relative(path))
    # job.py starts none: it waits for the end of the process that started it.
    assert found == {"nodes/host/jobs/launcher.py", "job.py"}


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_heavy_imports_are_inside_functions(path):
    for node in nodes_of(path)[0].body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {top_of(name) for name in names} & LAZY


def test_importing_the_trainers_needs_no_host_and_no_heavy_library():
    code = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('p', {str(ROOT / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT)!r}])\n"
        "m = importlib.util.module_from_spec(spec); sys.modules['p'] = m; spec.loader.exec_module(m)\n"
        "import p.trainers.engine.session, p.trainers.engine.resolve, p.trainers.inspection.contact_sheet\n"
        "import p.trainers.formats.adapter\n"
        "print(sorted(set(sys.modules) & {'comfy', 'torch', 'diffusers', 'peft', 'matplotlib', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.sep, check=True)
    assert done.stdout.strip() == "[]"
