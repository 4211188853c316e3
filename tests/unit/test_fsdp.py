"""Tests of sharded frozen weights, one shard per process: training gives the same result, and no process hangs."""

import pytest
from graft_pack.trainers.distributed import fsdp
from graft_pack.trainers.engine.validation import check_recipe
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.recipe.options import ALL_BUT_ATTENTION, EVERYTHING, HYBRID

from tests.support import models
from tests.support.diffusers_host import run_session, same_state
from tests.support.groups import FULL, assert_close, gradients_of, log_of, state_in, state_steps
from tests.support.process_group import ProcessGroup

SHARED = {**FULL, "shard": "on"}
HYBRID_SHARDS = {**FULL, "shard": HYBRID}


@pytest.mark.soak
@pytest.mark.parametrize(
    "checkpointing, recompute, worlds",
    [("off", EVERYTHING, [2]), ("on", EVERYTHING, [4]), ("on", ALL_BUT_ATTENTION, [2])],
)
def test_each_holds_its_share_and_the_gradient_is_that_of_one_process(checkpointing, recompute, worlds, trials):
    """Also if a step has fewer pictures than processes: the others show a picture that counts for nothing."""
    fields = {"shard": "on", "checkpointing": checkpointing, "recompute": recompute}
    for world in trials(worlds, [2, 3, 4]):
        for (whole, *held), _ in gradients_of(world, fields):
            # Padding fills up sizes that do not divide evenly.
            most = 1.01 * whole / world + 4096
            assert all(whole / world <= size <= most for size in held)


@pytest.mark.soak
@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("machines", [[1, 2], [2, 2]], ids=str)
def test_hybrid_shards_are_whole_on_each_machine(machines, checkpointing, trials):
    """Machines need not have the same number of processes."""
    if machines == [2, 2] and checkpointing == "off" and not trials(False, True):
        pytest.skip("`make soak` tries all")
    sizes = [size for size in machines for _ in range(size)]
    fields = {"shard": HYBRID, "checkpointing": checkpointing}
    for size, ((whole, *held), _) in zip(sizes, gradients_of(machines, fields), strict=True):
        assert all(whole / size <= bytes_held <= 1.01 * whole / size + 4096 for bytes_held in held)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Return the folder of an uninterrupted run of three processes, two of them on one machine."""
    folder = tmp_path_factory.mktemp("hybrid")
    assert None not in ProcessGroup([2, 1]).run("train", folder=str(folder), fields=HYBRID_SHARDS)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return the folder of an uninterrupted run of two processes with sharded weights."""
    folder = tmp_path_factory.mktemp("shared")
    assert None not in ProcessGroup(2).run("train", folder=str(folder), fields=SHARED)
    return folder


RUNS = ["shared", "hybrid"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_the_result_is_that_of_one_process(straight, kind, request):
    folder = request.getfixturevalue(kind)
    assert_close(folder, straight)
    logs = [log_of(each) for each in (folder, straight)]
    for kind, number in (("step", "loss"), ("validation", "loss"), ("sample", "step")):
        found, expected = ([line[number] for line in log if line["event"] == kind] for log in logs)
        assert found == pytest.approx(expected, rel=1e-4)
        assert found


# (kind, processes, fields, deaths): see `process_group.train`.
DEATHS = [
    ("shared", 2, SHARED, [(1, "part", 5), (0, "part", 4), (1, "summed", 3), (0, "report", 8)]),
    ("hybrid", [2, 1], HYBRID_SHARDS, [(2, "part", 5), (1, "part", 5), (0, "part", 4), (2, "summed", 3)]),
]


@pytest.mark.soak
@pytest.mark.parametrize("kind, world, fields, deaths", DEATHS, ids=RUNS)
def test_a_process_is_killed_and_the_run_goes_on_as_if_nothing_was(
    kind, world, fields, deaths, request, straight, tmp_path, trials
):
    uninterrupted = state_in(request.getfixturevalue(kind))
    for number, death in enumerate(trials(deaths[:1], deaths)):
        folder = tmp_path / str(number)
        group = ProcessGroup(world)
        answers = group.run("train", folder=str(folder), fields=fields, death=death)
        assert group.exitcodes[death[0]] == -9
        assert answers.pop(death[0]) is None
        assert {*answers} == {"PeerLostError"}
        group.run("train", folder=str(folder), fields=fields)
        assert same_state(state_in(folder), uninterrupted), death


@pytest.mark.soak
def test_resumed_by_more_or_fewer_in_shares_or_not(straight, tmp_path, trials):
    for number, (world, fields) in enumerate(trials([(1, SHARED)], [(1, SHARED), (2, FULL), (3, SHARED)])):
        folder = tmp_path / str(number)
        answers = ProcessGroup(2).run("train", folder=str(folder), fields=SHARED, death=(1, "sum", 4))
        assert answers[0] == "PeerLostError"
        reached = max(state_steps(folder))
        assert 0 < reached < 6
        if world == 1:
            assert run_session(folder, **fields).resumed_from == reached
        else:
            assert ProcessGroup(world).run("train", folder=str(folder), fields=fields)[0]["resumed_from"] == reached
        assert_close(folder, straight)


@pytest.mark.soak
def test_an_error_of_one_ends_all_and_none_waits(tmp_path, trials):
    """Within a step the others wait to gather its shard, and no message can reach them there."""
    for rank, where in trials([(1, "part"), (0, "preview")], [(1, "part"), (0, "part"), (0, "preview")]):
        fields = {**SHARED, "name": f"{rank}{where}"}
        answers = ProcessGroup(2).run("fail", timeout=60, folder=str(tmp_path), fields=fields, rank=rank, where=where)
        assert answers[rank] == "KeyError"
        assert answers[1 - rank] == "PeerLostError"


@pytest.mark.slow
def test_memory_that_runs_out_in_a_step_ends_the_attempt(tmp_path):
    """The others are in the middle of the step. A process that repeats it alone would deadlock with them."""
    answers = ProcessGroup(2).run("fail", timeout=60, folder=str(tmp_path), fields=SHARED, rank=1, memory=1)
    assert answers == ["PeerLostError", "OutOfMemory"]


@pytest.mark.slow
@pytest.mark.parametrize("where, times", [("preview", 1), ("preview", 2), ("validation", 1)])
def test_memory_that_runs_out_where_one_works_alone_is_found(straight, tmp_path, where, times):
    failing = {"fields": SHARED, "rank": 0, "where": where, "memory": times}
    answers = ProcessGroup(2).run("fail", timeout=60, folder=str(tmp_path), **failing)
    assert answers[0] == answers[1]
    assert_close(tmp_path, straight)
    drawn = [line["step"] for line in log_of(tmp_path) if line["event"] == "sample"]
    # Tried twice, then left out.
    assert drawn == ([3, 6] if times == 2 else [0, 3, 6])
    validation = [dict(state_in(folder).validation) for folder in (tmp_path, straight)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-4)


def test_shards_and_offload_are_refused_together():
    with pytest.raises(SettingsError, match="shard is on and offload is on"):
        check_recipe(models.recipe("SD1", shard="on", offload="on"))


def test_a_pytorch_that_cannot_do_it_is_named(monkeypatch):
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.reset_iter_state")
    with pytest.raises(SettingsError, match="Set shard .* to off, or install a newer PyTorch"):
        fsdp.check_shards()


def test_alone_it_does_nothing_and_says_so(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run_session(tmp_path, steps=1, shard="on")
    assert "one process trains: it holds all weights" in caplog.text
