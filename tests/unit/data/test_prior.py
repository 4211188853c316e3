"""Tests of class images beside a subject: how they are added, how often they are visited, what stays unchanged."""

from collections import Counter
from dataclasses import replace
from itertools import islice, takewhile

import numpy as np
import pytest
from graft_pack.trainers.data import prior
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.captions import unvaried_caption
from graft_pack.trainers.data.examples import combine
from graft_pack.trainers.errors import DatasetError, SettingsError
from graft_pack.trainers.inspection import contact_sheet
from graft_pack.trainers.inspection import report as inspect
from graft_pack.trainers.preprocessing.sampler import batches_from, visits_within
from graft_pack.trainers.protocols import Geometry
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.batches import epoch_batches


def pictures(count, first=0):
    return [np.random.RandomState(first + n).randint(0, 255, (64, 64, 3)).astype(np.uint8) for n in range(count)]


def subject(count=3, trigger="sks", resolution=64, caption="a toy"):
    return from_arrays(pictures(count), [caption], trigger, resolution)


def classes(count=5, caption="a toy on a table", trigger="", resolution=0):
    return from_arrays(pictures(count, 100), [caption], trigger, resolution)


# Each sample is (bucket, repeats, is class image); at least one is not a class image.
ROWS = st.tuples(st.sampled_from([(64, 64), (96, 48), (48, 96)]), st.integers(1, 3))
GROUPS = st.tuples(st.lists(ROWS, min_size=1, max_size=9), st.lists(ROWS, min_size=1, max_size=12))


def columns(groups):
    rows = [(*row, False) for row in groups[0]] + [(*row, True) for row in groups[1]]
    return [list(column) for column in zip(*rows, strict=True)]


@settings(deadline=None)
@given(GROUPS, st.integers(1, 9), st.integers(0, 2**64 - 1), st.integers(0, 20))
def test_an_epoch_has_as_many_class_images_as_others_and_drops_none(groups, batch_size, seed, epoch):
    buckets, repeats, marks = columns(groups)
    batches = epoch_batches(buckets, repeats, batch_size, seed, epoch, marks)
    shown = Counter(index for batch in batches for index in batch)
    own = {index: times for index, times in enumerate(repeats) if not marks[index]}
    assert {index: shown[index] for index in own} == own
    assert sum(times for index, times in shown.items() if marks[index]) == sum(own.values())
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({buckets[index] for index in batch}) == 1


@settings(deadline=None)
@given(GROUPS, st.integers(1, 5), st.integers(0, 100), st.integers(1, 12))
def test_class_images_are_taken_in_turn_over_the_epochs(groups, batch_size, seed, epochs):
    """No class image repeats before all others were visited, repeats counted."""
    buckets, repeats, marks = columns(groups)
    batches = batches_from(0, buckets, repeats, batch_size, seed, marks)
    shown = Counter(index for _, batch in takewhile(lambda row: row[0] < epochs, batches) for index, _ in batch)
    deck = [index for index, mark in enumerate(marks) if mark]
    own = sum(times for times, mark in zip(repeats, marks, strict=True) if not mark)
    rounds = epochs * own // sum(repeats[index] for index in deck)
    for index in deck:
        assert rounds * repeats[index] <= shown[index] <= (rounds + 1) * repeats[index]


@settings(deadline=None)
@given(GROUPS, st.integers(1, 5), st.integers(0, 40))
def test_going_on_from_any_place_is_the_same_and_turns_count_showings(groups, batch_size, position):
    buckets, repeats, marks = columns(groups)
    straight = list(islice(batches_from(0, buckets, repeats, batch_size, 7, marks), position + 6))
    assert list(islice(batches_from(position, buckets, repeats, batch_size, 7, marks), 6)) == straight[position:]
    shown = Counter()
    for _, batch in straight:
        for index, turn in batch:
            assert turn == shown[index]
            shown[index] += 1
    bound = visits_within(len(straight), buckets, repeats, batch_size, marks)
    assert all(shown[index] <= bound[index] for index in range(len(buckets)))


