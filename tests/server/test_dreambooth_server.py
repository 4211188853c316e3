"""Tests of class images and DreamBooth in the real server: drawn once, resumed, and reported to the user."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support import graphs, runs
from tests.support.server import PromptError, PromptInterrupted
from tests.toy import world


@pytest.fixture
def name(request):
    """Return the test's own name for its class prompt and its folder, cut to a valid folder name's length."""
    return "".join(letter for letter in request.node.name if letter.isalnum())[4:40]


@pytest.fixture
def folder(server, name):
    """Create six pictures of the new object below input/, without captions."""
    path = server.path("input", name)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for number in range(6):
        shutil.copy(world.CONCEPT_FOLDER / "toy" / f"{number:02d}.png", path)
    # The content decides a run's identity, so a picture of its own gives the test its own runs.
    Image.fromarray(np.full((64, 64, 3), sum(name.encode()) % 255, np.uint8)).save(path / "05.png")
    return path


def drawing(prompt, count=3, **widgets):
    """Return a prompt that draws class images; node 5 draws them, node 6 saves its output."""
    values = {
        "steps": 2,
        "cfg": 0.0,
        "resolution": 64,
        "seed": 0,
        "negative_prompt": "",
        "sampler_name": "auto",
        "scheduler": "auto",
        "batch_size": 1,
        **widgets,
    }
    graph = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)}
    base = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph["5"] = graphs.node("GraftClassImages", **base, class_prompt=prompt, count=count, **values)
    return graph


def dreambooth(folder, class_prompt, **widgets):
    """Return a graph with six pictures, a class and two steps; node 3 trains."""
    graph = graphs.training(folder, 2)
    values = {**graph["3"]["inputs"], "batch_size": 2, "instance_prompt": "a large sks circle"}
    values.update({"class_prompt": class_prompt, "class_images": 2, "prior_weight": 1.0, "train": "LoRA", **widgets})
    graph["3"] = graphs.node("GraftTrainDreamBooth", **values)
    return graph


def folders(server, name):
    """Return the class-image folders of a prompt that begins with the test's name."""
    return sorted(server.path("output", "graft", "class_images").glob(f"{name}*"))


