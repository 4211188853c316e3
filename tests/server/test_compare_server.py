"""Tests of Graft Compare against the host: its pictures equal those of core's own nodes, and the grid shows them."""

import io
import shutil

import numpy as np
import pytest
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.tools.compare import grid
from PIL import Image

from tests.support import graphs, runs
from tests.support.server import PromptError
from tests.toy import world

PROMPTS = ["a large sks toy", "a small red circle"]


@pytest.fixture
def compare(comfy):
    from graft_pack.nodes.host.actions import compare

    return compare


@pytest.fixture(scope="module")
def run(server, tiny_base):
    """Train a run with two visibly different saves."""
    folder = server.path("input", "compare")
    shutil.copytree(world.CONCEPT_FOLDER / "toy", folder)
    graph = runs.graph_of(server, folder.name, "compare", 6, save_every=3, keep_last=5)
    graph["3"]["inputs"]["learning_rate"] = 2e-2
    server.run(graph)
    return runs.find_run(server, "compare").name


def graph_of(server, **fields):
    """Return a prompt that compares and saves: single pictures under "pictures", the grid under "grid"."""
    defaults = graphs.defaults_of(server.object_info("GraftCompare")["GraftCompare"])
    values = {**defaults, "prompts": "\n".join(PROMPTS), "resolution": 64, "steps": 2, "cfg": 4.0, "seed": 5, **fields}
    return {
        "1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT),
        "2": graphs.node("GraftCompare", model=["1", 0], clip=["1", 1], vae=["1", 2], **values),
        "grid": graphs.node("SaveImage", images=["2", 0], filename_prefix="grid"),
        "pictures": graphs.node("SaveImage", images=["2", 1], filename_prefix="pictures"),
    }


def opened(server, entry, node):
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in server.download(entry, node)]


def drawn_by_core(server, text, seed, lora=None, strength=1.0):
    graph = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)}
    source = "1"
    if lora:
        run, step = lora.removesuffix(".safetensors").split("/step-")
        # The host's own loader lists the picked save.
        name = server.post(f"/graft/runs/{run}/pick", {"step": int(step)})["adapter"]
        graph["2"] = graphs.node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=name, strength_model=strength,
                                 strength_clip=strength)  # fmt: skip
        source = "2"
    saved = graphs.sampling(graph, text, [source, 0], [source, 1], "core", seed=seed, steps=2)
    graph["103"]["inputs"]["scheduler"] = "normal"
    return opened(server, server.run(graph), saved)[0]


@pytest.mark.server
def test_its_pictures_are_what_core_draws(server, run):
    saves = [f"{run}/step-{step:08d}.safetensors" for step in (3, 6)]
    graph = graph_of(server, files=f"{run}/*", strengths="0 0.5, 1", scheduler="normal")
    entry = server.run(graph)
    pictures = opened(server, entry, "pictures")
    columns = [(None, 0), *[(save, strength) for save in saves for strength in (0.5, 1.0)]]
    assert len(pictures) == len(PROMPTS) * len(columns)
    for row, text in enumerate(PROMPTS):
        for place, (save, strength) in enumerate(columns):
            wanted = drawn_by_core(server, text, 5 + row, save, strength)
            found = pictures[row * len(columns) + place]
            assert np.abs(found.astype(int) - wanted).max() <= 2, (text, save, strength)
    # The grid shows each picture in its row and column.
    (sheet,) = opened(server, entry, "grid")
    left, top = sheet.shape[1] - len(columns) * 68, sheet.shape[0] - len(PROMPTS) * 68
    for number, picture in enumerate(pictures):
        row, place = divmod(number, len(columns))
        down, across = top + 68 * row, left + 68 * place
        assert np.array_equal(sheet[down : down + 64, across : across + 64], picture)
    assert entry["outputs"]["2"]["images"], "the node shows it"


@pytest.mark.server
def test_adapters_by_wire_and_a_run_that_has_made_more(server, run):
    graph = graph_of(server, files=f"{run}/step-*", strengths="1", prompts=PROMPTS[0])
    graph["3"] = graphs.node("GraftLoadAdapter", adapter_name=f"{run}/step-00000003.safetensors")
    graph["2"]["inputs"]["adapter_b"] = ["3", 0]
    pictures = opened(server, server.run(graph), "pictures")
    assert len(pictures) == 3 and np.array_equal(pictures[0], pictures[1]) and not np.array_equal(*pictures[1:])
    folder = server.path("output", "graft", run, "adapters")
    shutil.copy(folder / "step-00000006.safetensors", folder / "step-00000009.safetensors")
    try:
        assert len(opened(server, server.run(graph), "pictures")) == 4, "the host does not answer from its cache"
    finally:
        (folder / "step-00000009.safetensors").unlink()


