"""Tests of datasets and captions that the graph saves, in the real server."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support import graphs
from tests.support.server import PromptError, PromptRefused
from tests.toy import world


@pytest.fixture
def folder(server, request):
    """Copy three of the concept's pictures into a fresh folder below input/, named like the test."""
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    path = server.path("input", name)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for number in range(3):
        for ending in ("png", "txt"):
            shutil.copy(world.CONCEPT_FOLDER / "toy" / f"0{number}.{ending}", path)
    yield path
    for made in server.path("input").glob(f"{name}*"):
        shutil.rmtree(made)


def saving(folder, name, **widgets):
    """Return a prompt that saves a folder's pictures and captions under another name; node 4 saves them."""
    widgets = {"folder": name, "existing": "keep", "trigger": "sks", "resolution": 64, **widgets}
    return {
        "2": graphs.node("GraftLoadDataset", folder=folder, trigger="", resolution=0, repeats=1),
        "3": graphs.node("GraftImagesFromDataset", dataset=["2", 0], only_without_caption=False, most=0),
        "4": graphs.node("GraftSaveDataset", images=["3", 0], captions=["3", 1], **widgets),
    }


def captioning(folder, text, **widgets):
    """Return a prompt in which a node that takes one text at a time stands for a captioner; node 5 saves."""
    prompt = saving(folder, "unused")
    prompt["3"]["inputs"].update(widgets)
    prompt["4"] = graphs.node("StringConcatenate", string_a=["3", 1], string_b=text, delimiter="")
    prompt["5"] = graphs.node("GraftSaveCaptions", dataset=["3", 2], captions=["4", 0])
    return prompt


def texts_in(folder):
    return {path.name: path.read_text() for path in folder.glob("*.txt*")}


def test_what_the_graph_made_is_saved_and_trains_like_the_loaded_folder(server, tiny_base, folder):
    """A list of pictures, a list of captions and one mask for all. Queued again, it writes nothing."""
    name = f"{folder.name}saved"
    prompt = saving(folder.name, name, masks=["6", 0])
    prompt["6"] = graphs.node("SolidMask", value=0.5, width=16, height=16)
    prompt |= {"1": graphs.training("x", 2)["1"], "7": graphs.training("x", 2)["3"]}
    prompt["7"]["inputs"]["dataset"] = ["4", 0]
    entry = server.run(prompt)
    saved = server.path("input", name)
    assert entry["outputs"]["4"]["text"] == [f"{saved}: 3 written, 0 kept."]
    assert "2 steps trained" in entry["outputs"]["7"]["text"][0]
    for number in range(3):
        first, second = folder / f"0{number}.png", saved / f"0000{number + 1}.png"
        assert np.array_equal(Image.open(first).convert("RGB"), Image.open(second))
        assert (saved / f"0000{number + 1}.txt").read_text() == first.with_suffix(".txt").read_text().strip()
        assert np.unique(Image.open(saved / f"0000{number + 1}-masklabel.png")).tolist() == [128]
    assert len(list(saved.iterdir())) == 9
    entry = server.run(prompt)
    assert entry["outputs"]["4"]["text"] == [f"{saved}: 0 written, 3 kept."]
    loading = graphs.training(name, 2, trigger="sks")
    assert "returned without training" in server.run(loading)["outputs"]["3"]["text"][0]


def test_an_edit_in_the_saved_folder_is_noticed_and_kept(server, folder):
    """The node runs again although the graph is the same; another picture for a number is told."""
    prompt = saving(folder.name, f"{folder.name}-a")
    server.run(prompt)
    saved = server.path("input", f"{folder.name}-a")
    (saved / "00001.txt").write_text("by hand")
    Image.new("RGB", (64, 64)).save(saved / "00002.png")
    prompt["5"] = graphs.node("GraftInspectDataset", dataset=["4", 0])
    entry = server.run(prompt)
    assert (saved / "00001.txt").read_text() == "by hand"
    warning = "kept 1 file although another picture arrived: 00002.png. Set existing to replace"
    assert warning in entry["outputs"]["4"]["text"][0]
    assert warning in entry["outputs"]["5"]["text"][0]


def test_a_folder_is_captioned_in_steps_and_the_old_texts_stay(server, folder):
    (folder / "01.txt").unlink()
    (folder / "02.txt").unlink()
    old = (folder / "00.txt").read_text()
    entry = server.run(captioning(folder.name, "new", only_without_caption=True, most=1))
    assert entry["outputs"]["5"]["text"] == ["1 of 1 captions written."]
    assert texts_in(folder) == {"00.txt": old, "01.txt": "new"}
    server.run(captioning(folder.name, "new", only_without_caption=True, most=1))
    with pytest.raises(PromptError) as caught:
        server.run(captioning(folder.name, "new", only_without_caption=True, most=1))
    message = caught.value.error["exception_message"]
    assert "Graft Images from Dataset (node 3), input 'only_without_caption': Every picture of" in message
    for text in (", once", ", twice"):
        assert server.run(captioning(folder.name, text))["outputs"]["5"]["text"] == ["3 of 3 captions written."]
    firsts = {"00": old.strip(), "01": "new", "02": "new"}
    expected = {f"{number}.txt": f"{first}, once, twice" for number, first in firsts.items()}
    backups = {"00.txt.bak": old, "01.txt.bak": "new", "02.txt.bak": "new"}
    assert texts_in(folder) == {**expected, **backups}


def test_counts_that_do_not_match_are_named_and_nothing_is_written(server, folder):
    before = texts_in(folder)
    prompt = captioning(folder.name, "x")
    prompt["6"] = graphs.node("GraftImagesFromDataset", dataset=["2", 0], only_without_caption=False, most=2)
    prompt["5"]["inputs"]["dataset"] = ["6", 2]
    with pytest.raises(PromptError, match="input 'captions': 3 captions arrived for 2 pictures"):
        server.run(prompt)
    prompt = saving(folder.name, f"{folder.name}-b")
    prompt["6"] = graphs.node("GraftImagesFromDataset", dataset=["2", 0], only_without_caption=False, most=2)
    prompt["4"]["inputs"]["images"] = ["6", 0]
    with pytest.raises(PromptError, match="input 'captions': 3 captions arrived for 2 pictures"):
        server.run(prompt)
    assert texts_in(folder) == before
    assert not server.path("input", f"{folder.name}-b").exists()


@pytest.mark.parametrize(
    "name", ["../out", "/etc/x", "a/../../x", "", "nul", "a\0b", "way-out", "way-out/x", "x" * 200]
)
def test_a_folder_that_leads_elsewhere_is_refused_before_anything_runs(server, folder, tmp_path, name):
    link = server.path("input", "way-out")
    link.symlink_to(tmp_path, target_is_directory=True)
    try:
        with pytest.raises(PromptRefused, match="input 'folder': "):
            server.queue(saving(folder.name, name))
    finally:
        link.unlink()
    assert not list(tmp_path.iterdir())
