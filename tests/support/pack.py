"""The pack and ComfyUI in this process, loaded as ComfyUI loads them.

The repository root has a folder `nodes`, and ComfyUI has a module `nodes`: the root must never be on sys.path ahead of
ComfyUI. `load_pack` makes the pack importable as `graft_pack`, as ComfyUI imports a folder below custom_nodes.
`use_comfy` makes ComfyUI importable.
"""

import atexit
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .host import ROOT, find_comfyui, read_version

PACK = "graft_pack"
BESIDE = ("benchmarks", "docs")


@dataclass(frozen=True)
class Comfy:
    """ComfyUI in this process: its folder, its version, and the base directory that it writes to."""

    path: Path
    version: tuple
    base: Path


def hide_root():
    """Remove the repository root from sys.path, where `python -m` puts it; BESIDE and `tests` stay importable."""
    for name in BESIDE:
        _load(name, ROOT / name)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def load_pack():
    """Load the pack as the module `graft_pack`, with its submodules below it; needs no ComfyUI."""
    return _load(PACK, ROOT)


def _load(name, folder):
    """Import a package from its folder, wherever that is; return it as it is if it was imported before."""
    if name in sys.modules:
        return sys.modules[name]
    door = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, door, submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@functools.cache
def use_comfy():
    """Make ComfyUI importable here, on the CPU, with a private base directory; return a Comfy."""
    hide_root()
    path = find_comfyui()
    sys.path.insert(0, str(path))
    os.environ["COMFYUI_PATH"] = str(path)
    base = make_base(Path(tempfile.mkdtemp(prefix="graft-comfy-")))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    set_arguments(base)
    return Comfy(path, read_version(path), base)


def set_arguments(base):
    """Set a server's command-line arguments, which comfy.model_management and folder_paths read on import."""
    early = {"comfy.model_management", "folder_paths"} & set(sys.modules)
    if early:
        raise RuntimeError(f"{' and '.join(sorted(early))} imported before use_comfy()")
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True
    args.base_directory = str(base)


def make_base(folder):
    """Create the folders that ComfyUI expects below --base-directory; return the folder."""
    for name in ("custom_nodes", "input", "output", "temp", "user", "models/checkpoints", "models/loras"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder
