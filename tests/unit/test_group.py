"""Tests of real process groups over gloo: they train as one process does, and losing a process costs a few steps."""

import random

import pytest
import torch
from graft_pack.trainers.distributed.group import rows_of
from graft_pack.trainers.errors import PeerLostError
from graft_pack.trainers.preprocessing.sampler import batches_from
from hypothesis import given
from hypothesis import strategies as st

from tests.support import kinds
from tests.support.diffusers_host import make_host, run_session, same_state
from tests.support.groups import FULL, WINDOWS, assert_close, gradients_of, log_of, state_in, state_steps
from tests.support.process_group import ProcessGroup, own_gradients


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 70))
def test_rows_are_dealt_evenly_and_each_once(sizes, world):
    shares = [rows_of(sizes, rank, world) for rank in range(world)]
    for number, size in enumerate(sizes):
        rows = [row for share in shares for row in range(size)[share[number]]]
        assert rows == list(range(size))
    counts = [sum(part.stop - part.start for part in share) for share in shares]
    assert max(counts) - min(counts) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 64),
    st.integers(0, 1000),
)
def test_an_epoch_shows_each_picture_as_often_as_it_should_whoever_shows_it(
    pictures, batch, accumulation, world, position
):
    """For any pictures with buckets and repeats, any batch size, any world size, and any resume position."""
    buckets, repeats = zip(*pictures, strict=True)
    source = batches_from(0, buckets, repeats, batch, 0)
    shown = {}
    # An epoch has at most as many batches as visits.
    drawn = [next(source) for _ in range(2 * sum(repeats) + accumulation)]
    for start in range(0, len(drawn) - accumulation + 1, accumulation):
        window = drawn[start : start + accumulation]
        sizes = [len(members) for _, members in window]
        for rank in range(world):
            for (epoch, members), rows in zip(window, rows_of(sizes, rank, world), strict=True):
                for index, _ in members[rows]:
                    shown.setdefault(epoch, []).append(index)
    whole = sorted(index for index, times in enumerate(repeats) for _ in range(times))
    epochs = [epoch for epoch in shown if epoch + 1 in shown]
    assert epochs
    assert all(sorted(shown[epoch]) == whole for epoch in epochs)
    resumed = batches_from(position % len(drawn), buckets, repeats, batch, 0)
    assert next(resumed) == drawn[position % len(drawn)]


@pytest.mark.soak
@pytest.mark.parametrize("fields", [{}, {"micro_batch": 1}], ids=["whole", "micro"])
def test_gradients_of_a_global_batch_are_those_of_one_process(fields, trials):
    for world in trials([2], [2, 3, 4]):
        for rank, (_, buckets) in enumerate(gradients_of(world, fields)):
            for window, (number, overlapped) in zip(WINDOWS, buckets, strict=True):
                rows = rows_of([len(members) for _, members in window], rank, world)
                is_idle = all(part.start == part.stop for part in rows)
                assert number > 5
                assert overlapped == (0 if is_idle else number)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["exact", "bf16"])
def test_sums_of_any_gradients_in_any_order_of_arrival(half, trials):
    for world in trials([3], [2, 3, 4]):
        answers = ProcessGroup(world).run("reduce", half=half)
        again = ProcessGroup(world).run("reduce", half=half)
        assert all(answer[0] == answers[0][0] for answer in (*answers, *again))
        sums = answers[0][0]
        assert sums.pop(2) is None
        parts = [own_gradients(rank) for rank in range(world)]
        for rank in range(1, world):
            parts[rank].insert(2, torch.zeros(1))
        for number, (values, strides) in enumerate(sums):
            own = torch.stack([part[number] for part in parts])
            # Each of N roundings to 8 bits.
            bound = own.abs().sum(0) * (world * 2**-8 if half else 1e-6)
            assert ((torch.tensor(values) - own.sum(0)).abs() <= bound).all()
            assert strides == ((1, 7) if number == 0 else tuple(own[0].contiguous().stride()))
        # A gradient that nobody has holds up the buckets behind it.
        assert all(0 < overlapped < number for _, counts in answers for number, overlapped in counts)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Return together(world), the folder of an uninterrupted run of so many processes."""
    made = {}

    def folder_of(world):
        if world not in made:
            made[world] = tmp_path_factory.mktemp(f"of{world}")
            assert None not in ProcessGroup(world).run("train", folder=str(made[world]), fields=FULL)
        return made[world]

    return folder_of


@pytest.mark.soak
def test_the_result_is_that_of_one_process(straight, together, trials):
    for world in trials([2], [2, 3, 4]):
        assert_close(together(world), straight)
        steps = [line["step"] for line in log_of(together(world)) if line["event"] == "step"]
        assert steps == [1, 2, 3, 4, 5, 6]
        kinds = [{line["event"] for line in log_of(folder)} for folder in (together(world), straight)]
        assert kinds[0] == kinds[1]


@pytest.fixture(scope="module")
def each_kind(tmp_path_factory):
    """Return the folder with one run of every kind, each trained by one process."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in kinds.FIELDS:
        host = make_host(text=kinds.text_of(name))
        run_session(folder / name, host=host, dataset=kinds.dataset_of(name), **kinds.fields_of(name))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"shard": "on"}], ids=["whole", "shards"])
