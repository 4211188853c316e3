"""Tests of training in the real server: resuming, extending, cancelling, and messages to the user."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.support import graphs, runs
from tests.support.server import PromptError, PromptInterrupted, PromptRefused
from tests.toy import world


@pytest.fixture
def dataset(server, request):
    """Copy the concept's pictures into a fresh folder below input/, named like the test, so that runs stay separate."""
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    folder = server.path("input", name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.CONCEPT_FOLDER / "toy", folder)
    # The content decides a run's identity, so a caption of its own gives the test its own runs.
    (folder / "00.txt").write_text(f"a large sks toy on a blue background, {name}")
    return folder


ALL_OPTIONS = (
    "GraftRunOptions",
    "GraftPreviewOptions",
    "GraftOptimizerOptions",
    "GraftMemoryOptions",
    "GraftObjectiveOptions",
)


def test_queued_twice_trains_once(server, tiny_base, dataset):
    prompt = graphs.training(dataset.name, 3)
    server.run(prompt)
    (run,) = runs.list_runs(server, dataset.name)
    log = (run / "metrics.jsonl").read_bytes()
    entry = server.run(graphs.training(dataset.name, 3))
    # Again with another title in the graph, so that the run itself answers and not the host's cache.
    prompt["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix="twice", format="kohya")
    prompt["3"]["inputs"]["options"] = ["50", 0]
    prompt.update(runs.option_nodes(server, GraftRunOptions={}))
    entry = server.run(prompt)
    assert "returned without training" in entry["outputs"]["3"]["text"][0]
    assert runs.list_runs(server, dataset.name) == [run]
    assert (run / "metrics.jsonl").read_bytes() == log


def test_edited_caption_trains_again(server, tiny_base, dataset):
    server.run(graphs.training(dataset.name, 2))
    (dataset / "01.txt").write_text("a large sks toy on a purple background")
    server.run(graphs.training(dataset.name, 2))
    assert len(runs.list_runs(server, dataset.name)) == 2


def test_untouched_options_change_nothing(server, tiny_base, dataset):
    server.run(graphs.training(dataset.name, 2))
    entry = server.run(
        graphs.training(dataset.name, 2, option_nodes=runs.option_nodes(server, **dict.fromkeys(ALL_OPTIONS, {})))
    )
    assert "returned without training" in entry["outputs"]["3"]["text"][0]
    assert len(runs.list_runs(server, dataset.name)) == 1


def test_previews_and_memory_do_not_restart(server, tiny_base, dataset):
    server.run(graphs.training(dataset.name, 2))
    previews = runs.option_nodes(server, GraftPreviewOptions={"prompts": "a large red circle", "every": 2, "steps": 2})
    memory = runs.option_nodes(server, GraftMemoryOptions={"checkpointing": "on", "micro_batch": 1})
    for chain in (previews, memory):
        entry = server.run(graphs.training(dataset.name, 2, option_nodes=chain))
        assert "returned without training" in entry["outputs"]["3"]["text"][0]
    entry = server.run(graphs.training(dataset.name, 4, option_nodes=previews))
    (run,) = runs.list_runs(server, dataset.name)
    assert runs.steps_logged(run) == [1, 2, 3, 4]
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000004-1.png"]


def test_more_steps_extend_to_the_same_bits(server, tiny_base, dataset):
    server.run(graphs.training(dataset.name, 3))
    assert runs.started_at(server, graphs.training(dataset.name, 6)) == 3
    (run,) = runs.list_runs(server, dataset.name)
    assert runs.steps_logged(run) == [1, 2, 3, 4, 5, 6]
    extended = runs.adapter_of(server, run, 6)
    server.run(
        graphs.training(dataset.name, 6, option_nodes=runs.option_nodes(server, GraftRunOptions={"on_existing": "new"}))
    )
    fresh = runs.list_runs(server, dataset.name)[1]
    assert runs.steps_logged(fresh) == [1, 2, 3, 4, 5, 6]
    assert runs.same(extended, runs.adapter_of(server, fresh, 6))


@pytest.mark.parametrize("stop", [1, 4])
def test_cancel_keeps_what_was_reached_and_goes_on(server, tiny_base, dataset, stop):
    base = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)}
    picture = graphs.sampling(base, "a large red circle on a blue background", ["1", 0], ["1", 1], "base", steps=4)
    before = server.download(server.run(base), picture)
    prompt = graphs.training(dataset.name, 2000)
    with server.listen() as events:
        queued = server.queue(prompt, client_id=events.client_id)
        while True:
            event = events.wait_for("graft.progress", event="step")
            if event.data["step"] >= stop:
                break
        server.interrupt()
        with pytest.raises(PromptInterrupted):
            server.wait(queued)
    (run,) = runs.list_runs(server, dataset.name)
    reached = runs.steps_logged(run)[-1]
    assert reached >= stop
    assert runs.adapter_of(server, run, reached)
    # The graph's MODEL, still in the host's cache, draws the same picture as before.
    base[str(103)]["inputs"]["seed"] = 2
    server.run(base)
    base[str(103)]["inputs"]["seed"] = 1
    again = server.run(base)
    assert "1" in dict(again["status"]["messages"])["execution_cached"]["nodes"]
    assert _pixels(server.download(again, picture)) == _pixels(before)
    assert runs.started_at(server, graphs.training(dataset.name, reached + 3)) == reached
    assert runs.steps_logged(run) == list(range(1, reached + 4))
    resumed = runs.adapter_of(server, run, reached + 3)
    fresh_options = runs.option_nodes(server, GraftRunOptions={"on_existing": "new"})
    server.run(graphs.training(dataset.name, reached + 3, option_nodes=fresh_options))
    assert runs.same(resumed, runs.adapter_of(server, runs.list_runs(server, dataset.name)[1], reached + 3))


