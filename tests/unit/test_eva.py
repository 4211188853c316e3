"""Tests of EVA: A starts at the main directions of its layer's inputs, and a run begins where the base is."""

from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.methods.eva import start_at_inputs
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.support.diffusers_host import make_dataset, make_host, run_session, same_state, same_tensors, state_of

EVA = {"rank": 4, "steps": 3, "batch_size": 2, "save_every": 1, "adapter_args": (("eva", True),)}


def network(rank):
    """Return a network with adapters on a linear layer, a convolution, and a layer that sees a row a picture."""
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    parts = {name: torch.nn.Linear(24, 8) for name in ("wide", "narrow", "bare")}
    module = torch.nn.ModuleDict(parts | {"conv": torch.nn.Conv2d(3, 8, 3)})
    targets = ["wide", "narrow", "conv"]
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), module)


@pytest.mark.parametrize("rank, pictures", [(4, 1), (4, 8), (20, 3)])
def test_a_starts_at_the_principal_components_of_all_inputs(rank, pictures):
    """They are those of one PCA over all rows; what has no matrix of enough inputs keeps its start."""
    module = network(rank)
    source = torch.Generator().manual_seed(1)
    # Directions of clearly different weight, and a mean.
    sizes = torch.logspace(1, -2, 24)
    rows = [torch.randn(2, 16, 24, generator=source) * sizes + 3 for _ in range(pictures)]
    kept = [row.clone() for row in rows]
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def forward():
        with torch.no_grad():
            for row in rows:
                module["wide"](row)
                module["narrow"](row[0, :2])
                module["conv"](torch.ones(1, 3, 8, 8))

    assert start_at_inputs([module], forward) == (1, 3)
    assert all(torch.equal(*pair) for pair in zip(rows, kept, strict=True))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"wide.lora_A.default.weight"}
    directions = module["wide"].lora_A["default"].weight.detach().double()
    assert (directions @ directions.T - torch.eye(rank, dtype=torch.float64)).abs().max() <= 1e-5
    every = torch.cat([row.reshape(-1, 24) for row in rows]).double()
    wanted = torch.linalg.svd(every - every.mean(0), full_matrices=False)[2][:3]
    # Each of the main directions, whatever its sign. A PCA by parts forgets what lies beyond the rank.
    assert (directions[:3] @ wanted.T).abs().diagonal().min() >= 0.995
    assert not [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer) and layer._forward_pre_hooks]


def test_many_tokens_are_thinned_and_half_precision_is_read():
    module = network(4).to(torch.bfloat16)
    source = torch.Generator().manual_seed(2)
    rows = torch.randn(1, 9000, 24, generator=source) * torch.logspace(1, -2, 24)
    assert start_at_inputs([module], lambda: module["wide"](rows.bfloat16()))[0] == 1
    main = module["wide"].lora_A["default"].weight[0].float()
    assert main[0].abs() >= 0.99


def test_a_run_starts_at_the_base_and_with_other_directions(tmp_path):
    plain = run_session(tmp_path / "plain", **{**EVA, "adapter_args": ()})
    run = run_session(tmp_path / "eva", **EVA)
    assert run.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert run.losses[1] != plain.losses[1]
    fixed = run_session(tmp_path / "fixed", **{**EVA, "adapter_args": (("eva", True), ("lora_fa", True))})
    downs = [value.flatten(1) for name, value in fixed.adapter.items() if name.endswith("lora_down.weight")]
    assert len(downs) > 4
    for down in downs:
        assert (down @ down.T - torch.eye(len(down))).abs().max() <= 1e-4


def test_a_resumed_run_has_the_same_bits(tmp_path):
    straight = run_session(tmp_path / "straight", **EVA)
    run_session(tmp_path / "parts", **{**EVA, "steps": 2})
    resumed = run_session(tmp_path / "parts", **EVA)
    assert resumed.resumed_from == 2
    assert same_state(state_of(resumed), state_of(straight))
    assert same_tensors(resumed.adapter, straight.adapter)


def test_values_to_start_from_win(tmp_path):
    """The adapter's effect stays, so EVA draws nothing anew."""
    from graft_pack.trainers.formats.adapter import save_adapter

    first = run_session(tmp_path, **{**EVA, "adapter_args": ()})
    path = str(tmp_path / "first.safetensors")
    save_adapter(path, first.adapter, "first")
    runs = [
        run_session(tmp_path, **{**EVA, "adapter_args": arguments, "start_from": path, "learning_rate": 1e-4})
        for arguments in ((), EVA["adapter_args"])
    ]
    assert same_tensors(runs[0].adapter, runs[1].adapter)


@pytest.mark.parametrize("fields", [EVA, {"steps": 2, "base_dtype": "fp8 (scaled)"}])
@pytest.mark.parametrize("shuffles", [True, False])
def test_captions_may_vary(tmp_path, fields, shuffles):
    """The unvaried caption need not be among those of the visits."""
    dataset = make_dataset()
    captions = ("a, b, c, d, e, f",) if shuffles else tuple(f"line {number}" for number in range(9))
    rows = [
        replace(example, captions=captions, handling=replace(example.handling, shuffle_tags=shuffles))
        for example in dataset.examples
    ]
    assert run_session(tmp_path, dataset=replace(dataset, examples=tuple(rows)), **fields).step == fields["steps"]


def test_it_makes_room_where_memory_runs_out(tmp_path, monkeypatch):
    host, room = make_host(), []
    predict = host.denoiser.predict

    def short_of_memory(*args):
        if not room:
            raise torch.OutOfMemoryError("out of memory")
        return predict(*args)

    monkeypatch.setattr(host.denoiser, "predict", short_of_memory)
    monkeypatch.setattr(host.denoiser, "make_room", lambda weights=False: room.append(weights))
    found = run_session(tmp_path / "short", host=host, **EVA)
    assert room == [False]
    assert same_tensors(found.adapter, run_session(tmp_path / "plenty", **EVA).adapter)