def test_every_kind_of_training_gives_what_one_process_gives(fields, each_kind, tmp_path):
    """One process updates all weights within the backward; several processes update them after it."""
    names = [name for name in kinds.FIELDS if not (fields and name.startswith("all weights"))]
    answers = ProcessGroup(2).run("train_kinds", timeout=60, folder=str(tmp_path), names=names, fields=fields)
    assert None not in answers
    for name in names:
        assert_close(tmp_path / name, each_kind / name)
        # A text without the trained embedding has no gradient, nor has a process without a picture.
        assert name == "embedding" or all(any(answer[name][1]) for answer in answers), name


# (killed rank, place, event number): within a gradient, between two buckets, before and after the sums arrive, between
# steps.
DEATHS = [(1, "bucket", 20), (0, "summed", 4), (1, "sum", 3), (0, "report", 6), (0, "part", 4), (1, "summed", 1)]


@pytest.mark.soak
def test_a_process_is_killed_and_the_others_go_on_later_as_if_nothing_was(together, straight, tmp_path, trials):
    for number, death in enumerate(trials(DEATHS[:2], DEATHS)):
        folder = tmp_path / str(number)
        group = ProcessGroup(2)
        answers = group.run("train", folder=str(folder), fields=FULL, death=death)
        assert group.exitcodes[death[0]] == -9
        assert answers[death[0]] is None
        assert answers[1 - death[0]] == "PeerLostError"
        group.run("train", folder=str(folder), fields=FULL)
        assert same_state(state_in(folder), state_in(together(2))), death


@pytest.mark.soak
def test_resumed_by_fewer_or_more_processes(straight, tmp_path, trials):
    for world, other in trials([(2, 1)], [(2, 1), (2, 4), (4, 3), (3, 1)]):
        folder = tmp_path / f"{world}-{other}"
        # Nothing is saved before the end, except by the main process when it learns that another process is lost.
        unsaved = {**FULL, "save_every": 100}
        answers = ProcessGroup(world).run("train", folder=str(folder), fields=unsaved, death=(1, "part", 6))
        assert answers[0] == "PeerLostError"
        reached = max(state_steps(folder))
        if other == 1:
            assert run_session(folder, **FULL).resumed_from == reached
        else:
            assert ProcessGroup(other).run("train", folder=str(folder), fields=FULL)[0]["resumed_from"] == reached
        assert 0 < reached < 6
        assert_close(folder, straight)


IN_SHARDS = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "learning_rate": 1e-4}
IN_SHARDS |= {"max_grad_norm": 0.1, "shard": "on"}


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["LoRA", "all weights", "in shards", "embedding", "class images"])
def test_killed_at_random_moments_and_resumed_by_another_number(kind, tmp_path, trials):
    """The last save counts, whatever was going on. Textual inversion is `embedding`, DreamBooth `class images`."""
    if not (count := trials(0, 20)):
        pytest.skip("`make soak` kills every kind")
    source = random.Random(kind)
    fields = {**FULL, **(IN_SHARDS if kind == "in shards" else kinds.FIELDS[kind])}
    kind = kind if kind in kinds.FIELDS else "all weights"
    folder = tmp_path / "straight"
    whole = {**fields, "shard": "off"}
    run_session(folder, host=make_host(text=kinds.text_of(kind)), dataset=kinds.dataset_of(kind), **whole)
    told, moments = {"kind": kind, "fields": fields}, {}
    for world in (1, 2, 3):
        answers = ProcessGroup(world).run("train", folder=str(tmp_path / str(world)), **told)
        moments[world] = [answer["moments"] for answer in answers]
    starts = []
    for number in range(count):
        world, other = source.sample([1, 2, 3], 2)
        rank = source.randrange(world)
        death = (rank, "any", source.randint(1, moments[world][rank]))
        place = tmp_path / f"killed{number}"
        group = ProcessGroup(world)
        group.run("train", folder=str(place), death=death, **told)
        if group.exitcodes[rank] == 0:
            # It came to fewer moments: another process has written some of its cached files.
            assert_close(place, folder)
            continue
        assert group.exitcodes[rank] == -9, death
        answers = ProcessGroup(other).run("train", folder=str(place), **told)
        assert None not in answers, death
        starts.append((world, other, answers[0]["resumed_from"]))
        assert_close(place, folder)
    print(f"{len(starts)} of {count} (processes, then processes, from step): {starts}")
    assert len(starts) >= 0.8 * count


