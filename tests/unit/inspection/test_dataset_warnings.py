"""Tests of warnings that a user sees when a training starts."""

import numpy as np
import pytest
from graft_pack.trainers.data.examples import Augmentation
from graft_pack.trainers.data.scan import scan_folder
from graft_pack.trainers.inspection import report as inspect
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.protocols import Geometry
from graft_pack.trainers.runs.folders import Folders
from PIL import Image

from tests.support import models
from tests.support.diffusers_host import make_host, run_session


def draw(path, size):
    Image.fromarray(np.random.RandomState(size).randint(0, 255, (size, size, 3)).astype(np.uint8)).save(path)
    path.with_suffix(".txt").write_text("a thing")


@pytest.fixture
def folder(tmp_path):
    """Create two pictures of 64 pixels."""
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(2):
        draw(root / f"{number}.png", 64 + number)
    return root


def warnings_of(folder, tmp_path, resolution=64, upscale=False, **fields):
    told = []
    host = make_host(lambda event, payload: told.append((event, payload)))
    dataset = scan_folder(str(folder), "", resolution, 1, Augmentation(upscale=upscale))
    values = {"batch_size": 1, "steps": 2, "resolution": resolution, **fields}
    prepare(dataset, models.recipe("SD1", **values), host, Folders("", str(tmp_path / "cache"), "", ""))
    rows = [row for event, payload in told if event == "warnings" for row in payload["warnings"]]
    return {row["kind"]: row for row in rows}


def test_skipped_files_are_named_and_counted(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"no picture")
    draw(folder / "small.png", 8)
    found = warnings_of(folder, tmp_path)["skipped"]
    assert (found["count"], found["total"]) == (2, 4)
    assert "bad.png" in found["names"] and "small.png" in found["names"]
    assert found["text"].startswith("2 of 4 files skipped: ")


def test_long_lists_of_skipped_files_are_cut(folder, tmp_path):
    for number in range(20):
        (folder / f"bad{number}.png").write_bytes(b"no picture")
    assert warnings_of(folder, tmp_path)["skipped"]["names"].endswith("; and 12 more")


@pytest.mark.parametrize("size, warned", [(32, True), (40, True), (60, False), (64, False), (200, False)])
def test_far_enlarged_pictures_are_named_with_their_size(folder, tmp_path, size, warned):
    draw(folder / "little.png", size)
    found = warnings_of(folder, tmp_path, upscale=True).get("enlarged")
    assert bool(found) == warned
    if warned:
        assert (found["smallest"], found["side"], found["names"]) == (size, 64, "little.png")


@pytest.mark.parametrize("batch, warned", [(1, False), (2, False), (3, True), (16, True)])
def test_a_batch_larger_than_the_dataset_is_named(folder, tmp_path, batch, warned):
    assert ("batch" in warnings_of(folder, tmp_path, batch_size=batch)) == warned


@pytest.mark.parametrize("resolution, warned", [(64, True), (256, True), (384, False), (512, False), (768, False)])
def test_a_resolution_far_from_the_model_is_named(folder, tmp_path, resolution, warned):
    assert ("resolution" in warnings_of(folder, tmp_path, resolution=resolution, upscale=True)) == warned


def test_inspect_gives_the_same_warnings_before_training(folder):
    (folder / "bad.png").write_bytes(b"no picture")
    draw(folder / "little.png", 32)
    dataset = scan_folder(str(folder), "", 64, 1, Augmentation(upscale=True))
    findings = inspect.inspect(dataset, {0: Geometry(64, 8)}, None)
    assert [row["kind"] for row in inspect.warnings(findings, "SD1")] == ["skipped", "enlarged", "resolution"]
    assert [row["kind"] for row in inspect.warnings(findings, "")] == ["skipped", "enlarged"]


def test_work_before_the_first_step_is_reported_in_order(tmp_path):
    told = []

    def report(event, payload):
        told.append(payload["name"] if event == "phase" else event)

    run_session(tmp_path, report, steps=60, gradient_check="on")
    order = [told.index(name) for name in ("run", "cache", "loading", "gradients", "measuring", "training", "step")]
    assert order == sorted(order)
