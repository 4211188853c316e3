"""Tests of `job.py --check` on jobs whose base is damaged."""

import pytest

pytestmark = pytest.mark.usefixtures("comfy")
WHOLE = {"files": [], "nodes": {}, "sockets": {}, "fingerprints": {}, "versions": {}}
DAMAGED = [
    {"files": None},
    {"files": [{}]},
    {"files": [{"name": 1, "list": [], "sha256": 2}]},
    {"nodes": []},
    {"nodes": {"1": None}},
    {"nodes": {"1": {}}},
    {"sockets": None},
    {"fingerprints": 3},
]


def test_a_whole_base_has_no_problem():
    from graft_pack.nodes.host.jobs import provenance

    assert list(provenance.problems(WHOLE)) == []


@pytest.mark.parametrize("change", [*DAMAGED, "files", "nodes", "sockets", "fingerprints"], ids=str)
def test_a_damaged_base_is_named(change):
    from graft_pack.nodes.host.jobs import provenance

    base = {**WHOLE, **change} if isinstance(change, dict) else {k: v for k, v in WHOLE.items() if k != change}
    assert any("The job's base is damaged" in str(error) for error in provenance.problems(base))
