"""Tests that a run and a job of an earlier version are found, end with the same bits, and are exported."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.engine.job import export_job, read_job
from graft_pack.trainers.engine.session import run_recipe
from graft_pack.trainers.formats.files import read_tensors
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.runs.saves import list_saves, pick_save

from tests.fixtures.earlier import make
from tests.support.diffusers_host import same_state, same_tensors, state_of

RESULTS = json.loads((make.HERE / "results.json").read_text())
# Five times the distance between the kernels of two CPUs, measured by the earlier version itself: 1.2e-7 of the norm.
BOUND = 6e-7


def folders_of(folder):
    """Return the folders of a host, which knows adapters by their path below one of them."""
    runs, cache, loras, embeddings = (str(folder / name) for name in ("runs", "cache", "loras", "embeddings"))
    return Folders(runs, cache, loras, embeddings, adapter_of=lambda name: os.path.join(loras, name))


def copy_run(folder):
    """Copy what the earlier version wrote: the run, its cache and its adapter."""
    shutil.copytree(make.HERE / "run", folder)
    return folders_of(folder)


def sampling_host():
    """Return the host after its fingerprints have changed, as ComfyUI's have since the earlier version."""
    host = make.portable_host()
    for part in (host.denoiser, host.text, host.codec):
        part.earlier_fingerprint = part.fingerprint
        part.fingerprint = lambda before=part.fingerprint: f"whole {before()}"
    return host


