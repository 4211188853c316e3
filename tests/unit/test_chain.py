"""Tests of trainings that start from what the graph gives: an adapter of another training, or an embedding."""

import os
import re
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.engine import job as jobs
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
from graft_pack.trainers.engine.session import run_recipe
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.formats.adapter import Adapter, as_adapter, load_adapter, save_adapter
from graft_pack.trainers.formats.kohya import ranks_of
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.runs.records import read_recipe
from graft_pack.trainers.tools.extract import resize

from tests.support import diffusers_host, models
from tests.support.diffusers_host import LayeredEncoder, make_dataset, make_host, run_session, same_state, state_of

STILL = {"steps": 1, "learning_rate": 1e-12}
TEXT = {"text_encoder": True, "text_encoder_rank": 2, "text_encoder_learning_rate": 1e-2}
WORD = {
    "method": "embedding",
    "rank": 0,
    "alpha": 0.0,
    "embedding_name": "my-word",
    "embedding_vectors": 2,
    "embedding_learning_rate": 1e-2,
    "embedding_templates": "object",
}


def starting(start, text=None):
    return replace(make_host(text=text), start=start)


def tensors_of(adapter):
    return adapter.native.all_tensors() if adapter.native is not None else dict(adapter)


def is_near(adapter, other):
    found, expected = tensors_of(adapter), tensors_of(other)
    return found.keys() == expected.keys() and all(
        models.distance(found[name], expected[name]) <= 1e-5 for name in found
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return run_session(tmp_path_factory.mktemp("first"), rank=2, alpha=4.0, steps=2)


@pytest.fixture(scope="module")
def word(tmp_path_factory):
    return run_session(tmp_path_factory.mktemp("word"), embedding_init="red circle", **WORD)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "PiSSA", "OFT", "all weights"])
def test_it_goes_on_from_the_adapter_of_another_run(kind, tmp_path):
    fields = {"method": kind, "rank": 2, "alpha": 2.0, "batch_size": 2}
    fields |= {"rank": 0, "alpha": 0.0, "targets": "all weights"} if kind == "all weights" else {}
    before = run_session(tmp_path, **fields, steps=2)
    after = run_session(tmp_path, host=starting(before.adapter), **{**fields, **STILL})
    assert after.run.name != before.run.name
    assert is_near(after.adapter, before.adapter)
    assert read_recipe(after.run)["made_from"]["start"] == before.run.name
    again = run_session(tmp_path, host=starting(before.adapter), **{**fields, **STILL})
    assert again.resumed_from == again.step == 1


def test_the_tensors_decide_the_run_and_not_their_way(first, tmp_path):
    path = str(tmp_path / "a.safetensors")
    save_adapter(path, first.adapter, "a")
    fields = {"rank": 2, "alpha": 4.0, **STILL}
    by_name = run_session(tmp_path, start_from=path, **fields)
    other = str(tmp_path / "b.safetensors")
    os.rename(path, other)
    by_wire = run_session(tmp_path, host=starting(load_adapter(other)), **fields)
    assert by_wire.run.name == by_name.run.name
    assert by_wire.resumed_from == 1
    changed = Adapter({name: tensor * 1.01 for name, tensor in load_adapter(other).items()})
    assert run_session(tmp_path, host=starting(changed), **fields).run.name != by_name.run.name
    assert run_session(tmp_path, **fields).run.name not in (by_name.run.name, first.run.name)


def test_tensors_of_another_node_are_taken(first, tmp_path):
    """Core's trainer gives a plain dict of tensors under the model's own paths, in half precision."""
    plain = {name: tensor.bfloat16() for name, tensor in first.adapter.items()}
    start = as_adapter(plain)
    after = run_session(tmp_path, host=starting(start), rank=2, alpha=2.0, **STILL)
    expected = run_session(tmp_path / "again", host=starting(start), rank=2, alpha=4.0, **STILL)
    assert ranks_of(start) == {"rank": 2, "alpha": 4.0, "block_ranks": ""}
    for name, tensor in plain.items():
        if name.endswith("lora_up.weight"):
            assert models.distance(expected.adapter[name], tensor.float()) <= 1e-5
            # Half the scale, and twice the values.
            assert models.distance(after.adapter[name], 2 * tensor.float()) <= 1e-5


@pytest.mark.parametrize(
    "fields, message, cure",
    [
        ({"rank": 1}, r"has rank 2 in .+, but this run has rank 1", "set rank to 2, or to 0, .+ Graft Resize Adapter"),
        ({"method": "LoHa"}, "has the type LoRA, but this run trains LoHa", "Choose the type LoRA"),
        (
            {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "attention"},
            "has the type LoRA, not whole weights",
            "Graft Apply Adapter",
        ),
        ({"targets": "all linear"}, "has no tensors for", "Use the targets"),
        ({"targets": "patterns", "target_patterns": ("attn1",)}, "layers that this run does not train", "targets"),
    ],
    ids=["rank", "type", "full", "more layers", "fewer layers"],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(fields, message, cure, first, tmp_path):
    with pytest.raises(ModelError, match=message) as caught:
        run_session(tmp_path, host=starting(first.adapter), **{"rank": 2, "alpha": 4.0, **STILL, **fields})
    assert caught.value.input == "adapter"
    assert re.search(cure, caught.value.cure)
    assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "PiSSA", "LoHa", "DoRA"])
