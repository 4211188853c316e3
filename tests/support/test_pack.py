"""Tests of the pack and ComfyUI side by side in one process, and of the engine without ComfyUI."""

import subprocess
import sys
from pathlib import Path

from tests.support.host import ROOT

WITHOUT_COMFYUI = """
import importlib, pkgutil, sys
from tests.support import pack
pack.hide_root()
trainers = importlib.import_module(pack.load_pack().__name__ + ".trainers")
for module in pkgutil.walk_packages(trainers.__path__, trainers.__name__ + "."):
    importlib.import_module(module.name)
hosts = {"comfy", "folder_paths", "nodes", "server", "execution", "comfy_api"} & set(sys.modules)
assert not hosts, hosts
"""


def test_modules_have_their_own_names():
    assert __name__ == "tests.support.test_pack"
    assert str(ROOT) not in map(str, map(Path, sys.path))


def test_comfyui_keeps_its_nodes(comfy):
    import nodes

    assert Path(nodes.__file__) == comfy.path / "nodes.py"


def test_comfyui_writes_to_its_own_base(comfy):
    import comfy.model_management as management
    import folder_paths

    assert management.get_torch_device().type == "cpu"
    assert Path(folder_paths.get_output_directory()).is_relative_to(comfy.base)


def test_engine_needs_no_comfyui():
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMFYUI], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
