"""Tests of jobs: a job holds a whole training except the base, and trains to the same result as the dataset."""

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graft_pack.trainers.data.examples import Augmentation, EncodedPrompt, PriorTarget
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.engine import job as jobs
from graft_pack.trainers.engine import job_json
from graft_pack.trainers.engine.session import run_recipe
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.formats import atomic, files, json_files
from graft_pack.trainers.formats.adapter import load_adapter, save_adapter
from graft_pack.trainers.protocols import SOURCE
from graft_pack.trainers.runs.folders import Folders

from tests.support import models
from tests.support.diffusers_host import make_dataset, make_host, same_state, state_of
from tests.support.host import ROOT

FIELDS = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "validation_fraction": 0.2, "validate_every": 2}
BASE = {"nodes": {}}


def folders_of(folder):
    return Folders(*(str(folder / name) for name in ("runs", "cache", "loras", "emb")))


def varied():
    """Return a dataset whose samples use every field."""
    dataset = make_dataset()
    handling = Augmentation(shuffle_tags=True, caption_dropout=0.2, flip=True, resolutions=(48,), mask_minimum=0.1)
    first, second, third, *others = dataset.examples
    first = replace(first, handling=handling, mask=second.source, captions=("a, b, c", "d \u00e9"), repeats=2)
    second = replace(second, weight=0.5, anchor=PriorTarget("a picture", 0.3))
    third = replace(third, encoded=EncodedPrompt("a digest", make_host().text.encode("a blue dog")))
    return replace(dataset, examples=(first, second, third, *others))


def export(folder, dataset=None, base=BASE, **fields):
    recipe = models.recipe("SD1", **{**FIELDS, **fields})
    dataset = dataset or make_dataset()
    return jobs.export_job(str(folder / "jobs"), recipe, dataset, make_host(), folders_of(folder), base)


@pytest.mark.parametrize("anchor", [("a picture", 0.3), ("", 1.0, ("a", "")), ("a thing", 0.5, (), "sks")])
def test_prior_targets_come_along_and_earlier_versions_read_the_plain_one(anchor):
    dataset = make_dataset(1)
    dataset = replace(dataset, examples=(replace(dataset.examples[0], anchor=PriorTarget(*anchor)),))
    values = json.loads(json.dumps(job_json.dataset_as_json(dataset)))
    assert job_json.decode_dataset(values).examples[0].anchor == PriorTarget(*anchor)
    assert len(anchor) > 2 or set(values["examples"][0]["anchor"]) == {"prompt", "weight"}


def test_trained_from_a_job_it_is_the_same_run(tmp_path):
    dataset = varied()
    path = export(tmp_path / "here", dataset)
    direct = run_recipe(models.recipe("SD1", **FIELDS), dataset, make_host(), folders_of(tmp_path / "here"))
    shutil.move(path, tmp_path / "moved")
    shutil.rmtree(tmp_path / "here" / "cache")
    job = jobs.read_job(str(tmp_path / "moved"))
    assert job.base == BASE
    there = run_recipe(job.recipe, job.dataset, make_host(), job.folders(folders_of(tmp_path / "there")))
    assert there.run.name == direct.run.name == os.path.basename(path)
    assert same_state(state_of(there), state_of(direct))
    assert not (tmp_path / "there" / "cache").exists()