def contents(folder):
    """Return {file name: (bytes, time of writing)} of the pictures in a folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.glob("*.png"))}


def text_of(entry, node="3"):
    return entry["outputs"][node]["text"][0]


def test_class_images_are_drawn_once_extended_and_handed_on(server, tiny_base, name):
    graph = drawing(f"{name} circle")
    graph["6"] = graphs.node("SaveImage", images=["5", 1], filename_prefix=name)
    entry = server.run(graph)
    (made,) = folders(server, name)
    first = contents(made)
    assert list(first) == ["00000.png", "00001.png", "00002.png"]
    assert len({data for data, _ in first.values()}) == 3
    assert json.loads((made / "settings.json").read_text())["size"] == [64, 64]
    # The shown and the returned pictures are exactly those on disk.
    for node in ("5", "6"):
        shown = server.download(entry, node)
        assert [_pixels(data) for data in shown] == [_pixels(data) for data, _ in first.values()]
    # Another batch size, so that the files on disk answer and not the host's cache.
    server.run(drawing(f"{name} circle", batch_size=2))
    assert contents(made) == first
    server.run(drawing(f"{name} circle", count=5))
    more = contents(made)
    assert list(more) == [f"{number:05}.png" for number in range(5)]
    assert {file: more[file] for file in first} == first
    server.run(drawing(f"{name} circle", count=2))
    assert contents(made) == more
    assert folders(server, name) == [made]


def _pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes()


def test_what_decides_a_picture_has_a_folder_of_its_own_and_the_rest_has_not(server, tiny_base, name):
    server.run(drawing(f"{name} circle", 1))
    for number, widgets in enumerate(
        ({"seed": 1}, {"steps": 3}, {"cfg": 2.0}, {"resolution": 72}, {"negative_prompt": "red"}, {"scheduler": "beta"})
    ):
        server.run(drawing(f"{name} circle", 1, **widgets))
        assert len(folders(server, name)) == number + 2, widgets
    graph = drawing(f"{name} circle", 1)
    graph["7"] = graphs.node("ModelSamplingDiscrete", model=["1", 0], sampling="eps", zsnr=True)
    graph["5"]["inputs"]["model"] = ["7", 0]
    server.run(graph)
    assert len(folders(server, name)) == 8
    server.run(drawing(f"{name} circle", 1, batch_size=2, cfg=7.0, sampler_name="euler", scheduler="normal"))
    assert len(folders(server, name)) == 8


@pytest.mark.parametrize("sampler_name", ["auto", "dpmpp_2m", "euler_ancestral", "dpmpp_sde"])
def test_a_picture_does_not_hang_on_how_many_are_drawn_beside_it(server, tiny_base, name, sampler_name):
    """Picture i has the seed + i, whatever the count, the batch size, or the first picture to draw."""
    way = {"sampler_name": sampler_name}
    name = f"{sampler_name.replace('_', '')}{name}"[:40]
    server.run(drawing(f"{name} circle", 4, batch_size=4, **way))
    (made,) = folders(server, name)
    together = contents(made)
    for path in sorted(made.glob("*.png"))[1:]:
        path.unlink()
    (made / "00000.png").write_bytes(together["00000.png"][0][:200])
    server.run(drawing(f"{name} circle", 4, **way))
    for file, (data, _) in contents(made).items():
        alone, beside = (np.asarray(Image.open(io.BytesIO(one)), dtype=int) for one in (data, together[file][0]))
        assert abs(alone - beside).max() <= 1
    server.run(drawing(f"{name} circle", 1, seed=3, **way))
    (other,) = [path for path in folders(server, name) if path != made]
    assert _pixels((other / "00000.png").read_bytes()) == _pixels((made / "00003.png").read_bytes())


def test_cancelled_between_pictures_it_goes_on(server, tiny_base, name):
    with server.listen() as events:
        queued = server.queue(drawing(f"{name} circle", 500, steps=4), client_id=events.client_id)
        server.poll(lambda: folders(server, name) and len(contents(folders(server, name)[0])) >= 2, 120, "two pictures")
        server.interrupt()
        with pytest.raises(PromptInterrupted):
            server.wait(queued)
    (made,) = folders(server, name)
    reached = contents(made)
    assert 2 <= len(reached) < 500
    assert not [path for path in made.iterdir() if path.suffix not in (".png", ".json")]
    server.run(drawing(f"{name} circle", len(reached) + 1, steps=4))
    after = contents(made)
    assert len(after) == len(reached) + 1
    assert {file: after[file] for file in reached} == reached


def test_dreambooth_draws_what_is_missing_and_is_resumed_and_extended_like_every_run(server, tiny_base, folder, name):
    graph = dreambooth(folder.name, f"{name} circle")
    entry = server.run(graph)
    assert "2 steps trained" in text_of(entry)
    assert "0 from class_dataset, 0 reused and 2 drawn" in text_of(entry)
    (made,) = folders(server, name)
    (run,) = runs.list_runs(server, folder.name)
    recipe = json.loads((run / "recipe.json").read_text())
    assert (recipe["images"], recipe["class_images"]) == (6, 2)
    assert recipe["recipe"]["trigger"] == "a large sks circle"
    drawn = contents(made)
    graph["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix=name, format="kohya")
    graph["3"]["inputs"]["options"] = ["50", 0]
    graph["50"] = graphs.node(
        "GraftRunOptions", **graphs.defaults_of(server.object_info("GraftRunOptions")["GraftRunOptions"])
    )
    entry = server.run(graph)
    assert "returned without training" in text_of(entry)
    assert "2 reused and 0 drawn" in text_of(entry)
    server.run(dreambooth(folder.name, f"{name} circle", steps=4))
    assert runs.list_runs(server, folder.name) == [run]
    assert contents(made) == drawn
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    # The class images' own node draws the same ones by its defaults.
    server.run(drawing(f"{name} circle", 2, steps=20))
    assert folders(server, name) == [made]


def test_class_images_of_ones_own_count_and_the_rest_is_drawn(server, tiny_base, folder, name):
    own = server.path("input", f"{name}own")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    for number in range(2):
        shutil.copy(world.CONCEPT_FOLDER / "tint" / f"{number:02d}.png", own)
    graph = dreambooth(folder.name, f"{name} circle", class_images=3, class_dataset=["4", 0])
    graph["4"] = graphs.node("GraftLoadDataset", folder=own.name, trigger="", resolution=64, repeats=1)
    assert "2 from class_dataset, 0 reused and 1 drawn" in text_of(server.run(graph))
    graph["3"]["inputs"]["class_images"] = 1
    assert "Class images: 2 from class_dataset." in text_of(server.run(graph))


def test_what_is_drawn_besides_given_class_images_is_never_the_same_as_those(server, tiny_base, folder, name):
    graph = dreambooth(folder.name, f"{name} circle", class_images=2, class_dataset=["5", 0])
    graph["5"] = drawing(f"{name} circle", 1, steps=20)["5"]
    assert "1 from class_dataset, 0 reused and 1 drawn" in text_of(server.run(graph))
    (made,) = folders(server, name)
    assert list(contents(made)) == ["00000.png", "00001.png"]
    (run,) = runs.list_runs(server, folder.name)
    assert json.loads((run / "recipe.json").read_text())["class_images"] == 2


def test_without_a_prior_it_is_a_training_on_the_prompt_alone(server, tiny_base, folder, name):
    texts = []
    for widgets in ({"class_images": 0}, {"prior_weight": 0.0}, {"prior": "differential", "prior_weight": 0.0}):
        texts.append(text_of(server.run(dreambooth(folder.name, f"{name} circle", **widgets))))
    assert not folders(server, name)
    assert len(runs.list_runs(server, folder.name)) == 1
    assert "2 steps trained" in texts[0]
    assert all("returned without training" in text for text in texts[1:])
    assert all("class is not preserved" in text for text in texts)
    text = text_of(server.run(dreambooth(folder.name, f"{name} circle", prior="differential")))
    assert f"The class is held to the base model's predictions for '{name} circle', weight 1" in text
    assert len(runs.list_runs(server, folder.name)) == 2
    for prior, class_prompt, target in (
        ("differential, several prompts", f"{name} circle | ", f"'{name} circle', ''"),
        ("differential, by caption", f"{name} circle", f"'{name} circle' in place of "),
    ):
        text = text_of(server.run(dreambooth(folder.name, class_prompt, prior=prior)))
        assert f"predictions for {target}" in text and "2 steps trained" in text
    assert len(runs.list_runs(server, folder.name)) == 4
    assert not folders(server, name)


def test_captions_of_their_own_are_kept(server, tiny_base, folder, name):
    (folder / "01.txt").write_text("a sks circle of my own")
    graph = dreambooth(folder.name, f"{name} circle", class_images=0, instance_prompt="")
    with pytest.raises(PromptError) as caught:
        server.run(graph)
    assert "'instance_prompt'" in caught.value.error["exception_message"]
    for number in range(6):
        (folder / f"{number:02d}.txt").write_text("a sks circle of my own")
    assert "2 steps trained" in text_of(server.run(graph))


def test_prior_preservation_for_any_trainer_and_in_the_report(server, tiny_base, folder, name):
    graph = graphs.training(folder.name, 2, trigger="sks")
    graph.update(drawing(f"{name} circle", 3))
    graph["6"] = graphs.node("GraftPriorPreservation", dataset=["2", 0], class_dataset=["5", 0], weight=0.5)
    graph["3"]["inputs"]["dataset"] = ["6", 0]
    graph["7"] = graphs.node("GraftInspectDataset", dataset=["6", 0], model=["1", 0], clip=["1", 1], vae=["1", 2])
    entry = server.run(graph)
    report = text_of(entry, "7")
    assert "6 pictures, 6 in an epoch" in report
    assert "Plus 3 class images, weight 0.5; an epoch shows 6 of them, in turn" in report
    assert "2 steps trained" in text_of(entry)
    graph["6"]["inputs"]["weight"] = 0.0
    graph["3"]["inputs"]["dataset"] = ["2", 0]
    plain = server.run(graph)
    graph["3"]["inputs"]["dataset"] = ["6", 0]
    assert "returned without training" in text_of(server.run(graph))
    assert "2 steps trained" in text_of(plain)


@pytest.mark.parametrize(
    "widgets, words",
    [
        ({"train": "all weights"}, ["'train'", "Cannot train 'all weights'", "Choose 'LoRA'"]),
        ({"instance_prompt": ""}, ["'instance_prompt'", "is empty", "a photo of sks dog"]),
        ({"class_prompt": " "}, ["'class_prompt'", "is empty", "a photo of a dog"]),
        ({"class_prompt": "a large sks circle"}, ["'class_prompt'", "stands for the subject", "the class alone"]),
        (
            {"class_prompt": "a large sks circle", "prior": "differential"},
            ["'class_prompt'", "stands for the subject", "the class alone"],
        ),
    ],
    ids=["train", "instance_prompt", "class_prompt", "same", "same differential"],
)
def test_errors_name_node_input_and_cure(server, tiny_base, folder, widgets, words):
    from graft_pack.trainers.methods import METHODS

    if widgets.get("train") in METHODS:
        pytest.skip("there is such a method now")
    with pytest.raises(PromptError) as caught:
        server.run(dreambooth(folder.name, **{"class_prompt": "a large circle", **widgets}))
    message = caught.value.error["exception_message"]
    assert all(word in message for word in ["Graft Train DreamBooth (node 3)", *words]), message


def test_class_images_with_the_subjects_trigger_are_refused(server, tiny_base, folder):
    graph = graphs.training(folder.name, 2, trigger="sks")
    graph["6"] = graphs.node("GraftPriorPreservation", dataset=["2", 0], class_dataset=["2", 0], weight=1.0)
    graph["3"]["inputs"]["dataset"] = ["6", 0]
    with pytest.raises(PromptError) as caught:
        server.run(graph)
    message = caught.value.error["exception_message"]
    assert all(word in message for word in ["Graft Prior Preservation", "'class_dataset'", "'sks'"]), message
