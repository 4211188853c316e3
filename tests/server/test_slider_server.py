"""Tests of Graft Train Slider in the real server: with pairs of pictures, as a job, refusals at the input."""

import json
import shutil

import pytest

from tests.support import graphs
from tests.support.server import PromptError
from tests.toy import world

pytestmark = pytest.mark.server


@pytest.fixture
def slider(server):
    """Return slider(**widgets), a prompt of checkpoint and slider; node 3 is the trainer."""

    def make(**widgets):
        values = graphs.defaults_of(server.object_info("GraftTrainSlider")["GraftTrainSlider"])
        prompt = graphs.training("unused", 2)
        del prompt["2"]
        texts = {"target": "a purple circle", "positive": "a red circle", "negative": "a blue circle"}
        values |= {"anchors": "a green heart", **texts, "steps": 2, "resolution": 64, "rank": 4, **widgets}
        links = {name: ["1", place] for place, name in enumerate(("model", "clip", "vae"))}
        prompt["3"] = graphs.node("GraftTrainSlider", **links, **values)
        return prompt

    return make


def test_pairs_train_a_slider(server, slider):
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "slider-plus"), dirs_exist_ok=True)
    shutil.copytree(world.CONCEPT_FOLDER / "tint", server.path("input", "slider-minus"), dirs_exist_ok=True)
    prompt = slider(positive="", negative="", dataset=["2", 0])
    prompt["2"] = graphs.node(
        "GraftLoadDataset", folder="slider-plus", trigger="", resolution=64, repeats=1, control_folder="slider-minus"
    )
    prompt["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix="slider", format="kohya")
    outputs = server.run(prompt, timeout=300)["outputs"]
    assert "2 steps trained" in outputs["3"]["text"][0]
    assert "slider at strength 1, 1 anchors" in outputs["3"]["text"][0]


def test_a_slider_is_written_as_a_job(server, slider):
    (text,) = server.run(slider(run="as a job"), timeout=300)["outputs"]["3"]["text"]
    with open(text.removeprefix("Job: ") + "/job.json", encoding="utf-8") as file:
        recipe = json.load(file)["recipe"]
    assert recipe["slider_prompts"] == [["a purple circle", "a red circle", "a blue circle"]]


def test_a_wrong_text_is_refused_at_its_input(server, slider):
    with pytest.raises(PromptError, match="input 'positive': positive and negative are both"):
        server.run(slider(positive="a circle", negative="a circle"), timeout=60)
