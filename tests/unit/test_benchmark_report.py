"""Tests of the tables that the benchmark writes, and of its verdicts."""

import pytest

from benchmarks import report
from benchmarks.contestants import Case


def rows(**seconds):
    """Return rounds of contestants that take the given seconds every time; `_` stands for a space."""
    whole = {"forward": 0.1, "limit": 1.0, "diffusers' limit": 1.0, "attention": 1.05, "diffusers": 1.06}
    whole |= {"linear + conv": 1.1, "core": 3.0}
    whole |= {name.replace("_", " "): value for name, value in seconds.items()}
    return {name: [(9.0, value)] * 3 for name, value in whole.items()}


@pytest.mark.parametrize(
    "seconds, said",
    [
        ({}, "held"),
        ({"attention": 1.2}, "missed: attention, diffusers"),
        ({"core": 2.1}, "missed: core"),
        ({"core,_bypass": 2.1}, "missed: core"),
        ({"core,_bypass": 2.3}, "held"),
        ({"limit": 0.2}, "limit < 250 ms"),
    ],
)
def test_each_bar_is_held_or_missed(seconds, said):
    assert report.verdict(rows(**seconds)) == said


def test_rows_of_other_cases_and_other_parts_stay():
    cases = {Case("a", 1): rows(), Case("b", 4, True): rows()}
    first = report.steps(cases, 1, 7, "0.3.75") + "\n\n| peak | MB |\n|---|---|\n| core | 1 |\n\nOf something else: 3"
    again = (
        report.steps({Case("b", 4, True): rows(attention=1.5)}, 2, 5, "0.3.75")
        + "\n\n| peak | MB |\n|---|---|\n| x | 2 |"
    )
    found = report.merged(first, again)
    assert report.merged("", first) == first
    assert [line for line in found.splitlines() if line.endswith("held |")] == [
        report.line(Case("a", 1), rows(), "0.3.75")
    ]
    assert "| 0.3.75 | b | 4, checkpointed | 100 | 1000 | 1.50 (1.50-1.50) |" in found
    assert "quartiles of 5 rounds" in found and "of 7 rounds" not in found
    assert "| x | 2 |" in found and "| core | 1 |" not in found
    assert found.endswith("Of something else: 3")
    other = report.merged(found, report.steps({Case("a", 1): rows()}, 1, 7, "0.33.0"))
    assert other.count("| a | 1 |") == 2, "another host's row is another one"