@pytest.mark.slow
def test_an_error_of_one_ends_all_and_none_waits(tmp_path):
    answers = ProcessGroup(2).run("fail", folder=str(tmp_path), fields={**FULL, "preview_prompts": ()}, rank=1)
    assert answers == ["PeerLostError", "KeyError"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_who_has_no_room_for_the_messages_ends_all_and_none_waits(tmp_path, rank):
    fields = {**FULL, "preview_prompts": ()}
    failing = {"fields": fields, "rank": rank, "where": "bucket", "memory": 1000, "after": 3}
    answers = ProcessGroup(2).run("fail", timeout=60, folder=str(tmp_path), **failing)
    assert (answers[rank], answers[1 - rank]) == ("OutOfMemory", "PeerLostError")


@pytest.mark.slow
@pytest.mark.parametrize("world, after", [(2, 0), (3, 4)])
def test_memory_that_runs_out_between_two_buckets_costs_no_step(straight, tmp_path, world, after):
    """The process computes the step again. The sums of the buckets that it has sent stay."""
    failing = {"fields": FULL, "rank": 1, "where": "bucket", "memory": 2, "after": after}
    answers = ProcessGroup(world).run("fail", timeout=60, folder=str(tmp_path), **failing)
    assert answers[0] == answers[1]
    assert_close(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 3])
def test_an_error_between_two_buckets_ends_all_and_none_waits(tmp_path, after):
    failing = {"fields": {**FULL, "preview_prompts": ()}, "rank": 1, "where": "bucket", "after": after}
    answers = ProcessGroup(3).run("fail", timeout=60, folder=str(tmp_path), **failing)
    assert answers == ["PeerLostError", "KeyError", "PeerLostError"]


@pytest.mark.slow
@pytest.mark.parametrize("late", [[0], [1]], ids=["main", "other"])
def test_processes_that_start_again_do_not_look_for_those_before_the_restart(late):
    group = ProcessGroup(2)
    first = group.run("reduce", timeout=60)
    assert group.exitcodes == [0, 0]
    assert group.run("reduce", timeout=60, late=late) == first
    assert group.exitcodes == [0, 0]


@pytest.fixture
def spread_alone():
    """Return the group of a single process."""
    from graft_pack.trainers.distributed.accelerate_group import AccelerateGroup

    group = AccelerateGroup(cpu=True)
    assert group.world_size == 1
    return group


def test_alone_no_message_is_made_which_some_devices_could_not_hold(spread_alone):
    """Apple's devices have no float64; `meta` tensors have no values to read at all."""
    spread_alone.device = torch.device("meta")
    assert spread_alone.all_reduce(0.1) == 0.1
    assert spread_alone.gather([0.1, 0.2], 2) == [0.1, 0.2]
    spread_alone.abort()


def test_who_leaves_shows_why_where_the_others_are_gone_already(spread_alone, monkeypatch):
    def broken(tensor, reduction):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("accelerate.utils.reduce", broken)
    spread_alone.world_size = 2
    with pytest.raises(KeyError, match="why"):
        try:
            raise KeyError("why")
        except KeyError:
            spread_alone.abort()
            raise


@pytest.mark.parametrize(
    "ask",
    [
        lambda group: group.all_reduce(),
        lambda group: group.gather([1.0], 2),
        lambda group: group.broadcast_text(""),
        lambda group: group.broadcast([torch.zeros(1)]),
        lambda group: group.reducer([torch.nn.Parameter(torch.zeros(1))]).begin(),
    ],
    ids=["meet", "gather", "tell", "share", "sum_gradients"],
)
def test_a_broken_connection_is_said_alike_wherever_it_is_found(spread_alone, monkeypatch, ask):
    def broken(*given):
        raise RuntimeError("Connection closed by peer")

    for name in ("reduce", "broadcast"):
        monkeypatch.setattr(f"accelerate.utils.{name}", broken)
    spread_alone.world_size = 2
    with pytest.raises(PeerLostError):
        ask(spread_alone)


def test_what_ends_an_attempt_says_what_to_do():
    assert "start the training again" in str(PeerLostError()).lower()