@pytest.mark.server
@pytest.mark.parametrize(
    "fields, said",
    [
        ({"prompts": " \n "}, "input 'prompts': There is no prompt"),
        ({}, "input 'files': There is nothing to compare"),
        ({"files": "nosuch*"}, "input 'files': No LoRA file matches 'nosuch*'"),
        ({"strengths": "1, strong"}, "input 'strengths': 'strong' is not a strength"),
        ({"strengths": "nan"}, "input 'strengths': 'nan' is not a strength"),
        ({"files": "*", "prompts": "x\n" * 300}, "300 prompts with"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_input_and_cure(server, run, fields, said):
    with pytest.raises(PromptError) as caught:
        server.run(graph_of(server, **fields))
    assert said in str(caught.value) and "Graft Compare (node 2)" in str(caught.value)


@pytest.mark.server
def test_the_loss_of_a_run_is_drawn(server, run):
    graph = runs.graph_of(server, "compare", "compare", 6, save_every=3, keep_last=5)
    graph["3"]["inputs"]["learning_rate"] = 2e-2
    graph["7"] = graphs.node("GraftPlotLoss", loss=["3", 3], loss_b=["3", 3], smoothing=0.5, log_scale=True)
    graph["8"] = graphs.node("GraftPlotLoss", loss=["3", 3], smoothing=0.5, log_scale=False, plot="loss by timestep")
    graph["9"] = graphs.node("LossGraphNode", loss=["3", 3], filename_prefix="core")
    entry = server.run(graph)
    pictures = [opened(server, entry, node)[0] for node in ("7", "8")]
    assert all(picture.shape == (500, 900, 3) and picture.std() > 5 for picture in pictures), "the node shows it"
    assert not np.array_equal(*pictures)
    assert entry["outputs"]["9"]["images"], "the host's own node takes it too"


def test_a_loss_that_tells_of_no_timesteps_is_refused_with_input_and_cure(comfy):
    from graft_pack.nodes.tools import GraftPlotLoss

    with pytest.raises(SettingsError, match="input 'loss': The connected loss has no loss by timestep") as caught:
        GraftPlotLoss.execute({"loss": [0.5, 0.25]}, 0.5, False, plot="loss by timestep")
    assert "Set plot to loss" in caught.value.cure


def test_the_plain_model_has_its_place_in_the_row_of_one_adapter(compare):
    request = compare.CompareRequest("x", "-2, -1, 0, 1, 2", "", "", 1, 0.0, "auto", "auto", 0, 0)
    columns = compare.columns_of(request, {"adapter": {"key": None}, "adapter b": None})
    assert [column.strength for column in columns] == [-2, -1, 0, 1, 2]
    assert (columns[2].label, columns[2].adapter) == ("base", None)


def test_columns_have_names_that_tell_them_apart(compare, monkeypatch):
    names = ["a-00000001/step-00000003.safetensors", "b/step-00000003.safetensors", "other.safetensors"]
    monkeypatch.setattr(compare.paths, "adapter_choices", lambda: names)
    wish = compare.CompareRequest("x", "1, 0 1,-0.5", "*", "", 1, 0.0, "auto", "auto", 0, 0)
    columns = compare.columns_of(wish, {"adapter": {"key": None}, "adapter b": None})
    assert [column.label for column in columns] == [
        "base",
        "adapter at 1",
        "adapter at -0.5",
        "a-00000001 step 3 at 1",
        "a-00000001 step 3 at -0.5",
        "b step 3 at 1",
        "b step 3 at -0.5",
        "other at 1",
        "other at -0.5",
    ]
    assert compare.files_of("other.safetensors\n*/step-*\n") == [names[2], *names[:2]]
    with pytest.raises(SettingsError):
        compare.strengths_of(" ".join(map(str, range(33))))


@pytest.mark.parametrize("text", ["", "short", "word " * 200, "x" * 3000, "\u4e09\u6bdb\u732b " * 50])
def test_a_label_never_leaves_its_place(text):
    picture = Image.new("RGB", (64, 48), "white")
    made = grid([text, "two"], [text, "b", "c"], [[picture] * 3] * 2)
    assert made.dtype == np.float32 and made.shape[2] == 3 and made.max() <= 1.0
    left, top = made.shape[1] - 3 * 68, made.shape[0] - 2 * 52
    for row in range(2):
        for place in range(3):
            corner = made[top + 52 * row : top + 52 * row + 48, left + 68 * place : left + 68 * place + 64]
            assert (corner == 1.0).all()