HOSTS = pytest.mark.parametrize("host_of", [make.portable_host, sampling_host], ids=["same", "other fingerprints"])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the result of the same training by this version alone, from the same cached latents."""
    folder = tmp_path_factory.mktemp("straight")
    shutil.copytree(make.HERE / "run" / "cache", folder / "cache")
    return run_recipe(make.lora_recipe(), make.scan(), make.portable_host(), folders_of(folder))


@pytest.fixture(scope="module")
def has_same_kernels(straight):
    """Report whether this CPU computes the bits of the CPU that made the files, by the steps that both have done."""
    (path,) = (make.HERE / "run" / "runs").glob(f"*/state-{make.STEP:08d}.safetensors")
    return same_tensors(read_tensors(straight.run.state_path(make.STEP))[0], read_tensors(str(path))[0])


def assert_same(adapter, name, has_same_kernels):
    expected = read_tensors(str(make.HERE / f"{name}.safetensors"))[0]
    assert distance(adapter, expected) < BOUND
    if has_same_kernels:
        assert same_tensors(dict(adapter), expected)


def distance(adapter, expected):
    """Return the norm of the difference of two adapters by the norm of the second."""
    assert adapter.keys() == expected.keys()
    values, others = (torch.cat([one[key].double().flatten() for key in expected]) for one in (adapter, expected))
    return ((values - others).norm() / others.norm()).item()


@HOSTS
def test_a_run_of_the_version_before_resumes_to_the_same_bits(host_of, tmp_path, straight, has_same_kernels):
    host, folders = host_of(), copy_run(tmp_path / "host")
    result = run_recipe(make.lora_recipe(), make.scan(), host, folders)
    expected = RESULTS["run_result"]
    assert result.run.name == expected["name"]
    assert [entry.name for entry in os.scandir(folders.runs) if entry.is_dir()] == [expected["name"]]
    assert result.resumed_from == make.STEP
    assert result.losses == pytest.approx(expected["losses"], rel=BOUND)
    assert_same(result.adapter, "run_result", has_same_kernels)
    if has_same_kernels:
        assert same_state(state_of(result), state_of(straight))
    assert host.codec.calls == 0, "the latents of the version before were made again"


@HOSTS
def test_a_finished_run_of_the_version_before_trains_no_more(host_of, tmp_path):
    folders = copy_run(tmp_path / "host")
    recipe = replace(make.lora_recipe(), steps=make.STEP)
    host = host_of()
    result = run_recipe(recipe, make.scan(), host, folders)
    assert (result.step, result.resumed_from) == (make.STEP, make.STEP)
    assert host.denoiser.calls == 0
    (saved,) = (make.HERE / "run" / "loras").glob("*/*.safetensors")
    assert same_tensors(dict(result.adapter), read_tensors(str(saved))[0])


def test_saves_of_the_version_before_are_offered_beside_new_ones(tmp_path):
    folders = copy_run(tmp_path / "host")
    result = run_recipe(make.lora_recipe(), make.scan(), make.portable_host(), folders)
    assert list(list_saves(folders, result.run)) == [make.STEP, make.STEPS]
    names = {step: pick_save(folders, result.run, step)["adapter"] for step in (make.STEP, make.STEPS)}
    assert names[make.STEP] == os.path.join(result.run.name, f"step-{make.STEP:08d}.safetensors")
    picked = read_tensors(folders.adapter_of(names[make.STEPS]))[0]
    assert same_tensors(picked, dict(result.adapter))


def copy_job(folder):
    (job,) = (make.HERE / "jobs").iterdir()
    return str(shutil.copytree(job, folder / job.name))


@HOSTS
def test_a_job_of_the_version_before_trains_to_the_same_bits(host_of, tmp_path, has_same_kernels):
    job = read_job(copy_job(tmp_path))
    assert job.base == make.BASE
    assert job.recipe == make.job_recipe()
    host = host_of()
    result = run_recipe(job.recipe, job.dataset, host, job.folders(folders_of(tmp_path / "there")))
    expected = RESULTS["job_result"]
    if host_of is make.portable_host:
        assert result.run.name == expected["name"]
    assert result.losses == pytest.approx(expected["losses"], rel=BOUND)
    assert_same(result.adapter, "job_result", has_same_kernels)
    assert host.codec.calls == 0


@HOSTS
def test_a_job_of_the_version_before_is_exported_again(host_of, tmp_path, has_same_kernels):
    job = read_job(copy_job(tmp_path))
    own = job.folders(folders_of(tmp_path / "there"))
    path = export_job(str(tmp_path / "again"), job.recipe, job.dataset, host_of(), own, job.base)
    again = read_job(path)
    assert (again.recipe, again.base) == (job.recipe, job.base)
    host = host_of()
    result = run_recipe(again.recipe, again.dataset, host, again.folders(folders_of(tmp_path / "elsewhere")))
    assert result.run.name == os.path.basename(path)
    assert_same(result.adapter, "job_result", has_same_kernels)
    assert host.codec.calls == 0


@HOSTS
def test_a_job_of_the_version_before_is_the_run_of_its_pictures(host_of, tmp_path, has_same_kernels):
    """Export the pictures with this version; the result is the one of the earlier version's job."""
    folders = folders_of(tmp_path / "here")
    path = export_job(str(tmp_path / "jobs"), make.job_recipe(), make.varied(), host_of(), folders, make.BASE)
    if host_of is make.portable_host:
        assert os.path.basename(path) == RESULTS["job_result"]["name"]
    job = read_job(path)
    result = run_recipe(job.recipe, job.dataset, host_of(), job.folders(folders_of(tmp_path / "there")))
    assert_same(result.adapter, "job_result", has_same_kernels)


def begun_with(run):
    """Return what the log of a run says about the rounding of its first steps."""
    with open(os.path.join(run.folder, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return [line["begun"] for line in lines if line["event"] == "arithmetic"]


def test_a_run_of_the_version_before_says_that_its_bits_change(tmp_path, caplog):
    run = run_recipe(make.lora_recipe(), make.scan(), make.portable_host(), copy_run(tmp_path / "earlier")).run
    assert "rounds in another way" in caplog.text
    assert begun_with(run) == [None]
    caplog.clear()
    recipe = replace(make.lora_recipe(), steps=make.lora_recipe().steps + 1)
    run_recipe(recipe, make.scan(), make.portable_host(), folders_of(tmp_path / "earlier"))
    assert "rounds in another way" in caplog.text, "it is said again: the run's first steps stay what they are"
    new = run_recipe(make.lora_recipe(), make.scan(), make.portable_host(), folders_of(tmp_path / "new")).run
    assert begun_with(new) == []
