"""Tests of `job.py --check` on jobs whose base is damaged."""

import re
import shlex

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


def test_a_pack_in_a_folder_with_a_space_is_one_word_of_each_command(comfy, monkeypatch):
    from graft_pack.nodes.host.jobs import readme

    monkeypatch.setattr(readme, "_PACK", "my graft")
    lines = re.findall(r"^    (\w+ .*)$", readme.job_readme("a-run", {"files": []}), re.M)
    words = [shlex.split(line) for line in lines]
    # SLURM's shell reads its words once more.
    words = [shlex.split(line[-1]) if line[0] == "sbatch" else line for line in words]
    assert len(words) == 6
    assert all("custom_nodes/my graft/job.py" in line for line in words)
