"""Tests of the cache between steps: it stays within its budget and never returns another key's value."""

import pytest
import torch
from graft_pack.trainers.preprocessing.lru_cache import LRUCache
from hypothesis import given
from hypothesis import strategies as st


def value(number, size):
    return {"a": torch.full((size,), number, dtype=torch.uint8), "b": torch.zeros(size, dtype=torch.float16)}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60), st.integers(1, 300))
def test_what_is_kept_stays_within_the_budget_and_is_the_keys_own(asked, budget):
    sizes = {}
    keep = LRUCache(budget)
    for number, size in asked:
        size = sizes.setdefault(number, size)
        found = keep.get(str(number), lambda number=number, size=size: value(number, size))
        assert torch.equal(found["a"], value(number, size)["a"])
        held = sum(tensor.nbytes for kept in keep._values.values() for tensor in kept.values())
        assert held == keep._bytes
        assert held <= budget or len(keep._values) == 1, "one value is kept whatever its size"


def test_the_one_used_longest_ago_makes_room():
    keep = LRUCache(budget=3 * 10)
    made = []

    def get(name):
        keep.get(name, lambda: made.append(name) or {"": torch.zeros(10, dtype=torch.uint8)})

    for name in "abcabda":
        get(name)
    assert made == list("abcd"), "c made room for d"
    get("c")
    assert made == list("abcdc")


def test_what_cannot_be_made_is_not_kept():
    keep = LRUCache(100)
    with pytest.raises(ZeroDivisionError):
        keep.get("a", lambda: 1 / 0)
    assert keep.get("a", lambda: value(1, 2))["a"].tolist() == [1, 1]
