"""Tests of the loss by picture: relative to the noise level, constant memory, the same values after a resume."""

import json
import math
import random
from dataclasses import replace

import pytest
from graft_pack.trainers.runs import records
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.runs.loss_by_picture import HARDEST, MEMORIZED, LossByPicture
from graft_pack.trainers.runs.loss_by_timestep import LossByTimestep

from tests.support.diffusers_host import make_dataset, run_session, same_state, state_of
from tests.unit.test_resume import Cancelled, Stopper

# Each picture is seen ten times before the last report.
FIELDS = {"steps": 50, "batch_size": 2, "save_every": 10, "learning_rate": 1e-3, "on_existing": "resume"}


def filled(factors, visits=200):
    """Return the losses of pictures that differ by a factor, at noise levels whose usual losses differ far more."""
    draw = random.Random(0)
    kept, usual = LossByPicture(), LossByTimestep()
    for step in range(1, visits + 1):
        times = [draw.random() for _ in factors]
        losses = [factor * 10 ** (-3 * int(20 * t) / 20) for factor, t in zip(factors.values(), times, strict=True)]
        kept.add(list(factors), times, losses, usual)
        usual.add(step, times, losses)
    return kept


def test_pictures_are_ranked_whatever_noise_they_had():
    factors = {"a": 1.0, "hard": 1.5, "b": 1.0, "c": 1.0, "easy": 0.7, "d": 1.0, "e": 1.0, "f": 1.0}
    marked = filled(factors).marked()
    assert next(iter(marked)) == "hard" and list(marked)[-1] == "easy"
    assert {name: mark for name, (_, mark) in marked.items() if mark} == {"hard": HARDEST, "easy": MEMORIZED}
    assert {name: loss for name, (loss, _) in marked.items()} == pytest.approx(factors, rel=0.05)


def test_a_picture_that_was_seldom_seen_has_no_mark():
    assert {mark for _, mark in filled({"a": 1.0, "b": 1.0, "c": 9.0, "d": 1.0}, visits=9).marked().values()} == {""}
    assert LossByPicture().marked() == {}


def test_the_mean_forgets_visits_of_long_ago():
    usual = LossByTimestep()
    usual.add(1, [0.5], [1.0])
    kept = LossByPicture()
    for loss in [8.0] * 50 + [1.0] * 150:
        kept.add(["a"], [0.5], [loss], usual)
    visits, mean = kept.rows["a"]
    assert visits == 200 and 1.0 < mean < 1.1


def test_what_cannot_be_compared_is_left_out():
    usual = LossByTimestep()
    usual.add(1, [0.5], [1.0])
    kept = LossByPicture()
    kept.add(["a", "b", None, "c"], [0.5, 0.9, 0.5, 0.5], [math.nan, 1.0, 1.0, 2.0], usual)
    assert kept.rows == {"c": (1, 2.0)}


@pytest.mark.parametrize(
    "value", [None, [], {"a": 1.0}, {"a": [1]}, {"a": [0, 1.0]}, {"a": [1, -1.0]}, {"a": [1.5, 1.0]}, {"a": [1, "x"]}]
)
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="picture"):
        LossByPicture.of_json(value)


def test_it_comes_back_from_json_to_the_bit():
    kept = filled({"a": 1.0, "b": 1.3})
    assert LossByPicture.of_json(json.loads(json.dumps(kept.as_json()))) == kept


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return (folder, events, result) of an uninterrupted run."""
    folder, watcher = tmp_path_factory.mktemp("straight"), Stopper()
    return folder, watcher.events, run_session(folder, watcher, **FIELDS)


def test_a_run_counts_each_visit_once(straight):
    _, _, result = straight
    visits = [visits for visits, _ in result.loss_by_picture.rows.values()]
    # A visit whose noise level is the first of its bucket has nothing to compare with: 20 buckets, two visits a step.
    assert len(visits) == 6 and 100 - 2 * 20 <= sum(visits) < 100
    assert result.loss_by_picture == state_of(result).loss_by_picture
    assert records.read_loss_by_picture(result.run) == result.loss_by_picture


def test_resumed_anywhere_it_has_the_same_bits(straight, tmp_path):
    _, events, expected = straight
    with pytest.raises(Cancelled):
        run_session(tmp_path, Stopper(len(events) // 2), **FIELDS)
    result = run_session(tmp_path, **FIELDS)
    assert result.resumed_from > 0 and same_state(state_of(result), state_of(expected))
    assert result.loss_by_picture == expected.loss_by_picture


def test_neither_micro_batches_nor_accumulation_mix_up_the_pictures(tmp_path):
    """Two batches of three in two passes each: the same pictures, draws and losses as by one pass each."""
    fields = {"steps": 6, "batch_size": 3, "accumulation": 2, "learning_rate": 1e-9}
    whole = run_session(tmp_path / "whole", **fields).loss_by_picture.rows
    split = run_session(tmp_path / "split", micro_batch=2, **fields).loss_by_picture.rows
    assert whole.keys() == split.keys() and len(whole) == 6
    for name, (visits, mean) in whole.items():
        assert split[name][0] == visits and split[name][1] == pytest.approx(mean, rel=1e-4)


def test_class_images_do_not_count(tmp_path):
    dataset = make_dataset(6)
    examples = [replace(example, prior=place > 3) for place, example in enumerate(dataset.examples)]
    result = run_session(tmp_path, dataset=replace(dataset, examples=tuple(examples)), steps=20, batch_size=2)
    own = {example.source.name for example in examples[:4]}
    assert result.loss_by_picture.rows.keys() == own


def test_a_run_without_it_is_refused_by_name(tmp_path):
    result = run_session(tmp_path, steps=1)
    with pytest.raises(ValueError, match="has no loss by picture"):
        records.read_loss_by_picture(result.run)


def test_a_dataset_has_the_losses_of_the_last_run_on_it(straight):
    folder, _, result = straight
    folders = Folders(*(str(folder / name) for name in ("runs", "cache", "loras", "emb")))
    name = make_dataset().name
    assert records.last_loss_by_picture(folders, name) == (result.run.name, result.loss_by_picture)
    # A later run on this and another dataset counts, one without any loss and one on another dataset do not.
    both = replace(make_dataset(), name=f"other+{name}")
    later = run_session(folder, dataset=both, **{**FIELDS, "steps": 30, "name": "later"})
    run_session(folder, dataset=make_dataset(), steps=1, name="short")
    run_session(folder, dataset=replace(make_dataset(), name=f"{name}2"), **{**FIELDS, "steps": 29, "name": "other"})
    assert records.last_loss_by_picture(folders, name) == (later.run.name, later.loss_by_picture)
    assert records.last_loss_by_picture(folders, "nothing") == ("", LossByPicture())
