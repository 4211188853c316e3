"""Tests of captions: triggers, and caption variants from one visit to the next."""

import math
import re
import time
from collections import Counter

import numpy as np
import pytest
from graft_pack.trainers.data import captions
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.examples import Augmentation, Example
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.rng import stream_seed
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

TAGS = tuple(f"tag {letter}" for letter in "abcdefghij")


def example(caption, trigger="", digest="0", **handling):
    texts = (caption,) if isinstance(caption, str) else tuple(caption)
    return Example(None, texts, (64, 64), digest, trigger, handling=Augmentation(**handling))


def bounds(n, p):
    """Return six standard deviations around a binomial's mean: one test in half a billion fails by chance."""
    spread = 6 * math.sqrt(n * p * (1 - p))
    return n * p - spread, n * p + spread


@pytest.mark.parametrize(
    "caption, trigger, expected",
    [
        ("a cat", "sks", "sks, a cat"),
        ("", "sks", "sks"),
        ("a cat", "", "a cat"),
        ("", "", ""),
        ("a sks cat", "sks", "a sks cat"),
        ("a SKS cat", "sks", "a SKS cat"),
        ("many skss", "sks", "sks, many skss"),
        ("a big red toy", "big red", "a big red toy"),
        ("photo of [trigger], smiling", "sks", "photo of sks, smiling"),
        ("photo of [trigger]", "", "photo of"),
        ("c++ (lang)", "c++", "c++ (lang)"),
    ],
)
def test_the_trigger_is_put_in_front_of_what_lacks_it(caption, trigger, expected):
    assert captions.with_trigger(caption, trigger) == expected
    assert captions.unvaried_caption(example(caption, trigger)) == expected
    assert captions.make_variant(example(caption, trigger), 0) == expected


HOLDS = [
    ("\u516c\u5712\u306b\u82b1\u5b50\u304c\u3044\u308b", "\u82b1\u5b50", "Japanese, within a sentence"),
    ("\u516c\u5712\u306bsks\u304c\u3044\u308b", "sks", "Latin within Japanese"),
    ("\u4e00\u53ea\u5c0f\u732b\u5728\u5bb6", "\u5c0f\u732b", "Chinese"),
    ("sks\u72ac", "sks", "Latin before Chinese"),
    ("\u732bsks", "\u732b", "Chinese before Latin"),
    ("\uacf5\uc6d0\uc758 \ubbf8\ub098\ub294 \uc6c3\ub294\ub2e4", "\ubbf8\ub098", "Korean with a particle"),
    ("\u0e20\u0e32\u0e1e\u0e41\u0e21\u0e27\u0e19\u0e2d\u0e19", "\u0e41\u0e21\u0e27", "Thai"),
    ("a photo of Zoe\u0308, red", "zo\u00eb", "accent apart in the caption"),
    ("a photo of zo\u00eb", "Zoe\u0308", "accent apart in the trigger"),
    ("a\U0001f431b", "\U0001f431", "emoji"),
    ("a my-dog-like", "my-dog", "hyphen behind"),
    ("\uff08sks\uff09", "sks", "wide brackets"),
]
LACKS = [
    ("my_dog_2", "my_dog", "underscore"),
    ("a2sks", "sks", "digit before"),
    ("zoe\u0308", "zoe", "another letter by its accent"),
    ("caf\u00e9s", "caf\u00e9", "letter behind"),
    ("\u0e41\u0e21\u0e48", "\u0e41\u0e21", "Thai vowel or tone that belongs to it"),
    ("\U0001f469\u200d\U0001f3a8", "\U0001f469", "part of a joined emoji"),
    ("\U0001f469\u200d\U0001f3a8", "\U0001f3a8", "end of a joined emoji"),
    ("\u0915\u093f\u0924\u093e\u092c", "\u0915", "Devanagari letter with its vowel"),
    ("\u0440\u043e\u0437\u044b", "\u0440\u043e\u0437", "Cyrillic"),
]


@pytest.mark.parametrize("caption, trigger", [row[:2] for row in HOLDS], ids=[row[2] for row in HOLDS])
def test_trigger_is_found_in_every_script(caption, trigger):
    assert captions.with_trigger(caption, trigger) == caption


@pytest.mark.parametrize("caption, trigger", [row[:2] for row in LACKS], ids=[row[2] for row in LACKS])
def test_part_of_a_word_is_no_trigger(caption, trigger):
    assert captions.with_trigger(caption, trigger) == f"{trigger}, {caption}"


@given(
    st.lists(st.sampled_from(TAGS), min_size=1, max_size=10, unique=True),
    st.integers(0, 12),
    st.sampled_from(["", "sks", "tag c"]),
    st.integers(0, 1000),
)
def test_shuffling_keeps_every_tag_the_first_ones_in_place(tags, keep, trigger, number):
    caption = ", ".join(tags)
    found = captions.make_variant(example(caption, trigger, shuffle_tags=True, keep_tokens=keep), number).split(", ")
    added = [trigger] if trigger and trigger not in tags else []
    assert found[: len(added)] == added, "the trigger stays in front"
    rest = found[len(added) :]
    assert rest[:keep] == tags[:keep]
    assert sorted(rest) == sorted(tags)