def _pixels(files):
    return [np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in files]


def _empty(folder):
    for path in folder.iterdir():
        path.unlink()


def _ruined(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")


def _bare(folder):
    for path in folder.glob("*.txt"):
        path.unlink()


@pytest.mark.parametrize(
    "spoil, widgets, words",
    [
        (_empty, {}, ["Graft Load Dataset", "'folder'", "holds no picture", "Put PNG"]),
        (
            _ruined,
            {},
            ["Graft Load Dataset", "'folder'", "00.png", "picture format is unknown", "save unreadable ones again"],
        ),
        (_bare, {}, ["Graft Train LoRA", "'dataset'", "caption", "trigger"]),
        (
            None,
            {"learning_rate": 9.9, "steps": 50},
            ["Graft Train LoRA", "'learning_rate'", "not finite", ".png", "Lower"],
        ),
    ],
)
def test_errors_name_node_input_and_cure(server, tiny_base, dataset, spoil, widgets, words):
    if spoil:
        spoil(dataset)
    prompt = graphs.training(dataset.name, 2)
    prompt["3"]["inputs"].update(widgets)
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    message = caught.value.error["exception_message"]
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "folder, words",
    [
        ("nosuch", ["Graft Load Dataset", "'folder'", "no folder", "Create it"]),
        ("../..", ["Graft Load Dataset", "'folder'", "outside", "input folder"]),
        ("/etc", ["Graft Load Dataset", "'folder'", "outside", "input folder"]),
        ("", ["Graft Load Dataset", "'folder'", "No folder", "choose it"]),
    ],
)
def test_bad_folders_are_refused_before_anything_runs(server, tiny_base, folder, words):
    with pytest.raises(PromptRefused) as caught:
        server.queue(graphs.training(folder, 2))
    (error,) = caught.value.node_errors["2"]["errors"]
    assert error["extra_info"]["input_name"] == "folder"
    details = error["details"]
    assert all(word in details for word in words), details