@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_each_batch_of_one_bucket_is_half_and_half(batch_size):
    marks = [False] * 12 + [True] * 30
    for epoch in range(4):
        for batch in epoch_batches([(64, 64)] * 42, [1] * 42, batch_size, 3, epoch, marks):
            assert sum(marks[index] for index in batch) == len(batch) // 2


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 100))
def test_without_class_images_the_order_is_the_old_one(batch_size, epoch):
    buckets = [(64, 64), (96, 48), (64, 64), (48, 96), (64, 64)]
    old = epoch_batches(buckets, [1, 2, 1, 3, 1], batch_size, 5, epoch)
    assert epoch_batches(buckets, [1, 2, 1, 3, 1], batch_size, 5, epoch, [False] * 5) == old


def test_class_images_keep_their_captions_and_never_get_the_trigger():
    joined = prior.add_class_images(subject(), classes(), 0.5)
    own, others = joined.examples[:3], joined.examples[3:]
    assert [unvaried_caption(example) for example in own] == ["sks, a toy"] * 3
    assert [unvaried_caption(example) for example in others] == ["a toy on a table"] * 5
    assert [(one.prior, one.weight) for one in own] == [(False, 1.0)] * 3
    assert [(one.prior, one.weight) for one in others] == [(True, 0.5)] * 5
    assert (joined.trigger, joined.name, joined.resolution) == ("sks", "images", 64)


@pytest.mark.parametrize(
    "others", [classes(trigger="sks"), classes(caption="a photo of an SKS toy")], ids=["trigger", "caption"]
)
def test_a_class_image_that_calls_the_subject_up_is_refused(others):
    with pytest.raises(DatasetError, match="contains the subject's trigger 'sks'") as caught:
        prior.add_class_images(subject(), others, 1.0)
    assert caught.value.input == "class_dataset"


def test_another_resolution_is_refused_at_its_input():
    with pytest.raises(DatasetError, match="different resolutions") as caught:
        prior.add_class_images(subject(), classes(resolution=128), 1.0)
    assert caught.value.input == "class_dataset"


def test_weight_0_is_the_dataset_as_it_is():
    dataset = subject()
    assert prior.add_class_images(dataset, classes(), 0.0) is dataset
    assert prior.add_prior_target(dataset, "a toy", 0.0) is dataset
    with pytest.raises(SettingsError, match="prior weight"):
        prior.add_class_images(dataset, classes(), -1.0)


def test_what_the_loader_held_out_of_the_class_images_is_left_aside():
    others = classes()
    held = replace(others, examples=tuple(replace(one, held_out=n > 1) for n, one in enumerate(others.examples)))
    assert len(prior.add_class_images(subject(), held, 1.0).examples) == 3 + 2
    none = replace(others, examples=tuple(replace(one, held_out=True) for one in others.examples))
    with pytest.raises(DatasetError, match="no picture to train on"):
        prior.add_class_images(subject(), none, 1.0)


def test_a_dataset_without_class_images_keeps_its_fingerprint():
    """A literal value: a changed fingerprint would turn every existing run into a new one."""
    assert subject().fingerprint() == "b3cee18ea78a5609f8ca0a8b2ff0c090bfd486c735034157c275285f339ac869"


def test_weight_images_and_prompt_are_part_of_the_fingerprint():
    dataset = subject()
    made = [
        dataset,
        combine(dataset, classes()),
        prior.add_class_images(dataset, classes(), 1.0),
        prior.add_class_images(dataset, classes(), 0.5),
        prior.add_class_images(dataset, classes(6), 1.0),
        prior.add_prior_target(dataset, "a toy", 1.0),
        prior.add_prior_target(dataset, "a toy", 0.5),
        prior.add_prior_target(dataset, "a doll", 1.0),
        prior.add_prior_target(dataset, "a toy|a doll", 1.0, prior.SEVERAL),
        prior.add_prior_target(dataset, "a toy", 1.0, prior.BY_CAPTION),
    ]
    assert len({one.fingerprint() for one in made}) == len(made)


