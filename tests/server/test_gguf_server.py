"""Test of training on a GGUF file in the real server, beside the ComfyUI-GGUF pack that GRAFT_GGUF_PACK names."""

import os
import shutil

import pytest
from safetensors.torch import load_file

from tests.support import gguf_models, graphs, runs
from tests.support.server import PromptError, link
from tests.toy import world

PREFIX = "model.diffusion_model."


@pytest.fixture
def server(make_server, tiny_base):
    """Start a server with both packs, the pictures, and the tiny base's UNet in Q8_0."""
    if not os.environ.get(gguf_models.VARIABLE):
        pytest.skip(f"{gguf_models.VARIABLE} names no folder of the ComfyUI-GGUF pack")
    server = make_server()
    link(os.environ[gguf_models.VARIABLE], server.path("custom_nodes", "ComfyUI-GGUF"))
    unet = {key: value for key, value in load_file(tiny_base).items() if key.startswith(PREFIX)}
    folder = server.path("models", "unet")
    folder.mkdir(parents=True, exist_ok=True)
    gguf_models.write(folder / "tiny.gguf", "sd1", gguf_models.tensors(unet, "Q8_0"))
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "toy"))
    with server:
        yield server


def test_gguf_model_trains_draws_and_resumes(server):
    previews = {"prompts": "a large red circle", "every": 2, "steps": 2}
    kinds = {"GraftPreviewOptions": previews, "GraftMemoryOptions": {"offload": "on"}}
    prompt = graphs.training("toy", 2, option_nodes=runs.option_nodes(server, **kinds), batch_size=1)
    prompt["10"] = graphs.node("UnetLoaderGGUF", unet_name="tiny.gguf")
    prompt["3"]["inputs"]["model"] = ["10", 0]
    drawn = graphs.sampling(prompt, "a sks toy", ["3", 0], ["3", 1], "gguf", steps=2)
    entry = server.run(prompt)
    assert len(server.download(entry, drawn)) == 1
    run = runs.find_run(server, "toy")
    assert runs.steps_logged(run) == [1, 2]
    assert (run / "samples" / "step-00000002-1.png").exists()
    names = set(runs.adapter_of(server, run, 2))
    prompt["3"]["inputs"]["steps"] = 3
    server.run(prompt)
    assert runs.find_run(server, "toy") == run
    assert runs.steps_logged(run) == [1, 2, 3]
    # The same keys as on the checkpoint, which is another base.
    server.run(graphs.training("toy", 1, batch_size=1))
    (other,) = set(runs.list_runs(server, "toy")) - {run}
    assert set(runs.adapter_of(server, other, 1)) == names
    inputs = {**prompt["3"]["inputs"], "steps": 2}
    prompt["3"] = graphs.node("GraftFineTune", **{key: inputs[key] for key in inputs if key != "rank"})
    with pytest.raises(PromptError, match="Cannot train all weights of a GGUF model"):
        server.run(prompt)
