"""Tests of full fine-tuning in shards: it gives what one process gives, and any number of processes resumes it."""

from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.engine.validation import check_recipe
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.formats import files
from graft_pack.trainers.optimizers import OPTIMIZERS
from graft_pack.trainers.recipe.options import HALF, HYBRID

from tests.support import kinds, models
from tests.support.diffusers_host import run_session, same_state
from tests.support.groups import FULL, assert_close, gradients_of, log_of, state_in, state_steps
from tests.support.process_group import ProcessGroup

ALL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "learning_rate": 1e-4}
# The gradient's norm is far above the limit, so every step is clipped.
WHOLE = {**FULL, **ALL, "keep_best": "on", "max_grad_norm": 0.1}
SHARDS = {**WHOLE, "shard": "on"}
# Each process has one picture, so the weights are updated within the backward.
ONE_EACH = {**ALL, "batch_size": 2, "steps": 4, "ema_decay": 0.9, "max_grad_norm": 0.0, "validation_fraction": 0.2}
BF16 = {"weight_dtype": "bf16", "max_grad_norm": 0.0, "learning_rate": 1e-3, "preview_prompts": ()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    run_session(folder, **WHOLE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_gradient_and_bytes_held(checkpointing, trials):
    """Also if a step has fewer pictures than processes."""
    for world in trials([3], [2, 3, 4]):
        for (before, *held), _ in gradients_of(world, {**ALL, "shard": "on", "checkpointing": checkpointing}):
            # Padding fills up rows that do not divide evenly.
            assert all(before / world <= size <= 1.2 * before / world for size in held)


def tensors_below(folder, kind):
    """Return {name: tensor} of the run's last state, or of the best files."""
    pattern = "runs/*/state-00000006.safetensors" if kind == "state" else "runs/*/adapters/best.safetensors"
    (path,) = folder.glob(pattern)
    return files.read_tensors(str(path))[0]


@pytest.mark.soak
def test_result_and_files_are_those_of_one_process(whole, tmp_path, trials):
    for world in trials([2], [2, 3, 4]):
        folder = tmp_path / str(world)
        assert None not in ProcessGroup(world).run("train", folder=str(folder), fields=SHARDS)
        assert_close(folder, whole)
        for kind in ("state", "best"):
            found, expected = tensors_below(folder, kind), tensors_below(whole, kind)
            assert [*found] == [*expected]
            for name, value in expected.items():
                assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
                # Adam divides a tiny gradient by itself.
                assert models.distance(found[name].double(), value.double()) <= 2e-2 or kind == "state", name
        for event, number in (("step", "loss"), ("step", "grad_norm"), ("validation", "loss"), ("best", "step")):
            ours, theirs = ([line[number] for line in log_of(one) if line["event"] == event] for one in (folder, whole))
            assert ours == pytest.approx(theirs, rel=1e-4)
            assert ours


@pytest.mark.soak
@pytest.mark.parametrize("world, other", [(2, 1), (1, 3)])
def test_resumed_by_another_number_of_processes(whole, tmp_path, world, other):
    """From the last save: what was trained after it is lost with the process."""
    answers = ProcessGroup(world).run("train", folder=str(tmp_path), fields=SHARDS, death=(world - 1, "part", 11))
    assert answers.pop() is None
    assert max(state_steps(tmp_path)) == 4
    if other == 1:
        assert run_session(tmp_path, **SHARDS).resumed_from == 4
    else:
        answers = ProcessGroup(other).run("train", folder=str(tmp_path), fields=SHARDS)
        assert [answer["resumed_from"] for answer in answers] == [4] * other
    assert_close(tmp_path, whole)


@pytest.mark.soak
@pytest.mark.parametrize("fields", [{}, BF16], ids=["fp32", "bf16"])
def test_same_bits_after_a_kill(fields, tmp_path):
    """The noise of stochastic rounding depends on step, weight and process alone."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    fields = {**SHARDS, **fields}
    assert None not in ProcessGroup(2).run("train", folder=str(straight), fields=fields)
    assert "PeerLostError" in ProcessGroup(2).run("train", folder=str(killed), fields=fields, death=(1, "part", 12))
    assert 0 < max(state_steps(killed)) < 6
    assert None not in ProcessGroup(2).run("train", folder=str(killed), fields=fields)
    assert same_state(state_in(killed), state_in(straight))
    assert {value.dtype for value in state_in(straight).trainables.values()} == {
        torch.bfloat16 if "weight_dtype" in fields else torch.float32
    }


@pytest.mark.parametrize("fields", [SHARDS, {**ONE_EACH, "shard": "on"}], ids=["after", "within"])
def test_unused_weights_stay_and_each_shard_rounds_for_itself(fields, tmp_path):
    """After the backward, and within it. FSDP2 sends zeros for an unused weight, and AdamW would decay it."""
    fields = {**fields, **BF16, "optimizer": "AdamW", "weight_decay": 0.5}
    assert None not in ProcessGroup(2).run("train", folder=str(tmp_path), fields=fields, spare=True)
    values = state_in(tmp_path, fields["steps"]).trainables
    unused, even = (next(value for name, value in values.items() if key in name) for key in (".unused.", ".even."))
    assert torch.equal(unused, torch.ones_like(unused))
    # All elements of both shards had the same gradients.
    first, second = even.chunk(2)
    assert len(even.unique()) > 1 and not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "RAdam", "SGD"])
def test_weights_are_updated_within_the_backward(optimizer, tmp_path):
    """The last batch of an epoch is smaller, so that one process has no picture."""
    rate = 1e-4 * OPTIMIZERS[optimizer].rate_factor
    fields = {**ONE_EACH, "optimizer": optimizer, "learning_rate": rate, "beta1": OPTIMIZERS[optimizer].beta1}
    run_session(tmp_path / "whole", **fields)
    folder = tmp_path / "shards"
    assert None not in ProcessGroup(2).run("train", folder=str(folder), fields={**fields, "shard": "on"})
    assert_close(folder, tmp_path / "whole")
    assert state_in(folder, 4).optimizer.keys() == state_in(tmp_path / "whole", 4).optimizer.keys()


PLAIN = {"optimizer": "SGD", "learning_rate": 1e-2}


@pytest.mark.soak
def test_losses_against_the_frozen_base(tmp_path):
    """A process predicts with its shards of the base in the place of the trained ones."""
    names = ["all weights, differential", "all weights, preference"]
    for name in names:
        fields = {**kinds.fields_of(name), **PLAIN}
        run_session(tmp_path / "whole" / name, dataset=kinds.dataset_of(name), **fields)
    fields = {**PLAIN, "shard": "on"}
    assert None not in ProcessGroup(2).run("train_kinds", folder=str(tmp_path), names=names, fields=fields)
    for name in names:
        assert_close(tmp_path / name, tmp_path / "whole" / name)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"shard": HYBRID}, "shard is hybrid"),
        ({"optimizer": "Adafactor", "beta1": 0.0, "beta2": 0.0}, "Adafactor needs whole weights.*choose one of AdamW"),
        ({"text_encoder": True}, "the text encoder or an embedding is trained too"),
        ({"gradient_check": "on"}, "gradient_check is on"),
        ({"communication": HALF}, "communication is bf16"),
        ({"compile": "on"}, "compile is on"),
        ({"offload": "on"}, "shard is on and offload is on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_go_with_shards(fields, said):
    recipe = models.recipe("SD1", **{**ALL, "max_grad_norm": 0.0, "shard": "on"})
    check_recipe(recipe)
    with pytest.raises(SettingsError, match=said):
        check_recipe(replace(recipe, **fields))


@pytest.mark.parametrize("name", [name for name, optimizer in OPTIMIZERS.items() if optimizer.elementwise])
def test_optimizer_updates_each_number_alone(name):
    """Two halves of a weight are updated as the whole."""
    recipe = models.recipe("SD1", **ALL, optimizer=name)
    source = torch.Generator().manual_seed(0)
    value, *grads = (torch.randn(4, 3, generator=source) for _ in range(4))

    def trained(rows):
        weight = torch.nn.Parameter(value[rows].clone())
        group = {"params": [weight], "lr": 1e-2, "weight_decay": 0.1}
        optimizer = OPTIMIZERS[name].make([group], recipe)
        for grad in grads:
            weight.grad = grad[rows].clone()
            optimizer.step()
        return weight.detach()

    halves = [trained(slice(0, 2)), trained(slice(2, 4)), trained(slice(4, 4))]
    assert torch.equal(torch.cat(halves), trained(slice(0, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("where, errors", [("part", ["PeerLostError", "KeyError"]), ("nan", ["NumbersError"] * 2)])
def test_error_in_one_process_ends_all_and_none_waits(where, errors, tmp_path):
    """Within a backward the others wait for it, so all processes agree on a loss before."""
    fields = {**ONE_EACH, "shard": "on"}
    assert ProcessGroup(2).run("fail", timeout=60, folder=str(tmp_path), fields=fields, rank=1, where=where) == errors


def test_fp16_is_refused(tmp_path):
    fields = {**ONE_EACH, "shard": "on"}
    answers = ProcessGroup(2).run("fail", timeout=60, folder=str(tmp_path), fields=fields, rank=1, where="fp16")
    assert answers == ["SettingsError"] * 2