def test_ranks_are_those_that_it_was_trained_with(kind, tmp_path):
    fields = {"method": kind, "rank": 4, "alpha": 3.0, "block_ranks": (("attn1", 2),), "steps": 1}
    before = run_session(tmp_path, **fields)
    assert ranks_of(before.adapter) == {"rank": 4, "alpha": 3.0, "block_ranks": "attn1=2"}
    inputs = RecipeInputs(kind, 1, 0.0, 0, 1, 0, 64, "", ranks=ranks_of(before.adapter))
    recipe = resolve(Options(), family_of("SD1"), inputs)
    assert (recipe.rank, recipe.alpha, recipe.block_ranks) == (4, 3.0, (("attn1", 2),))
    own = resolve(Options().adding("adapter", {"alpha": 2.0}), family_of("SD1"), inputs)
    assert (own.rank, own.alpha) == (4, 2.0)
    if kind != "LoRA":
        return
    resized = resize(before.adapter, 1, 1.0)
    assert ranks_of(resized) == {"rank": 1, "alpha": 1.0, "block_ranks": ""}
    assert ranks_of(as_adapter({"lora_unet_x.diff": torch.zeros(2, 2)})) == {}


def test_the_rank_of_the_text_encoder_is_the_adapters_too(tmp_path):
    fields = {"rank": 4, "alpha": 4.0, "text_encoder": True, "text_encoder_rank": 2}
    text = LayeredEncoder()
    before = run_session(tmp_path, host=make_host(text=text), **fields, text_encoder_learning_rate=1e-2, steps=1)
    inputs = RecipeInputs("LoRA", 1, 1e-12, 0, 2, 0, 64, "", ranks=ranks_of(before.adapter))
    options = Options({("adapter", "text_encoder"): "on"})
    recipe = resolve(options, family_of("SD1"), inputs)
    assert (recipe.rank, recipe.text_encoder_rank) == (4, 2)
    after = run_recipe(recipe, make_dataset(), starting(before.adapter, LayeredEncoder()), folders_of(tmp_path))
    assert is_near(after.adapter, before.adapter)
    own = resolve(options.adding("adapter", {"text_encoder_rank": 3}), family_of("SD1"), inputs)
    assert own.text_encoder_rank == 3
    assert resolve(Options(), family_of("SD1"), inputs).text_encoder_rank == 0


def folders_of(folder):
    return Folders(*(str(folder / name) for name in ("runs", "cache", "loras", "emb")))


@pytest.mark.parametrize("is_local", [False, True], ids=["exported", "local"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "text encoder", "kohya file", "embedding"])
def test_a_job_brings_along_what_it_starts_from(kind, is_local, word, tmp_path):
    """Trained from the job, the run has the same name and the same bits as in the graph."""
    text = LayeredEncoder() if kind == "text encoder" else None
    fields = {"rank": 2, "alpha": 2.0, "steps": 2, "learning_rate": 1e-2, "batch_size": 2}
    fields |= {"method": "DoRA"} if kind == "DoRA" else TEXT if kind == "text encoder" else {}
    start = word.embedding
    if kind != "embedding":
        start = diffusers_host.run_session(tmp_path / "first", host=make_host(text=text), **fields).adapter
    if kind == "kohya file":
        save_adapter(str(tmp_path / "a.safetensors"), start, "a")
        start = load_adapter(str(tmp_path / "a.safetensors"))
    recipe = models.recipe("SD1", **{**fields, **(WORD if kind == "embedding" else {}), "seed": 1})
    host, dataset, here = starting(start, text), make_dataset(), folders_of(tmp_path / "here")
    direct = run_recipe(recipe, dataset, host, here)
    if is_local:
        path = str(tmp_path / "local")
        os.mkdir(path)
        jobs.write_local_job(path, recipe, dataset, host, here, {})
    else:
        path = jobs.export_job(str(tmp_path / "jobs"), recipe, dataset, host, here, {})
    job = jobs.read_job(path, is_local)
    other = job.host(make_host(text=text))
    there = run_recipe(job.recipe, job.dataset, other, job.folders(folders_of(tmp_path / "there")))
    assert there.run.name == direct.run.name
    assert same_state(state_of(there), state_of(direct))


def test_an_embedding_goes_on_from_another(word, tmp_path):
    still = {**WORD, **STILL, "embedding_learning_rate": 1e-12}
    after = run_session(tmp_path, host=starting(word.embedding), **still)
    assert read_recipe(after.run)["made_from"]["start"] == word.run.name
    # The pull towards the vocabulary's usual norm is 100 times the learning rate.
    assert models.distance(after.embedding["clip_l"], word.embedding["clip_l"]) <= 1e-5
    assert run_session(tmp_path, host=starting(word.embedding), **still).resumed_from == 1


@pytest.mark.parametrize(
    "fields, change, input, message",
    [
        ({"embedding_vectors": 3}, {}, "embedding", "has 2 vectors, but this run trains 3. Set vectors to 2"),
        ({"embedding_init": "dog"}, {}, "init_text", "init_text is 'dog'.+Leave init_text empty"),
        ({}, {"clip_g": torch.zeros(2, 4)}, "embedding", r"clip_g \(4 wide\), and this text encoder has clip_l"),
        ({}, {"clip_l": torch.zeros(2, 4)}, "embedding", r"clip_l \(4 wide\), .+clip_l \(16 wide\)"),
    ],
    ids=["vectors", "init_text", "encoders", "width"],
)
def test_an_embedding_that_does_not_fit_is_refused(fields, change, input, message, word, tmp_path):
    start = type(word.embedding)({**word.embedding, **change}, "my-word")
    with pytest.raises((ModelError, SettingsError), match=message) as caught:
        run_session(tmp_path, host=starting(start), **{**WORD, **STILL, **fields})
    assert caught.value.input == input
