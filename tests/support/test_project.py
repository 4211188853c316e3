"""Tests that the project files agree with each other and with ComfyUI's and its registry's parsers."""

import io
import re
import subprocess
import sys
import zipfile

import pytest

from tests.support.host import ROOT


def read_requirements():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture
def project(comfy):
    """Return pyproject.toml as ComfyUI reads it."""
    from comfy_config.config_parser import extract_node_configuration

    return extract_node_configuration(str(ROOT))


def test_comfyui_reads_the_project(project):
    assert project.project.name == "graft"
    assert project.tool_comfy.display_name == "Graft"
    assert project.project.supported_comfyui_version == ">=0.3.75"
    assert project.project.license.file == "LICENSE"


def test_dependencies_are_the_requirements(project):
    assert project.project.dependencies == read_requirements()


def test_torch_is_left_to_the_host():
    assert not [line for line in read_requirements() if re.match(r"torch", line)]


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "GNU GENERAL PUBLIC LICENSE" in text
    assert "END OF TERMS AND CONDITIONS" in text


def list_archived():
    """Return the paths in the registry's archive, and the source paths that it leaves out."""
    command = ["git", "ls-files", "--cached", "--others", "-z"]

    def ask(*more):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True)
        return {path for path in done.stdout.split("\0") if path}

    known = ask("--exclude-standard")
    ignored = ask("--ignored", "--exclude-from=.comfyignore")
    return known - ignored, known & ignored


def test_the_archive_holds_the_pack_and_not_the_tests():
    archived, ignored = list_archived()
    assert "tests/conftest.py" in ignored
    assert {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"} <= archived
    folders = "nodes|trainers|web|locales|example_workflows|subgraphs"
    # No frontend offers German yet, nodes and settings have their English texts, and README.md becomes index.html.
    left_out = "locales/de/|locales/en/(nodeDefs|settings)|web/docs/choosing/README"
    shipped = rf"(?!{left_out})({folders})/.*\.(py|js|css|json|md|html|jpg|png|svg|avif)$"
    assert not [path for path in ignored if re.match(shipped, path)]
    assert {path.split("/")[0] for path in archived if "/" in path} == {*folders.split("|")}
    assert not [path for path in archived if path.endswith(".safetensors")]


def test_the_archive_is_small():
    """Zipped as the registry does it, it is below a megabyte."""
    with io.BytesIO() as held:
        with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(list_archived()[0]):
                archive.write(ROOT / path, path)
        size = len(held.getvalue())
    assert size < 1_000_000, size


def test_nothing_that_the_registry_warns_of():
    """`comfy node validate` runs ruff with these rules."""
    command = [sys.executable, "-m", "ruff", "check", ".", "-q", "--select", "S102,S307,E702"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"^([a-z]+):.*##", text, re.MULTILINE):
        assert f"make {target}" in shown
