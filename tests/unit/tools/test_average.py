"""Tests of the average of a run's saves: its profile against the paper's formulas, its tensors against the files."""

import json
import os

import pytest
import torch
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.formats.metadata import MADE
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.runs.saves import list_saves
from graft_pack.trainers.tools.merge import WIDEST, average_saves, exponent_of, weights_of
from safetensors.torch import load_file, save_file

from tests.support.diffusers_host import run_session


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25, 0.28])
def test_a_profile_has_the_width_of_the_paper(width):
    """Of the density t^gamma over all steps, the standard deviation is that part of the last step."""
    gamma = exponent_of(width)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(width, rel=1e-6)
    steps = torch.arange(1, 2_001, dtype=torch.float64)
    weights = torch.tensor(weights_of(steps.tolist(), width), dtype=torch.float64)
    mean = (weights * steps).sum()
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float((weights * (steps - mean) ** 2).sum().sqrt() / 2_000) == pytest.approx(width, rel=1e-2)


def test_the_widest_profile_is_uniform():
    assert exponent_of(WIDEST) == pytest.approx(0.0, abs=1e-6)
    assert weights_of([5, 10, 20], WIDEST) == pytest.approx([1 / 4, 1 / 4, 1 / 2])


def folders_of(folder):
    return Folders(*(str(folder / name) for name in ("runs", "cache", "loras", "emb")))


@pytest.mark.parametrize("method", ["LoRA", "LoKr"])
def test_saves_are_averaged_by_their_steps(tmp_path, method):
    run = run_session(tmp_path, steps=6, save_every=2, keep_last=9, method=method).run
    saves = {step: paths[0] for step, paths in list_saves(folders_of(tmp_path), run).items()}
    assert list(saves) == [2, 4, 6]
    adapter = average_saves(folders_of(tmp_path), run, 6, 0.2)
    gamma = exponent_of(0.2)
    powers = {step: (step / 6) ** gamma for step in saves}
    tensors = {step: load_file(path) for step, path in saves.items()}
    assert set(adapter) == set(tensors[6])
    for name, tensor in adapter.items():
        expected = sum(tensors[step][name].double() * power for step, power in powers.items()) / sum(powers.values())
        assert torch.allclose(tensor.double(), expected, atol=1e-6), name
        assert tensor.dtype == tensors[6][name].dtype
        assert not name.endswith("alpha") or torch.equal(tensor, tensors[6][name])
    assert any(not torch.equal(tensor, tensors[6][name]) for name, tensor in adapter.items())
    assert json.loads(adapter.metadata[MADE]) == {"tool": "average of saves", "steps": [2, 4, 6], "width": 0.2}
    # An earlier adapter of the run averages the saves up to its own step.
    early = average_saves(folders_of(tmp_path), run, 4, 0.2)
    assert json.loads(early.metadata[MADE])["steps"] == [2, 4]
    with pytest.raises(RunError, match="has kept 1 saves up to step 3: there is nothing to average") as caught:
        average_saves(folders_of(tmp_path), run, 3, 0.2)
    assert caught.value.input == "adapter_a"


def test_a_save_with_other_layers_is_named(tmp_path):
    run = run_session(tmp_path, steps=4, save_every=2, keep_last=9).run
    path = os.path.join(run.adapters, "step-00000002.safetensors")
    tensors = load_file(path)
    del tensors[next(iter(sorted(tensors)))]
    save_file(tensors, path)
    with pytest.raises(RunError, match="step 2 of the run .* has other layers than that of step 4"):
        average_saves(folders_of(tmp_path), run, 4, 0.1)


def test_saves_close_together_share_a_weight():
    even = weights_of([100, 200, 300, 400, 500], 0.2)
    crowded = weights_of([100, 200, 300, 400, 499, 500], 0.2)
    assert sum(crowded) == pytest.approx(1.0)
    assert sum(crowded[-2:]) == pytest.approx(even[-1], rel=0.1)
