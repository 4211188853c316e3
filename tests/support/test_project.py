"""The files around the code agree with each other and with what ComfyUI and its registry read."""

import re
import subprocess

import pytest

from tests.support.host import ROOT


def read_requirements():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture
def project(comfy):
    """pyproject.toml as ComfyUI reads it."""
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


def test_the_archive_holds_the_pack_and_not_the_tests():
    command = ["git", "ls-files", "--cached", "--others", "--ignored", "--exclude-from=.comfyignore", "-z"]
    ignored = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"))
    assert "tests/conftest.py" in ignored
    assert not {"__init__.py", "LICENSE", "pyproject.toml", "requirements.txt"} & ignored
    assert not [
        path
        for path in ignored
        if re.match(r"(nodes|trainers|web|locales|example_workflows)/.*\.(py|js|json|md)$", path)
    ]


def test_help_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"^([a-z]+):.*##", text, re.MULTILINE):
        assert f"make {target}" in shown
