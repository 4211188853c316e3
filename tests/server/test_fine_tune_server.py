"""Tests of full fine-tuning in the real server: core's merge into a checkpoint, resuming, and DreamBooth."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from tests.support import graphs, runs
from tests.support.server import PromptError, PromptInterrupted
from tests.toy import world

TEXT = "a large sks toy on a red background"


@pytest.fixture
def dataset(server, request):
    """Write four pictures below input/; folder name and one caption are the test's own, so that runs stay separate."""
    name = "".join(letter for letter in request.node.name if letter.isalnum())[4:44]
    folder = server.path("input", name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(4):
        for ending in ("png", "txt"):
            shutil.copy(world.CONCEPT_FOLDER / "toy" / f"{number:02d}.{ending}", folder)
    (folder / "00.txt").write_text(f"a large sks toy on a blue background, {name}")
    return folder


def fine_tune(folder, steps, option_nodes=None, **widgets):
    """Return a graph of checkpoint, dataset and trainer (node 3)."""
    prompt = graphs.training(folder, steps, option_nodes=option_nodes)
    values = {name: value for name, value in prompt["3"]["inputs"].items() if name != "rank"}
    prompt["3"] = graphs.node("GraftFineTune", **{**values, "learning_rate": 1e-4, "batch_size": 2, **widgets})
    return prompt


def pixels(server, entry, node):
    return [np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in server.download(entry, node)]


def test_core_merges_it_into_a_checkpoint_that_draws_the_same(make_server, tiny_base):
    """A fresh server draws the same picture from the file as the graph drew from its own wire.

    The text encoder is trained too, and the file holds it beside the model.
    """
    server = make_server()
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "toy"))
    server.start()
    prompt = fine_tune("toy", 3, runs.option_nodes(server, GraftAdapterOptions={"text_encoder": "on"}))
    prompt["9"] = graphs.node("CheckpointSave", model=["3", 0], clip=["3", 1], vae=["1", 2],
                              filename_prefix="checkpoints/tuned")  # fmt: skip
    prompt["10"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix="tuned", format="kohya")
    tuned = graphs.sampling(prompt, TEXT, ["3", 0], ["3", 1], "tuned", steps=4)
    plain = graphs.sampling(prompt, TEXT, ["1", 0], ["1", 1], "plain", steps=4, start=200)
    entry = server.run(prompt, timeout=600)
    shown, before = pixels(server, entry, tuned), pixels(server, entry, plain)
    assert shown != before
    (merged,) = server.path("output", "checkpoints").glob("tuned*.safetensors")
    adapter = entry["outputs"]["10"]["text"][0].split("/loras/")[1]
    log = server.read_log()
    assert "not loaded" not in log and "SHAPE MISMATCH" not in log
    server.stop()
    with safe_open(merged, "np") as new, safe_open(tiny_base, "np") as old:
        names = [name for name in old.keys() if name.startswith("model.diffusion_model.")]  # noqa: SIM118
        changed = [name for name in names if not np.array_equal(new.get_tensor(name), old.get_tensor(name))]
        assert changed == names
        text = [name for name in old.keys() if ".encoder.layers." in name and name.startswith("cond_stage")]  # noqa: SIM118
        assert text
        same_text = [name for name in text if np.array_equal(new.get_tensor(name), old.get_tensor(name))]
        assert same_text == []
    server.start()
    again = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=merged.name)}
    loaded = graphs.sampling(again, TEXT, ["1", 0], ["1", 1], "loaded", steps=4)
    assert pixels(server, server.run(again), loaded) == shown
    again = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)}
    again["2"] = graphs.node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=adapter, strength_model=1.0,
                             strength_clip=1.0)  # fmt: skip
    applied = graphs.sampling(again, TEXT, ["2", 0], ["2", 1], "applied", steps=4)
    assert pixels(server, server.run(again), applied) == shown


def test_cancelled_it_keeps_what_was_reached_and_goes_on_to_the_same_bits(server, tiny_base, dataset):
    with server.listen() as events:
        queued = server.queue(fine_tune(dataset.name, 500), client_id=events.client_id)
        events.wait_for("graft.progress", timeout=300, event="step", step=2)
        server.interrupt()
        with pytest.raises(PromptInterrupted):
            server.wait(queued, timeout=300)
    (run,) = runs.list_runs(server, dataset.name)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reached = [line["step"] for line in lines if line["event"] == "step"][-1]
    assert reached >= 2
    assert runs.adapter_of(server, run, reached)
    entry = server.run(fine_tune(dataset.name, reached + 2), timeout=300)
    assert f"{reached + 2} steps trained; " in entry["outputs"]["3"]["text"][0]
    resumed = runs.adapter_of(server, run, reached + 2)
    fresh = runs.option_nodes(server, GraftRunOptions={"on_existing": "new"})
    server.run(fine_tune(dataset.name, reached + 2, fresh), timeout=600)
    assert runs.same(resumed, runs.adapter_of(server, runs.list_runs(server, dataset.name)[1], reached + 2))
    returned = server.run(
        fine_tune(dataset.name, reached + 2, runs.option_nodes(server, GraftPreviewOptions={})), timeout=300
    )
    assert "returned without training" in returned["outputs"]["3"]["text"][0]


def test_dreambooth_trains_all_weights_and_says_with_what(server, tiny_base, dataset):
    for caption in dataset.glob("*.txt"):
        caption.unlink()
    prompt = fine_tune(dataset.name, 2)
    values = {**prompt["3"]["inputs"], "rank": 16, "learning_rate": 0.0, "instance_prompt": "a large sks circle"}
    values.update(class_prompt="a large circle", class_images=2, prior_weight=1.0, train="all weights")
    for prior, words in (("class images", "2 drawn"), ("differential", "held to the base model's predictions")):
        prompt["3"] = graphs.node("GraftTrainDreamBooth", **values, prior=prior)
        entry = server.run(prompt, timeout=600)
        text = entry["outputs"]["3"]["text"][0]
        assert "all weights for SD1" in text and "learning rate 5e-06" in text and words in text
    found = runs.list_runs(server, dataset.name)
    assert len(found) == 2
    for run in found:
        recipe = json.loads((run / "recipe.json").read_text())["recipe"]
        assert (recipe["method"], recipe["rank"], recipe["ema_decay"]) == ("all weights", 0, 0.999)
        assert any(tensor.any() for tensor in runs.adapter_of(server, run, 2).values())


def test_previews_draw_what_was_trained(server, tiny_base, dataset):
    previews = runs.option_nodes(server, GraftPreviewOptions={"prompts": TEXT, "every": 2, "steps": 2})
    prompt = fine_tune(dataset.name, 2, previews, learning_rate=1e-3)
    server.run(prompt, timeout=300)
    (run,) = runs.list_runs(server, dataset.name)
    before, after = sorted((run / "samples").iterdir())
    assert before.read_bytes() != after.read_bytes()


def test_only_the_hosts_form_is_written(server, tiny_base, dataset):
    prompt = fine_tune(dataset.name, 1)
    prompt["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix="x", format="diffusers")
    with pytest.raises(PromptError, match="Graft Save Adapter.*'format'.*diffusers"):
        server.run(prompt, timeout=300)