def test_shuffling_reaches_every_order_about_equally_often():
    seen = Counter(captions.make_variant(example("a, b, c", shuffle_tags=True), number) for number in range(3000))
    assert len(seen) == 6
    low, high = bounds(3000, 1 / 6)
    assert all(low <= count <= high for count in seen.values()), seen


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_tags_are_dropped_as_often_as_asked_and_kept_ones_never(rate):
    caption = ", ".join(TAGS)
    made = example(caption, "sks", tag_dropout=rate, keep_tokens=3)
    gone = Counter()
    for number in range(2000):
        found = captions.make_variant(made, number).split(", ")
        assert found[:4] == ["sks", *TAGS[:3]]
        assert found[4:] == [tag for tag in TAGS[3:] if tag in found], "those that stay keep their order"
        gone.update(set(TAGS) - set(found))
    low, high = bounds(2000, rate)
    assert all(low <= gone[tag] <= high for tag in TAGS[3:]), gone
    # Tags are dropped independently: two of them are dropped together as often as chance predicts.
    pairs = sum(not {TAGS[3], TAGS[4]} & set(captions.make_variant(made, number).split(", ")) for number in range(2000))
    low, high = bounds(2000, rate**2)
    assert low <= pairs <= high


def test_a_tag_with_the_trigger_is_never_dropped():
    made = example("1girl, sks dog, hat", "sks", tag_dropout=1.0, shuffle_tags=True)
    assert {captions.make_variant(made, number) for number in range(20)} == {"sks dog"}


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_captions_are_dropped_as_often_as_asked(rate):
    made = example(["one", "two"], caption_dropout=rate)
    drawn = [captions.variant_of_visit(made, 2, 7, "0", turn) for turn in range(3000)]
    low, high = bounds(3000, rate)
    assert low <= drawn.count(None) <= high
    kept = [number for number in drawn if number is not None]
    assert not kept or abs(kept.count(0) - kept.count(1)) <= 200


@given(st.integers(1, 9), st.integers(0, 5))
def test_every_version_is_shown_once_before_one_is_shown_again(count, seed):
    made = example("x")
    for cycle in range(3):
        turns = range(cycle * count, (cycle + 1) * count)
        assert sorted(captions.variant_of_visit(made, count, seed, "0", turn) for turn in turns) == list(range(count))


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a {red|green} ball", {"a red ball", "a green ball"}),
        ("{a|{b|c}} d", {"a d", "b d", "c d"}),
        ("{|big }dog", {"dog", "big dog"}),
        ("{x} and {", {"{x} and {"}),
    ],
)
def test_wildcards_become_one_of_their_parts(caption, expected):
    made = example(caption, wildcards=True)
    assert {captions.make_variant(made, number) for number in range(100)} == expected
    assert captions.make_variant(example(caption), 3) == caption, "only where they are switched on"


def reference_of_wildcards(caption, draw):
    """Resolve wildcards by their definition: all innermost ones at once, left to right, until none is left."""
    while True:
        chosen = lambda match: (parts := match.group(1).split("|"))[draw.randint(len(parts)) if draw else 0]  # noqa: E731
        found = re.sub(r"\{([^{}]*\|[^{}]*)\}", chosen, caption)
        if found == caption:
            return " ".join(found.split())
        caption = found


@settings(max_examples=400)
@given(st.text(alphabet="{}|ab ", max_size=25), st.integers(0, 3))
@case("{a|{b|c}} {d|e}", 0)
@case("{a|{b}|c} {d|}", 1)
def test_wildcards_are_drawn_innermost_first_from_left_to_right(caption, number):
    made = example(caption, wildcards=True)
    assert captions.unvaried_caption(made) == reference_of_wildcards(caption, None)
    # Runs share the encodings of captions, so the draw must stay the same from version to version.
    draw = np.random.RandomState(stream_seed("caption", made.digest, made.captions, number) % 2**32)
    assert captions.make_variant(made, number) == reference_of_wildcards(caption, draw)


@pytest.mark.parametrize(
    "caption",
    [
        "{" + "|" * 9999,
        "{|" * 5000,
        "{|" * 3333 + "}" * 3333,
        "{" * 5000 + "}" * 5000,
        "{a|b}" * 2000,
        "{a|" * 2500 + "}" * 2500,
    ],
)
def test_wildcards_without_end_are_read_soon(caption):
    """Such captions once took minutes; now they take a tenth of a second."""
    started = time.process_time()
    captions.make_variant(example(caption, wildcards=True), 0)
    assert time.process_time() - started < 10


def test_lines_take_turns():
    made = example(["one", "two", "three"], "sks")
    assert captions.variant_count(made, 1) == 3
    assert [captions.make_variant(made, number) for number in range(3)] == ["sks, one", "sks, two", "sks, three"]


def test_a_small_dataset_gets_many_versions_and_a_large_one_few():
    varying = example("a, b", shuffle_tags=True)
    assert captions.variant_count(varying, 1) == 64
    assert captions.variant_count(varying, 100) == 20
    assert captions.variant_count(varying, 10_000) == 4
    assert captions.variant_count(example("a, b", shuffle_tags=True, caption_variants=7), 1) == 7
    assert captions.variant_count(example("a b", shuffle_tags=True), 1) == 1, "nothing to shuffle"


@pytest.mark.parametrize("field", ["tag_dropout", "caption_dropout", "mask_minimum"])
def test_a_chance_outside_of_its_range_is_refused(field):
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(DatasetError, match=field):
            Augmentation(**{field: value})


def test_texts_on_a_wire_may_be_variants_by_line():
    import numpy as np

    pictures = [np.zeros((64, 64, 3), np.uint8)]
    assert from_arrays(pictures, ["one\ntwo"], "", 0).examples[0].captions == ("one two",)
    made = from_arrays(pictures, ["one\n\ntwo"], "", 0, lines_are_variants=True)
    assert made.examples[0].captions == ("one", "two")
