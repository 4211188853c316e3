"""Tests of the selections that `make quick` and `make test` run."""

import pytest

from tests.support.collection import is_quick, is_soak_only
from tests.support.combinations import each_value
from tests.support.forked import forked


def test_a_test_of_its_own_is_quick(request):
    assert is_quick(request.node)


def test_a_test_with_comfyui_is_not_quick(comfy, request):
    assert not is_quick(request.node)


def test_a_test_forked_from_a_process_with_comfyui_is_not_quick(request, monkeypatch):
    monkeypatch.setattr(request.node, "obj", forked(request.function))
    assert not is_quick(request.node)


def test_each_value_is_combined_with_the_first_ones():
    rows = each_value("ab", [1, 2, 3])
    assert [row.values for row in rows if not row.marks] == [("a", 1), ("a", 2), ("a", 3), ("b", 1)]
    assert len(rows) == 6


@pytest.mark.parametrize("letter, number", each_value("ab", [1, 2, 3]))
def test_other_combinations_run_in_soak_alone(letter, number, request):
    assert is_soak_only(request.node) == (letter == "b" and number > 1)
    assert request.config.getoption("--soak") or not is_soak_only(request.node)


@pytest.mark.soak(only_for={"letter": "b"})
@pytest.mark.parametrize("letter", "ab")
def test_a_test_may_run_in_soak_alone_for_one_value(letter, request):
    assert is_soak_only(request.node) == (letter == "b")
    assert request.config.getoption("--soak") or letter == "a"
