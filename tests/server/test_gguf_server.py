"""Tests of training on GGUF files in the real server, beside the ComfyUI-GGUF pack that GRAFT_GGUF_PACK names."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import gguf_models, graphs, models, runs
from tests.support.host import ROOT
from tests.support.server import ComfyServer, PromptError, link
from tests.toy import world

PREFIX = "model.diffusion_model."
# By family: the file's architecture, and a type whose blocks fit the tiny network's layers.
FAMILIES = {
    "Flux": ("flux", "Q4_0"),
    "SD3": ("sd3", "Q5_1"),
    "Lumina 2": ("lumina2", "Q8_0"),
    "ZImage": ("lumina2", "Q4_K"),
    "QwenImage": ("qwen_image", "BF16"),
}
# Weights of a layer that training reads.
LAYER = "double_blocks.0.img_attn.qkv.weight"


def weights_of(name):
    """Return the result of `gguf_models.tensors` for a tiny family."""
    _, kind = FAMILIES[name]
    return gguf_models.tensors(models.patcher(name).model.diffusion_model.state_dict(), kind)


@pytest.fixture(scope="module")
def server(tiny_base, comfy, tmp_path_factory):
    """Start a server with both packs, the pictures, and GGUF files: sound ones and damaged ones."""
    if not os.environ.get(gguf_models.VARIABLE):
        pytest.skip(f"{gguf_models.VARIABLE} names no folder of the ComfyUI-GGUF pack")
    server = ComfyServer(tmp_path_factory.mktemp("gguf"))
    link(tiny_base, server.path("models", "checkpoints", tiny_base.name))
    link(os.environ[gguf_models.VARIABLE], server.path("custom_nodes", "ComfyUI-GGUF"))
    link(ROOT / "tests" / "support" / "tiny_parts.py", server.path("custom_nodes", "tiny_parts.py"))
    folder = server.path("models", "unet")
    folder.mkdir(parents=True, exist_ok=True)
    unet = {key: value for key, value in load_file(tiny_base).items() if key.startswith(PREFIX)}
    gguf_models.write(folder / "tiny.gguf", "sd1", gguf_models.tensors(unet, "Q8_0"))
    for name, (arch, _) in FAMILIES.items():
        gguf_models.write(folder / f"{name}.gguf", arch, weights_of(name))
    write_damaged(folder, weights_of("Flux"))
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "toy"))
    with server:
        yield server


def write_damaged(folder: Path, weights):
    """Write files that lack a layer, end early, or mix types that there are with one that has no formula."""
    gguf_models.write(folder / "lacking.gguf", "flux", {k: v for k, v in weights.items() if k != LAYER})
    whole = (folder / "Flux.gguf").read_bytes()
    (folder / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.gguf").write_bytes(b"")
    mixed = gguf_models.tensors(models.patcher("Flux").model.diffusion_model.state_dict(), "Q8_0")
    mixed = {key: mixed[key] if number % 2 else weights[key] for number, key in enumerate(weights)}
    gguf_models.write(folder / "mixed.gguf", "flux", mixed)


def of_family(server, family, file=None, **widgets):
    """Return a prompt that trains on a family's file, with previews and offloading."""
    previews = {"prompts": "a large red circle", "every": 2, "steps": 2}
    kinds = {"GraftPreviewOptions": previews, "GraftMemoryOptions": {"offload": "on"}}
    name = f"gguf-{file or family}".replace(" ", "")
    nodes = runs.option_nodes(server, GraftRunOptions={"name": name}, **kinds)
    prompt = graphs.training("toy", 2, option_nodes=nodes, batch_size=1, **widgets)
    prompt["10"] = graphs.node("UnetLoaderGGUF", unet_name=f"{file or family}.gguf")
    prompt["1"] = graphs.node("TinyParts", family=family)
    prompt["3"]["inputs"] |= {"model": ["10", 0], "clip": ["1", 0], "vae": ["1", 1]}
    return prompt, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_draws(family, server):
    prompt, name = of_family(server, family)
    drawn = graphs.sampling(prompt, "a sks toy", ["3", 0], ["3", 1], "gguf", steps=2)
    prompt["104"]["inputs"]["vae"] = ["1", 1]
    entry = server.run(prompt)
    assert len(server.download(entry, drawn)) == 1
    run = runs.find_run(server, name)
    assert runs.steps_logged(run) == [1, 2]
    assert (run / "samples" / "step-00000002-1.png").exists()
    assert any("lora_up" in key for key in runs.adapter_of(server, run, 2))


def test_a_file_of_several_types_trains(server):
    prompt, name = of_family(server, "Flux", "mixed")
    server.run(prompt)
    assert runs.steps_logged(runs.find_run(server, name)) == [1, 2]


@pytest.mark.parametrize(
    ("file", "node", "said"),
    [
        ("lacking", "3", f"{LAYER} of the GGUF model cannot be read: the file lacks it"),
        # The pack's own loader reads the files.
        ("truncated", "10", "UnetLoaderGGUF"),
        ("empty", "10", "UnetLoaderGGUF"),
    ],
)
def test_damaged_files_are_refused_by_name(file, node, said, server):
    prompt, name = of_family(server, "Flux", file)
    with pytest.raises(PromptError, match=said) as caught:
        server.run(prompt)
    assert caught.value.error["node_id"] == node
    assert not runs.list_runs(server, name)


def test_a_checkpoint_trains_draws_and_resumes(server):
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
