"""Tests of what arrives over wires at the nodes that save datasets, and of what leaves Images from Dataset."""

import math

import numpy as np
import pytest
import torch
from graft_pack.trainers.errors import DatasetError

from docs.build import make_locales

NODES = {node.define_schema().node_id: node for node in make_locales.list_nodes()}


@pytest.fixture
def save(comfy, tmp_path, monkeypatch):
    """Return save(images, captions, **inputs), which saves into tmp_path/a/b and returns the dataset."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))

    def execute(images, captions=("",), **inputs):
        widgets = {"folder": ["a/b"], "existing": ["keep"], "trigger": ["sks"], "resolution": [64]}
        return NODES["GraftSaveDataset"].execute(images=images, captions=list(captions), **widgets, **inputs).args[0]

    return execute


def images(*shades, size=(8, 6), channels=3):
    """Return a batch of even pictures."""
    return torch.tensor(shades).view(-1, 1, 1, 1).expand(-1, *size, channels)


def test_batches_lists_and_single_masks_are_saved_in_their_order(save):
    given = [images(0.0, 0.2), images(0.4, size=(4, 4), channels=4)]
    dataset = save(given, [["one", "two"], "three"], masks=[torch.zeros(2, 8, 6), torch.ones(5, 5)])
    assert [example.captions for example in dataset.examples] == [("one",), ("two",), ("three",)]
    assert [example.size for example in dataset.examples] == [(6, 8), (6, 8), (4, 4)]
    assert (dataset.trigger, dataset.resolution, dataset.name) == ("sks", 64, "b")
    assert [int(np.max(example.mask.open())) for example in dataset.examples] == [0, 0, 255]
    # The third is on white: 0.4 * 0.4 + 0.6.
    shades = [np.unique(example.source.open()).tolist() for example in dataset.examples]
    assert shades == [[0], [51], [194]]


def test_a_mask_and_a_caption_may_be_one_for_all_or_absent(save):
    assert [example.captions for example in save([images(0.0, 0.2)]).examples] == [("",), ("",)]
    dataset = save([images(0.0, 0.2)], ["all"], masks=[torch.ones(8, 6)])
    assert [example.captions for example in dataset.examples] == [("all",), ("all",)]
    assert all(example.mask for example in dataset.examples)
    assert [example.mask for example in save([images(0.5)], masks=[torch.ones(0, 8, 6)]).examples[2:]] == []


@pytest.mark.parametrize(
    "given, more, words",
    [
        ([images(0.0, math.nan)], {}, "contains numbers that are not finite"),
        ([images(0.0)], {"masks": [torch.ones(2, 8, 6)]}, "2 masks arrived for 1 pictures"),
        ([images(0.0, 0.2)], {"captions": ["a", "b", "c"]}, "3 captions arrived for 2 pictures"),
        ([images(0.0)], {"captions": [5]}, "Caption 1 is of type int"),
        ([images()], {}, "No picture arrived"),
    ],
)
def test_wrong_pictures_captions_and_masks_are_named_by_their_input(save, tmp_path, given, more, words):
    """Only numbers are found as the pictures are written; the picture before is complete."""
    named = next(iter(more), "images")
    with pytest.raises(DatasetError, match=f"Graft Save Dataset, input '{named}': .*{words}"):
        save(given, **more)
    assert [path.name for path in tmp_path.rglob("*.*")] == (["00001.png"] if "finite" in words else [])


def test_a_datasets_pictures_go_round_through_the_graph(save, tmp_path):
    dataset = save([images(0.0, 0.2), images(0.4, size=(4, 4))], ["one", "", "three"])
    give, put = NODES["GraftImagesFromDataset"], NODES["GraftSaveCaptions"]
    pictures, captions, chosen = give.execute(dataset=dataset, only_without_caption=False, most=0).args
    assert [tuple(picture.shape) for picture in pictures] == [(1, 8, 6, 3), (1, 8, 6, 3), (1, 4, 4, 3)]
    assert [picture.unique().item() for picture in pictures] == pytest.approx([0.0, 0.2, 0.4], abs=1e-6)
    assert captions == ["one", "", "three"]
    put.execute(dataset=[chosen], captions=[f"new {caption}" for caption in captions])
    pictures, captions, chosen = give.execute(dataset=dataset, only_without_caption=True, most=0).args
    assert (len(pictures), captions, [example.source.name for example in chosen.examples]) == (1, [""], ["00002.png"])
    assert [(tmp_path / "a" / "b" / f"0000{n}.txt").read_text() for n in (1, 2, 3)] == ["new one", "new", "new three"]