def test_a_nan_run_keeps_its_last_good_state(server, tiny_base, dataset):
    prompt = graphs.training(dataset.name, 50, learning_rate=9.9)
    with pytest.raises(PromptError):
        server.run(prompt)
    (run,) = runs.list_runs(server, dataset.name)
    last = runs.steps_logged(run)[-1]
    assert all(np.isfinite(tensor).all() for tensor in runs.adapter_of(server, run, last).values())


def test_saved_file_is_read_by_the_hosts_own_loader(server, tiny_base, dataset):
    prompt = graphs.training(dataset.name, 4, learning_rate=1e-2)
    prompt["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix=dataset.name, format="kohya")
    text = "a large sks toy on a red background"
    trained = graphs.sampling(prompt, text, ["3", 0], ["3", 1], "trained", steps=4)
    entry = server.run(prompt)
    path = entry["outputs"]["9"]["text"][0]
    shown = _pixels(server.download(entry, trained))
    name = path.split("/loras/")[1]
    again = {"1": prompt["1"]}
    again["2"] = graphs.node(
        "LoraLoader", model=["1", 0], clip=["1", 1], lora_name=name, strength_model=1.0, strength_clip=1.0
    )
    loaded = graphs.sampling(again, text, ["2", 0], ["2", 1], "loaded", steps=4)
    assert _pixels(server.download(server.run(again), loaded)) == shown
    plain = {"1": prompt["1"]}
    base = graphs.sampling(plain, text, ["1", 0], ["1", 1], "plain", steps=4)
    assert _pixels(server.download(server.run(plain), base)) != shown


def test_cores_own_nodes_take_what_comes_out(server, tiny_base, dataset):
    prompt = graphs.training(dataset.name, 3)
    prompt["10"] = graphs.node("SaveLoRA", lora=["3", 2], prefix=f"loras/core-{dataset.name}")
    prompt["11"] = graphs.node("LossGraphNode", loss=["3", 3], filename_prefix="loss")
    loader = server.object_info("LoraModelLoader")["LoraModelLoader"]
    widgets = {**graphs.defaults_of(loader), "model": ["1", 0], "lora": ["3", 2]}
    prompt["12"] = graphs.node("LoraModelLoader", **widgets)
    drawn = graphs.sampling(prompt, "a large sks toy", ["12", 0], ["1", 1], "core", steps=3)
    ours = graphs.sampling(prompt, "a large sks toy", ["3", 0], ["1", 1], "ours", steps=3, start=200)
    entry = server.run(prompt)
    assert _pixels(server.download(entry, drawn)) == _pixels(server.download(entry, ours))
    (saved,) = server.path("output", "loras").glob(f"core-{dataset.name}*")
    (run,) = runs.list_runs(server, dataset.name)
    assert runs.same(load_file(saved), runs.adapter_of(server, run, 3))


def test_pictures_of_the_graph_are_a_dataset(server, tiny_base):
    prompt = graphs.training("toy", 2)
    prompt["20"] = graphs.node("EmptyImage", width=64, height=80, batch_size=3, color=0xFF0000)
    prompt["21"] = graphs.node("SolidMask", value=0.5, width=64, height=80)
    prompt["2"] = graphs.node(
        "GraftDatasetFromImages",
        images=["20", 0],
        captions="a red wall",
        trigger="zzz",
        resolution=64,
        masks=["21", 0],
    )
    prompt["22"] = graphs.node("GraftInspectDataset", dataset=["2", 0], model=["1", 0], clip=["1", 1], vae=["1", 2])
    entry = server.run(prompt)
    report = entry["outputs"]["22"]["text"][0]
    assert "3 pictures" in report
    assert "bucket 56x64: 3" in report or "bucket 56x72: 3" in report or "bucket 48x72: 3" in report, report
    assert "trained" in entry["outputs"]["3"]["text"][0]