def put_pictures(folder):
    """Write pictures and truncate three after their headers: one picture, the mask of one, and the source of one."""
    torn = ("1.png", "2-masklabel.png", "3.png")
    for place in ("", "sources"):
        os.makedirs(folder / place)
        for number, example in enumerate(make_dataset().examples):
            example.source.open().save(folder / place / f"{number}.png")
    shutil.copyfile(folder / "0.png", folder / torn[1])
    for path in (folder / torn[0], folder / torn[1], folder / "sources" / torn[2]):
        os.truncate(path, path.stat().st_size // 2)
    return scan_folder(str(folder), "sks", 64, 1, reading=ScanOptions(control_folder=str(folder / "sources")))


def editing_host():
    host = make_host()
    host.denoiser.conditioning_kind = SOURCE
    return host


def test_what_cannot_be_read_is_left_out_of_a_job_as_it_is_here(tmp_path):
    dataset = put_pictures(tmp_path / "pictures")
    recipe, folders = models.recipe("SD1", **FIELDS), folders_of(tmp_path / "here")
    direct = run_recipe(recipe, dataset, editing_host(), folders)
    assert len(direct.left_out) == 3
    path = jobs.export_job(str(tmp_path / "jobs"), recipe, dataset, editing_host(), folders, BASE)
    local = tmp_path / "local"
    local.mkdir()
    jobs.write_local_job(str(local), recipe, dataset, editing_host(), folders, BASE)
    for place in (path, str(local)):
        job = jobs.read_job(place, is_local=place == str(local))
        own = job.folders(folders_of(tmp_path / f"of {os.path.basename(place)}"))
        there = run_recipe(job.recipe, job.dataset, editing_host(), own)
        assert there.run.name == direct.run.name
        assert sorted(map(str, there.left_out)) == sorted(map(str, direct.left_out))
        assert same_state(state_of(there), state_of(direct))


def test_several_source_pictures_come_along(tmp_path):
    dataset = make_dataset()
    first, second, third, *others = dataset.examples
    first = replace(first, control=second, more_controls=(third, *others[:1]))
    dataset = replace(dataset, examples=(first, replace(second, control=third), third, *others))
    folders = folders_of(tmp_path / "here")
    recipe = models.recipe("SD1", **FIELDS)

    def host():
        made = editing_host()
        made.denoiser.max_sources = 3
        return made

    path = jobs.export_job(str(tmp_path / "jobs"), recipe, dataset, host(), folders, BASE)
    job = jobs.read_job(path)
    assert job.dataset.fingerprint() == dataset.fingerprint()
    there = run_recipe(job.recipe, job.dataset, host(), job.folders(folders_of(tmp_path / "there")))
    assert there.run.name == os.path.basename(path)


def test_pictures_that_prompts_name_come_along_encoded(tmp_path):
    """The other machine has another file of that name, or none."""
    dataset = make_dataset()
    first, second, *others = dataset.examples
    dataset = replace(dataset, examples=(replace(first, control=second), second, *others))
    for place, example in (("here", first), ("there", second)):
        (tmp_path / place).mkdir()
        example.source.open().save(tmp_path / place / "ref.png")

    def folders(place):
        return replace(folders_of(tmp_path / place), picture_of=lambda name: str(tmp_path / place / name))

    prompts = ("a dog --c ref.png --w 64 --h 64 --s 2 --d 3",)
    recipe = models.recipe("SD1", **FIELDS, preview_prompts=prompts, preview_every=3)
    direct = run_recipe(recipe, dataset, editing_host(), folders("here"))
    path = jobs.export_job(str(tmp_path / "jobs"), recipe, dataset, editing_host(), folders("here"), BASE)
    shutil.rmtree(tmp_path / "here" / "cache")
    job = jobs.read_job(path)
    there = run_recipe(job.recipe, job.dataset, editing_host(), job.folders(folders("there")))
    assert there.run.name == direct.run.name and same_state(state_of(there), state_of(direct))
    pictures = [sorted(Path(run.folder, "samples").glob("*.png")) for run in (direct.run, there.run)]
    assert pictures[0] and [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    row = json_files.read_json(os.path.join(path, "job.json"))["pictures"]["ref.png"]
    assert (row["size"], row["digest"]) == (list(first.size), atomic.file_hash(str(tmp_path / "here" / "ref.png")))


def test_what_it_starts_from_comes_along(tmp_path):
    first = run_recipe(models.recipe("SD1", **FIELDS), make_dataset(), make_host(), folders_of(tmp_path / "first"))
    adapter = os.path.join(first.run.adapters, "step-00000003.safetensors")
    path = export(tmp_path, start_from=adapter)
    os.remove(adapter)
    job = jobs.read_job(path)
    result = run_recipe(job.recipe, job.dataset, make_host(), job.folders(folders_of(tmp_path / "there")))
    assert result.run.name == os.path.basename(path)


def test_exported_again_it_replaces_what_was_there(tmp_path):
    path = export(tmp_path)
    with open(os.path.join(path, "left.txt"), "w"):
        pass
    assert export(tmp_path, steps=5) == path
    assert sorted(os.listdir(path)) == ["cache", "job.json"]
    assert os.listdir(tmp_path / "jobs") == [os.path.basename(path)]
    assert jobs.read_job(path).recipe.steps == 5


def test_an_export_that_ends_early_leaves_what_was_there(tmp_path):
    path = export(tmp_path)
    before = sorted(os.listdir(path))

    class Cancelled(BaseException):
        pass

    class Cancelling(dict):
        def items(self):
            """Cancel while the last file is written."""
            raise Cancelled

    with pytest.raises(Cancelled):
        export(tmp_path, base={"nodes": Cancelling(a=1)}, steps=9)
    assert os.listdir(tmp_path / "jobs") == [os.path.basename(path)]
    assert sorted(os.listdir(path)) == before
    assert jobs.read_job(path).recipe.steps == 3


@pytest.mark.parametrize("number", [1, 2], ids=["the old away", "the new in its place"])
def test_an_export_that_cannot_take_the_place_of_the_old_leaves_that(tmp_path, monkeypatch, number):
    path = export(tmp_path)
    renamed = []
    rename = os.rename

    def refuse(source, target):
        if path in (source, target):
            renamed.append(source)
            if len(renamed) == number:
                raise PermissionError("held open")
        rename(source, target)

    monkeypatch.setattr(jobs.os, "rename", refuse)
    with pytest.raises(RunError, match="cannot be replaced .held open"):
        export(tmp_path, steps=9)
    assert os.listdir(tmp_path / "jobs") == [os.path.basename(path)]
    assert jobs.read_job(path).recipe.steps == 3


def test_a_missing_latent_is_named_and_none_is_left_out(tmp_path):
    path = export(tmp_path)
    (shard,) = os.listdir(os.path.join(path, "cache", "latents"))
    shard = os.path.join(path, "cache", "latents", shard)
    tensors, metadata = files.read_tensors(shard)
    tensors = dict(sorted(tensors.items())[1:])
    sums = {name: total for name, total in json.loads(metadata["sums"]).items() if name in tensors}
    files.write_tensors(shard, tensors, {**metadata, "sums": json.dumps(sums)})
    job = jobs.read_job(path)
    with pytest.raises(RunError, match=r"the picture 'image \d+' is missing or damaged, and a job has no pictures"):
        run_recipe(job.recipe, job.dataset, make_host(), job.folders(folders_of(tmp_path / "there")))


WORKER = """
import runpy

class Pipe:
    def send(self, word):
        print(word)

given = {{"folder": "", "comfyui": {comfyui!r}, "environment": {{}}, "pipe": Pipe()}}
runpy.run_path({program!r}, {{"GRAFT_WORKER": given}}, "graft_job")
"""


def test_a_process_that_fails_before_it_has_begun_tells_the_graph_why(tmp_path):
    """There is no ComfyUI at the expected place; a missing library or connection would act the same."""
    program = WORKER.format(comfyui=str(tmp_path), program=str(ROOT / "job.py"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.startswith("('failed', '', \"ModuleNotFoundError: No module named 'comfy'")


@pytest.fixture
def program():
    """Return the names that job.py defines, without running it."""
    return runpy.run_path(str(ROOT / "job.py"))


def test_comfyui_comes_first_in_a_search_path_and_packs_last(program, tmp_path):
    comfy, venv = tmp_path / "ComfyUI", tmp_path / "ComfyUI" / "venv" / "site-packages"
    packs = [comfy / "custom_nodes" / "pushy", ROOT.parent / "another"]
    left_out = [comfy / "comfy", ROOT, comfy]
    found = program["search_path"](str(comfy), [str(one) for one in (*packs, *left_out, tmp_path, venv)])
    assert found == [str(one) for one in (comfy, tmp_path, venv, *packs)]


@pytest.mark.parametrize(
    "environment, given, options, warned",
    [
        ({}, [], [], False),
        ({"MASTER_ADDR": "127.0.0.1", "RANK": "0"}, ["--cpu"], [], False),
        ({"ACCELERATE_USE_CPU": "False"}, [], [], False),
        ({"ACCELERATE_USE_CPU": "True"}, [], ["--cpu"], False),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, ["--cpu"], [], True),
    ],
    ids=["alone", "two", "no CPU", "one by accelerate's --cpu", "one in place of two"],
)
def test_accelerates_cpu_is_comfyuis_and_starts_one_process(
    program, monkeypatch, caplog, environment, given, options, warned
):
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert program["options_of_accelerate"](given) == options
    assert ("starts one process" in caplog.text) == warned


def test_a_folder_without_a_job_is_said_to_be_none(tmp_path):
    with pytest.raises(RunError, match=r"no job in .* Use the folder"):
        jobs.read_job(str(tmp_path))


ODD = [None, -1, 10**30, 1.5, "", "x" * 300, [], {}, [[]], True, float("inf"), "../../x"]


def places_in(value, path=()):
    """Yield the path of each value in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places_in(part, (*path, key))


@pytest.mark.parametrize(
    "way, value, said",
    [
        (("recipe", "batch_size"), 0, "batch_size"),
        (("recipe", "learning_rate"), -1.0, "learning_rate"),
        (("recipe", "optimizer"), "none such", "optimizer"),
        (("recipe", "steps"), 1.5, r"got `float` - at `\$\.steps`"),
        (("dataset", "trigger"), 5, r"got `int` - at `\$\.trigger`"),
        (("dataset", "examples", 0, "captions"), "a, b", r"got `str` - at `\$\.captions`"),
        (("dataset", "examples", 0, "captions"), [5], r"got `int` - at `\$\.captions\[0\]`"),
        (("dataset", "examples", 0, "size"), [64], r"length 2, got 1 - at `\$\.size`"),
        (("dataset", "examples", 0, "weight"), 10**400, r"out of range - at `\$\.weight`"),
        (("dataset", "examples", 0, "repeats"), True, r"got `bool` - at `\$\.repeats`"),
        (("dataset", "examples", 0, "handling", "flip"), 1, r"got `int` - at `\$\.flip`"),
        (("dataset", "examples", 0, "more"), 1, "more is unknown"),
        (("dataset", "examples", 0, "handling", "more"), 1, "more is unknown"),
        (("recipe", "objective", "more"), 1, "more is unknown"),
        (("recipe", "block_ranks"), [["x", 1.5]], r"got `float` - at `\$\.block_ranks\[0\]\[1\]`"),
        (("recipe", "learning_rate"), float("nan"), "learning_rate"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_value_that_no_job_has_is_named(way, value, said, tmp_path):
    path = os.path.join(export(tmp_path), "job.json")
    held = json_files.read_own_json(path)
    holder = held
    for key in way[:-1]:
        holder = holder[key]
    holder[way[-1]] = value
    json_files.write_json(path, held)
    with pytest.raises(RunError, match=f"job.json' is damaged .*({said})"):
        jobs.read_job(os.path.dirname(path))


def test_a_job_of_any_depth_is_refused_or_read(tmp_path):
    """Newer versions of Python parse deeper JSON than functions can recurse."""
    path = os.path.join(export(tmp_path), "job.json")
    value = json_files.read_own_json(path)
    head, tail = json.dumps({**value["dataset"]["examples"][0], "control": "INNER"}).split('"INNER"')
    value["dataset"]["examples"] = "ROWS"
    text = json.dumps(value)
    refused = []
    for depth in (1, *range(200, 1000, 40), 10_000):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text.replace('"ROWS"', f"[{head * depth}null{tail * depth}]"))
        try:
            jobs.read_job(os.path.dirname(path))
        except RunError as error:
            assert path in str(error)
            refused.append(depth)
    assert 1 not in refused and 10_000 in refused


@pytest.mark.soak
def test_a_job_that_lies_is_refused_or_read_and_nothing_else(tmp_path, trials):
    """Any value may be changed: the result is an error that names the file, or a job with a checked recipe."""
    path = os.path.join(export(tmp_path, varied()), "job.json")
    source = random.Random(0)
    text = json.dumps(json_files.read_own_json(path))
    places = [place for place in places_in(json.loads(text)) if place[0] != "base"]
    refused = 0
    for _ in range(trials(150, 5000)):
        value = json.loads(text)
        *way, last = source.choice(places)
        holder = value
        for key in way:
            holder = holder[key]
        if source.random() < 0.2:
            del holder[last]
        else:
            holder[last] = source.choice(ODD)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file)
        try:
            jobs.read_job(os.path.dirname(path))
        except RunError as error:
            assert path in str(error)
            refused += 1
    assert refused > 20


def put_models(folder):
    """Write files as ComfyUI's models folders hold them: other programs' metadata, no metadata, and no valid format."""
    folder.mkdir(parents=True)
    for number, metadata in enumerate(({}, {"format": "pt"}, {"ss_network_dim": "4"}, {"sums": "{}"})):
        files.write_tensors(str(folder / f"{number}.safetensors"), {"x": torch.ones(2)}, metadata)
    shutil.copy(folder / "0.safetensors", folder / f"{'a1' * 12}.safetensors")
    (folder / "torn.safetensors").write_bytes((folder / "0.safetensors").read_bytes()[:40])
    (folder / ".x.safetensors.12345678.tmp").write_bytes(b"half")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edited(path, **values):
    with open(path, encoding="utf-8") as file:
        value = json.load(file)
    value.pop("checksum", None)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**value, **values}, file)


def run_job(path, there):
    job = jobs.read_job(path)
    return run_recipe(job.recipe, job.dataset, make_host(), job.folders(folders_of(there)))


@pytest.mark.parametrize("way", ["cache", "cache/latents", "cache/text", "cache/masks", "one file", "absolute", "up"])
def test_a_hostile_job_removes_no_models(way, tmp_path):
    path = export(tmp_path)
    models_folder = tmp_path / "models" / "loras"
    before = put_models(models_folder)
    inner = os.path.join(path, way)
    if way == "absolute":
        edited(os.path.join(path, "job.json"), cache=str(models_folder.parent))
        (models_folder.parent / "latents").symlink_to(models_folder)
    elif way == "up":
        edited(os.path.join(path, "job.json"), cache=os.path.join("..", "..", "models"))
    elif way == "one file":
        os.symlink(models_folder / "0.safetensors", os.path.join(path, "cache", "latents", "x.safetensors"))
    else:
        # Folders exist only for files that a picture needs.
        shutil.rmtree(inner, ignore_errors=True)
        os.symlink(models_folder, inner)
    with pytest.raises(RunError, match="uses a file outside its folder"):
        run_job(path, tmp_path / "there")
    assert contents(models_folder) == before


@pytest.mark.parametrize("name", ["/etc/x.safetensors", "../../x.safetensors", "C:\\x.safetensors", "a/../../x"])
def test_a_job_starts_from_no_file_outside_it(name, tmp_path):
    path = export(tmp_path)
    value = json.loads((tmp_path / "jobs" / os.path.basename(path) / "job.json").read_text())
    edited(os.path.join(path, "job.json"), recipe={**value["recipe"], "start_from": name})
    with pytest.raises(RunError, match="uses a file outside its folder"):
        jobs.read_job(path)


def test_an_export_replaces_nothing_but_jobs(tmp_path):
    path = export(tmp_path)
    shutil.rmtree(path)
    before = put_models(tmp_path / "jobs" / os.path.basename(path))
    with pytest.raises(RunError, match="exists and is not a job"):
        export(tmp_path)
    assert contents(tmp_path / "jobs" / os.path.basename(path)) == before
    for ending in ("new", "old"):
        shutil.copytree(path, tmp_path / "jobs" / f".{os.path.basename(path)}.{ending}")
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(RunError, match="is a link"):
        export(tmp_path)
    assert contents(tmp_path / "elsewhere") == before
    os.remove(path)
    export(tmp_path)
    for ending in ("new", "old"):
        assert contents(tmp_path / "jobs" / f".{os.path.basename(path)}.{ending}") == before


def test_a_job_that_was_changed_on_its_way_is_refused(tmp_path):
    first = run_recipe(models.recipe("SD1", **FIELDS), make_dataset(), make_host(), folders_of(tmp_path / "first"))
    adapter = os.path.join(first.run.adapters, "step-00000003.safetensors")
    path = export(tmp_path, start_from=adapter)
    start, told = (os.path.join(path, name) for name in ("start.safetensors", "job.json"))
    jobs.read_job(path)
    with open(told, encoding="utf-8") as file:
        text = file.read()
    with open(told, "w", encoding="utf-8") as file:
        file.write(text.replace('"repeats": 1', '"repeats": 9', 1))
    with pytest.raises(RunError, match="does not match its checksum"):
        jobs.read_job(path)
    with open(told, "w", encoding="utf-8") as file:
        file.write(text)
    with open(start, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(RunError, match="has changed since the export"):
        jobs.read_job(path)
    # The file as an earlier version wrote it.
    value = json_files.read_own_json(told)
    del value["start"]
    json_files.write_json(told, value)
    jobs.read_job(path)


def test_a_job_brings_the_configuration_of_a_peft_folder_along(tmp_path):
    """It holds the alpha, which the weights alone do not tell."""
    first = run_recipe(models.recipe("SD1", **FIELDS), make_dataset(), make_host(), folders_of(tmp_path / "first"))
    folder = tmp_path / "peft"
    save_adapter(str(folder / "adapter_model.safetensors"), first.adapter, "first", "peft")
    config = json_files.read_json(str(folder / "adapter_config.json"))
    json_files.write_json(str(folder / "adapter_config.json"), {**config, "lora_alpha": 7.0})
    path = export(tmp_path, start_from=str(folder / "adapter_model.safetensors"))
    scales = load_adapter(jobs.read_job(path).start).native.scales
    assert set(scales.values()) == {7.0 / config["r"]}
    os.remove(os.path.join(path, "start", "adapter_config.json"))
    with pytest.raises(RunError, match="has changed since the export"):
        jobs.read_job(path)