def test_a_single_class_prompt_keeps_the_fingerprint_of_its_runs():
    """A literal value of an earlier version."""
    targeted = prior.add_prior_target(subject(), "a toy", 1.0)
    assert targeted.fingerprint() == "03294801df6ec70c36bd09d8f6dccfd640fda786f8380cc4d05ca74fe0a615f1"
    assert prior.add_prior_target(subject(), "a toy", 1.0, prior.SEVERAL).fingerprint() == targeted.fingerprint()


@pytest.mark.parametrize(
    "text, prompts",
    [("a toy | a  doll", ("a toy", "a doll")), ("a toy|", ("a toy", "")), ("", ("",)), ("|", ("", ""))],
)
def test_several_class_prompts_are_read_between_bars(text, prompts):
    target = prior.add_prior_target(subject(), text, 1.0, prior.SEVERAL).examples[0].anchor
    assert prior.class_prompts(target, "sks toy on a table") == prompts


@pytest.mark.parametrize(
    "caption, prompt",
    [
        ("a photo of SKS toy, indoors", "a photo of a toy, indoors"),
        ("sks toyland and sks  toy", "sks toyland and a toy"),
        ("", "a toy"),
        ("sks toy with another sks toy", "a toy with another a toy"),
    ],
)
def test_the_class_prompt_of_a_caption_has_the_class_in_place_of_the_trigger(caption, prompt):
    dataset = from_arrays(pictures(1), [caption], "sks toy", 64)
    target = prior.add_prior_target(dataset, "a toy", 1.0, prior.BY_CAPTION).examples[0].anchor
    text = unvaried_caption(dataset.examples[0])
    assert prior.class_prompts(target, text) == (prompt,)
    # A dropped caption stays empty.
    assert prior.class_prompts(target, "") == ("",)


@pytest.mark.parametrize("trigger", ["", "olis"])
def test_a_caption_without_the_words_to_replace_is_refused(trigger):
    dataset = replace(from_arrays(pictures(1), ["my cat"], "", 64), trigger=trigger)
    with pytest.raises(DatasetError, match="'my cat' of .* does not contain") as caught:
        prior.add_prior_target(dataset, "a cat", 1.0, prior.BY_CAPTION)
    assert caught.value.input == "dataset"


def test_two_subjects_with_class_images_of_their_own_can_be_combined():
    one = prior.add_class_images(subject(), classes(), 1.0)
    other = prior.add_class_images(subject(4, "olis"), classes(6, "a cup"), 0.5)
    both = combine(one, other)
    assert Counter((example.prior, example.weight) for example in both.examples) == {
        (False, 1.0): 7,
        (True, 1.0): 5,
        (True, 0.5): 6,
    }


def test_only_bare_images_are_captioned_with_the_instance_prompt():
    bare = from_arrays(pictures(3), ["", "my own words", ""], "", 64)
    named = prior.captioned(bare, "a photo  of\nsks toy", "instance_prompt")
    assert [unvaried_caption(one) for one in named.examples] == [
        "a photo of sks toy",
        "my own words",
        "a photo of sks toy",
    ]
    with pytest.raises(SettingsError, match="is empty") as caught:
        prior.captioned(bare, "  ", "instance_prompt")
    assert caught.value.input == "instance_prompt"
    captioned = subject()
    assert prior.captioned(captioned, "", "instance_prompt") is captioned


def test_inspection_shows_class_images_as_such():
    dataset = prior.add_prior_target(prior.add_class_images(subject(), classes(), 0.5), "a toy", 2.0)
    findings = inspect.inspect(dataset, {0: Geometry(64, 16)}, None)
    report = inspect.report(findings)
    assert "3 pictures, 3 in an epoch" in report
    assert "Plus 5 class images, weight 0.5; an epoch shows 3 of them, in turn" in report
    assert "'a toy on a table'" in report
    assert "Prior target: the model's own prediction for 'a toy', weight 2." in report
    assert [row.example.prior for row in contact_sheet.chosen(findings)] == [False] * 3 + [True] * 5
    assert contact_sheet.contact_sheet(findings).ndim == 3
