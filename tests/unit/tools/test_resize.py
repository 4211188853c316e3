"""Tests of resizing: it loses nothing needlessly, and the loss is the smallest possible."""

import json

import pytest
import torch
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.formats.adapter import Adapter
from graft_pack.trainers.formats.keys import split
from graft_pack.trainers.memory.tracking import TensorTracker
from graft_pack.trainers.tools.difference import difference, refactor
from graft_pack.trainers.tools.extract import resize

from tests.support import models

SOURCE = torch.Generator().manual_seed(1)


def random(*shape):
    return torch.randn(shape, generator=SOURCE)


# One layer of each kind that can be handled without the model's weights.
KINDS = {
    "LoRA": {"lora_down.weight": random(6, 20), "lora_up.weight": random(12, 6), "alpha": torch.tensor(3.0)},
    "no alpha": {"lora_down.weight": random(6, 20), "lora_up.weight": random(12, 6)},
    "convolution": {"lora_down.weight": random(6, 4, 3, 3), "lora_up.weight": random(12, 6, 1, 1)},
    "Tucker": {
        "lora_down.weight": random(6, 4, 1, 1),
        "lora_mid.weight": random(6, 6, 3, 3),
        "lora_up.weight": random(12, 6, 1, 1),
    },
    "rank beyond the layer": {"lora_down.weight": random(40, 20), "lora_up.weight": random(12, 40)},
    "LoHa": {
        "hada_w1_a": random(12, 2),
        "hada_w1_b": random(2, 20),
        "hada_w2_a": random(12, 2),
        "hada_w2_b": random(2, 20),
        "alpha": torch.tensor(1.0),
    },
    "LoKr": {"lokr_w1": random(3, 4), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 5), "alpha": torch.tensor(1.0)},
    "whole": {"diff": random(12, 20), "diff_b": random(12)},
}

each_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind):
    return Adapter({f"x.{end}": tensor for end, tensor in KINDS[kind].items()}, {"modelspec.title": kind})


def value_of(adapter):
    layers, others = split(adapter)
    assert not others
    return difference("x", layers["x"], "").value()


@each_kind
def test_at_full_energy_and_no_limit_it_is_the_same_to_the_bit(kind):
    found = resize(made(kind), 0, 1.0)
    assert found.keys() == made(kind).keys()
    assert all(torch.equal(found[key], value) for key, value in made(kind).items())


@each_kind
def test_at_full_energy_and_a_rank_that_holds_it_the_effect_is_the_same(kind):
    found = resize(made(kind), 12, 1.0)
    assert models.distance(value_of(found), value_of(made(kind))) <= 1e-5


@each_kind
def test_a_rank_keeps_the_best_of_it(kind):
    found = resize(made(kind), 2, 1.0)
    before = value_of(made(kind)).flatten(1)
    values = torch.linalg.svdvals(before.double())
    lost = (value_of(found).flatten(1) - before).double().norm()
    assert found["x.lora_down.weight"].shape[0] == float(found["x.alpha"]) == 2
    assert float(lost) == pytest.approx(float(values[2:].norm()), rel=1e-4)
    assert found.metadata["ss_network_dim"] == "2"


@each_kind
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_is_the_part_of_the_square_that_is_kept(kind, energy):
    """One rank less would keep less than that part."""
    found = resize(made(kind), 0, energy)
    values = torch.linalg.svdvals(value_of(made(kind)).flatten(1).double()).square()
    rank = found["x.lora_down.weight"].shape[0]
    assert values[:rank].sum() >= energy * values.sum() * (1 - 1e-6)
    assert values[: rank - 1].sum() < energy * values.sum()
    kept = value_of(found).double().square().sum() / values.sum()
    assert float(kept) == pytest.approx(float(values[:rank].sum() / values.sum()), rel=1e-4)


def test_rank_and_energy_bind_together():
    assert resize(made("LoRA"), 1, 0.99)["x.lora_down.weight"].shape[0] == 1
    assert resize(made("LoRA"), 6, 0.5)["x.lora_down.weight"].shape[0] < 6


def test_factors_are_never_multiplied_out():
    """The cost is that of the factors: a layer of ten million weights creates no matrix of its size."""
    up, down = torch.randn(3000, 8), torch.randn(8, 3000)
    with TensorTracker() as live:
        refactor(up, down, 4, 1.0)
    assert live.peak < 20 * (up.nbytes + down.nbytes) < 0.2 * 3000 * 3000 * 4


def test_norms_and_biases_stay_as_they_are():
    adapter = Adapter({**made("LoRA"), "n.diff": torch.ones(5), "x.diff_b": torch.ones(12), "n.diff_b": torch.ones(5)})
    found = resize(adapter, 2, 1.0)
    for key in ("n.diff", "x.diff_b", "n.diff_b"):
        assert torch.equal(found[key], adapter[key])


def test_a_layer_of_zeros_is_no_trouble():
    adapter = Adapter({"x.lora_down.weight": torch.zeros(4, 6), "x.lora_up.weight": torch.zeros(5, 4)})
    for found in (resize(adapter, 2, 1.0), resize(adapter, 0, 0.9)):
        assert float(value_of(found).norm()) == 0


def test_tensors_are_the_results_own():
    """LORA_MODEL needs contiguous, unshared float32 tensors on the CPU."""
    given = made("LoRA")
    found = resize(given, 0, 1.0)
    half = resize(Adapter({key: value.half() for key, value in given.items()}), 2, 0.9)
    for tensor in (*found.values(), *half.values()):
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*given.values(), *found.values())}
    assert len(storages) == 2 * len(given)


def test_where_it_comes_from_is_in_its_metadata():
    said = {"modelspec.trigger_phrase": "dog", "ss_steps": "100", "graft_identity": "12345678abc", "graft_recipe": "{}"}
    once = resize(Adapter(made("LoRA"), {"modelspec.title": "mine", **said}), 4, 1.0)
    twice = resize(once, 2, 0.9).metadata
    assert twice["modelspec.trigger_phrase"] == "dog"
    assert twice["ss_steps"] == "100"
    assert not {"graft_identity", "graft_recipe", "modelspec.title"} & twice.keys()
    told = json.loads(twice["graft_made"])
    assert (told["tool"], told["rank"], told["energy"]) == ("resize", 2, 0.9)
    assert told["of"][0]["made"]["of"] == [{"title": "mine", "trained": "12345678"}]


def test_what_needs_the_weights_is_refused_by_name():
    with pytest.raises(ModelError, match="layer x holds DoRA magnitudes") as caught:
        resize(Adapter({**made("LoRA"), "x.dora_scale": torch.ones(12, 1)}), 2, 1.0)
    assert caught.value.input == "adapter"
    assert "Graft Extract Adapter" in caught.value.cure
    with pytest.raises(SettingsError, match="energy is 0"):
        resize(made("LoRA"), 2, 0.0)
