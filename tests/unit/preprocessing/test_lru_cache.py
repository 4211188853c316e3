"""Tests of the cache between steps: it stays within its budget and never returns another key's value."""

import functools
import weakref

import pytest
import torch
from graft_pack.trainers.preprocessing.prefetch import LRUCache
from hypothesis import given
from hypothesis import strategies as st


def value(number, size):
    return {"a": torch.full((size,), number, dtype=torch.uint8), "b": torch.zeros(size, dtype=torch.float16)}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60), st.integers(1, 300))
def test_what_is_kept_stays_within_the_budget_and_is_the_keys_own(asked, budget):
    sizes, made = {}, []
    keep = LRUCache(budget)

    def make(number, size):
        tensors = value(number, size)
        made.append([(weakref.ref(tensor), tensor.nbytes) for tensor in tensors.values()])
        return tensors

    for number, size in asked:
        size = sizes.setdefault(number, size)
        found = keep.get(str(number), functools.partial(make, number, size))
        assert torch.equal(found["a"], value(number, size)["a"])
        del found
        held = [bytes_alive(tensors) for tensors in made if bytes_alive(tensors)]
        assert sum(held) <= budget or len(held) == 1, "one value is kept whatever its size"


def bytes_alive(tensors):
    return sum(size for tensor, size in tensors if tensor() is not None)


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
