"""Tests of patterns: they match as Python's own `re` does, and no pattern or file makes matching slow."""

import json
import re
import warnings

import numpy as np
import pytest
from graft_pack.trainers import regex
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.formats.adapter import load_adapter
from graft_pack.trainers.methods.targets import check_pairs, matches, value_for
from graft_pack.trainers.recipe.parsing import parse_pairs, parse_patterns
from graft_pack.trainers.regex import Budget, PatternError, Patterns, regex_problem
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.malformed import safetensors

PATH = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
# A backtracking matcher doubles its time with each repeat in these.
EXPLOSIVE = [
    ".?" * 40 + "!",
    ".{0,9}" * 20,
    ".{0,9}" * 20 + "!",
    ".??" * 40 + "!",
    "(?:a|.|)(?:b|.|)" * 12 + "!",
    "(a+)+b",
    "(a|aa)*b",
    "((a*)b?)*c",
    "(?:a{1,9}){1,9}c",
    ".*.*.*.*.*.*.*.*!",
    "(?:.*a){12}!",
    "(.?|.?){99}!",
    "(?:(?:(?:a?)?)?)*" * 9 + "!",
    "(?i)(?:A|a|[aA])*b",
]
PIECES = st.sampled_from(
    ["a", "b", "1", "_", "A", ".", r"\.", "[ab]", "[^a]", "[A-Z]", r"[\d.]", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S"]
    + ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{,2}?", "(", "(?:", "(?i:", "(?P<n>", "|", ")", "()"]
    + ["^", "$", r"\A", r"\Z", r"\b", r"\n", "(?i)", "(?s)"]
)
TEXTS = ["", "a", "A", "ab", "aab", "1a2", "a.b", "_a b", "a\n", "\n", "b1\n\n", "A1b", "bb.a", "abab12"]


@settings(max_examples=400)
@given(st.lists(PIECES, max_size=9).map("".join))
@example(r"\bab\b|1$")
@example("(a|ab)(c|bcd)?$")
def test_patterns_match_as_re_does(pattern):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            search, whole = re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")
        except re.error:
            return
        if "possessive" in regex_problem(pattern):
            return
        for text in TEXTS:
            assert (Patterns([pattern]).first(text) == 0) == (search.search(text) is not None)
            assert (Patterns([pattern], whole=True).first(text) == 0) == (whole.match(text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "attn2",
        "middle_block",
        r"input_blocks\.\d+\.1",
        ".*attn.*to_[qk].*",
        "^(down|up|input)_blocks",
        r"blocks\.(?:[0-9]|1[0-2])\.",
        r"norm\d?$",
        r"proj_(in|out)$",
        r"(?i)ATTN1\.TO_Q",
        r"\battn1\b",
        "a{2}",
        ".*.*.*.*.*",
        "(attn1|attn2)+",
        r"(transformer_blocks\.\d+\.?)+attn",
    ],
)
def test_usual_patterns_match_as_re_does(pattern):
    assert regex_problem(pattern) == ""
    for path in (PATH, "up_blocks.0.attentions.2.norm1", "single_blocks.37.linear1", "mid.proj_out"):
        assert matches(path, (pattern,)) == (re.search(pattern, path) is not None)


@pytest.mark.parametrize("pattern", EXPLOSIVE)
def test_work_grows_with_the_text_alone(pattern):
    """Counted in states, not in seconds."""
    looked_at = []
    for length in (60, 120):
        budget = Budget(10**9)
        patterns = Patterns([pattern], budget=budget)
        for number in range(3):
            patterns.first("a" * length + str(number))
        looked_at.append(10**9 - budget.left)
    assert looked_at[1] < 2.5 * looked_at[0] < 2.5 * 60 * 1000


@pytest.mark.parametrize(
    "pattern, reason",
    [
        ("(", "not a regular expression"),
        ("a" * 301, "longer than 300"),
        ("attn(?!2)", "look-around"),
        ("(?<=a)b", "look-around"),
        ("(?!)", "look-around"),
        (r"(a)\1", "backreference"),
        (r"(a)?(?(1)b|c)", "condition on a group"),
        ("(?m)^a", "flag"),
        ("(?:a{99}){99}", "more than 1000 states"),
        ("(?:){4000000000}", "more than 1000 states"),
        ("a{0,4000000000}", "more than 1000 states"),
        ("(" * 150 + ")" * 150, ""),
    ],
)
def test_refused_patterns_say_why(pattern, reason):
    assert reason in regex_problem(pattern)
    if reason:
        for parse in (
            lambda: parse_patterns(pattern, "target_patterns"),
            lambda: parse_pairs(f"{pattern}=4", int, 0, 4096, "block_ranks"),
        ):
            with pytest.raises(SettingsError, match=reason) as error:
                parse()
            assert error.value.input


def test_first_pair_that_fits_counts():
    pairs = (("middle", 1), (r"attn1\.to_q", 2), ("attn1", 3))
    assert value_for(PATH, pairs, 9) == 2
    assert value_for(PATH.replace("to_q", "to_k"), pairs, 9) == 3
    assert value_for("out.2", pairs, 9) == 9
    assert value_for(PATH, (), 9) == 9
    with pytest.raises(SettingsError, match="'middle' of block_ranks matches no layer's path"):
        check_pairs(pairs, [PATH], "block_ranks")


def test_many_costly_patterns_at_once_are_refused():
    patterns = tuple(".?" * 90 + f"!{number}" for number in range(200))
    with pytest.raises(PatternError, match="too many ways at once"):
        matches("a" * 100, patterns)


WANDERING = [f"(?:a|[a-y]{{0,9}}){{0,9}}[a-y]*z{number}" for number in range(4)]


def test_searches_share_one_budget(monkeypatch):
    budget = Budget(5000)
    Patterns(WANDERING, budget=budget).first("a" * 5)
    with pytest.raises(PatternError, match="too many ways at once"):
        Patterns(WANDERING, budget=budget).first("a" * 60)
    path = "a" * 60 + "z0z1z2z3"
    budget = Budget()
    Patterns(WANDERING[:1], budget=budget).first(path)
    monkeypatch.setattr(regex, "_MOST_VISITED", int(1.5 * (Budget().left - budget.left)))
    check_pairs([(WANDERING[0], 4)], [path], "block_ranks")
    with pytest.raises(SettingsError, match="too many ways at once") as error:
        check_pairs([(pattern, 4) for pattern in WANDERING], [path], "block_ranks")
    assert error.value.input == "block_ranks"


def test_all_patterns_of_a_file_share_one_budget(tmp_path, monkeypatch):
    keys = dict.fromkeys(WANDERING, 2)
    one = adapter_with(tmp_path / "one.safetensors", ["mid_block." + "a" * 60], rank_pattern=keys)
    both = adapter_with(tmp_path / "both.safetensors", ["mid_block." + "a" * 60], rank_pattern=keys, alpha_pattern=keys)
    budget = Budget()
    Patterns(WANDERING, whole=True, budget=budget).first("mid_block." + "a" * 60)
    monkeypatch.setattr(regex, "_MOST_VISITED", int(1.5 * (Budget().left - budget.left)))
    assert load_adapter(one).native.scales
    with pytest.raises(ModelError, match="too many ways at once"):
        load_adapter(both)


def adapter_with(path, places, **config):
    """Write a file in diffusers' layout with some layers and a configuration."""
    tensors = {}
    for place in places:
        tensors[f"unet.{place}.lora_A.weight"] = np.ones((4, 8))
        tensors[f"unet.{place}.lora_B.weight"] = np.ones((8, 4))
    described = {f"unet.{name}": value for name, value in {"r": 4, "lora_alpha": 4, **config}.items()}
    path.write_bytes(safetensors(tensors, {"lora_adapter_metadata": json.dumps(described)}))
    return str(path)


@pytest.mark.parametrize("pattern", EXPLOSIVE)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_costly_patterns_in_files_are_harmless(tmp_path, pattern, name):
    path = adapter_with(tmp_path / "a.safetensors", ["mid_block." + "a" * 60 + "c"], **{name: {pattern: 2}})
    assert load_adapter(path).native.scales


def test_rank_patterns_are_read_as_peft_reads_them(tmp_path):
    places = [f"mid_block.attentions.{number}.{name}" for number in range(3) for name in ("to_q", "to_k", "xto_q")]
    keys = {"to_k": 2, "attentions.0.to_q": 8, r"attentions\.[12]\.(to_q|to_v)": 16, ".*xto_q": 1}
    scales = load_adapter(adapter_with(tmp_path / "a.safetensors", places, rank_pattern=keys)).native.scales
    for place in places:
        rank = next(value for key, value in keys.items() if re.match(rf"(.*\.)?({key})$", place))
        assert scales[place] == 4 / rank


def test_key_for_each_layer_is_read(tmp_path):
    places = [f"mid_block.blocks.{number}.attn1.to_q" for number in range(100)]
    keys = {place: number + 1 for number, place in enumerate(places)}
    path = adapter_with(tmp_path / "a.safetensors", places, rank_pattern=keys, alpha_pattern=keys)
    assert set(load_adapter(path).native.scales.values()) == {1.0}


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"(?!a)b": 2}, r"rank_pattern of the adapter '.*' cannot be used. The key '\(\?!a\)b' contains look-around"),
        ({".?" * 90 + f"!{number}": 2 for number in range(20)}, "too many ways at once"),
        ({"a" * 290 + f"{number}": 2 for number in range(300)}, "is one pattern too many"),
    ],
)
def test_unusable_rank_patterns_in_files_are_named(tmp_path, monkeypatch, keys, says):
    path = adapter_with(tmp_path / "a.safetensors", ["mid_block." + "a" * 90], rank_pattern=keys)
    monkeypatch.setattr(regex, "_MOST_TOGETHER", 20_000)
    monkeypatch.setattr(regex, "_MOST_LIVE", 500)
    with pytest.raises(ModelError, match=says):
        load_adapter(path)
