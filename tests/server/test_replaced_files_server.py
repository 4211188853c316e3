"""Tests of files replaced under their name before the same graph is queued again: the old run must not return."""

import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from tests.support import runs
from tests.toy import world

STEPS = 2


def told(server, graph):
    return server.run(graph)["outputs"]["3"]["text"][0]


def write_embedding(server, value):
    folder = server.path("models", "embeddings")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": torch.full((2, 768), value)}, folder / "look.safetensors")


def replace_row(path):
    """Change one value of the vocabulary that earlier versions did not sample."""
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith("token_embedding.weight")]
    tensors[name][-1, -1] += 0.25
    os.remove(path)
    save_file(tensors, path)


def test_replaced_checkpoints_and_embeddings_are_trained_anew(make_server, tiny_base):
    server = make_server()
    folder = server.path("input", "toys")
    shutil.copytree(world.CONCEPT_FOLDER / "toy", folder)
    for picture in list(folder.glob("*.png"))[:4]:
        picture.with_suffix(".txt").write_text("a toy, embedding:look")
    checkpoint = server.path("models", "checkpoints", "mine.safetensors")
    shutil.copy(os.path.realpath(tiny_base), checkpoint)
    write_embedding(server, 0.5)
    server.start()
    graph = runs.graph_of(server, "toys", "replaced", STEPS)
    graph["1"]["inputs"]["ckpt_name"] = checkpoint.name
    assert f"{STEPS} steps trained" in told(server, graph)
    assert f"{STEPS} steps returned without training" in told(server, {**graph, "9": graph["2"]})
    # In the same server, despite the host's own cache.
    write_embedding(server, 0.25)
    assert f"{STEPS} steps trained" in told(server, graph)
    server.stop()
    replace_row(checkpoint)
    server.start()
    assert f"{STEPS} steps trained" in told(server, graph)
    write_embedding(server, 0.5)
    assert f"{STEPS} steps trained" in told(server, graph)
    write_embedding(server, 0.25)
    assert f"{STEPS} steps returned without training" in told(server, graph)
    found = runs.list_runs(server, "replaced")
    assert len(found) == 4
    first, second = (runs.adapter_of(server, run, STEPS) for run in found[:2])
    assert not runs.same(first, second)
