"""Tests of embeddings in captions, their vectors in a run, and pivotal tuning: over diffusers, without ComfyUI."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data import captions, prior
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.examples import Augmentation
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
from graft_pack.trainers.errors import DatasetError, SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.methods import textual_inversion
from graft_pack.trainers.recipe.recipe import EmbeddingSpec

from tests.support.diffusers_host import make_dataset, make_host, run_session, same_state, same_tensors, state_of

WORD = {
    "embedding_name": "my-word",
    "embedding_init": "red circle",
    "embedding_vectors": 2,
    "embedding_learning_rate": 1e-2,
    "embedding_templates": "object",
}
ALONE = {"method": "embedding", "rank": 0, "alpha": 0.0, **WORD}
PIVOTAL = {**WORD, "embedding_stop": 0.5}


def addressed(texts, trigger="", **handling):
    """Return the captions that reach the text encoder, the first variant of each sample, and the dataset."""
    pictures = [np.zeros((64, 64, 3), np.uint8)] * len(texts)
    dataset = from_arrays(pictures, list(texts), trigger, 64, (), Augmentation(**handling))
    found = textual_inversion.insert_placeholder(dataset, "my-word", "object")
    return [captions.unvaried_caption(example) for example in found.examples], found


@pytest.mark.parametrize(
    "caption, trigger, expected",
    [
        ("a photo of my-word", "", "a photo of embedding:my-word"),
        ("a photo of My-Word, red", "", "a photo of embedding:my-word, red"),
        ("embedding:my-word there", "", "embedding:my-word there"),
        ("a photo of sks", "sks", "a photo of embedding:my-word"),
        ("a photo", "sks", "embedding:my-word, a photo"),
        ("the [trigger] there", "", "the embedding:my-word there"),
        ("sks dog and sks cat", "sks dog", "embedding:my-word and sks cat"),
        ("my-words are no my-word", "", "my-words are no embedding:my-word"),
        ("sks-style portrait", "sks", "embedding:my-word -style portrait"),
        ("a [trigger]-house", "", "a embedding:my-word -house"),
        ("that is my-word.", "", "that is embedding:my-word ."),
        ("\u516c\u5712\u306bmy-word\u304c", "", "\u516c\u5712\u306bembedding:my-word \u304c"),
        ("\u516c\u5712\u306b\u82b1\u5b50\u304c", "\u82b1\u5b50", "\u516c\u5712\u306bembedding:my-word \u304c"),
        ("\u516c\u5712\u306b[trigger]\u304c", "\u82b1", "\u516c\u5712\u306bembedding:my-word \u304c"),
        ("of Zoe\u0308 there", "zo\u00eb", "of embedding:my-word there"),
        ("of zoe\u0308 there", "zoe", "embedding:my-word, of zoe\u0308 there"),
    ],
)
def test_the_word_stands_where_the_thing_is_named(caption, trigger, expected):
    assert addressed([caption], trigger)[0] == [expected]


def test_a_caption_without_the_word_is_named():
    with pytest.raises(DatasetError, match="1 of 3 captions do not contain the embedding 'my-word': image 2"):
        addressed(["my-word", "something else", "a my-word"])


def test_pictures_without_captions_get_the_templates_in_turn():
    _, dataset = addressed([""])
    [example] = dataset.examples
    shown = {captions.make_variant(example, number) for number in range(captions.variant_count(example, 1))}
    assert len(shown) == len(textual_inversion.TEMPLATES["object"])
    assert all("embedding:my-word" in text for text in shown)
    style = textual_inversion.insert_placeholder(dataset, "my-word", "style").examples[0]
    assert style == example, "what has captions keeps them"


def test_class_images_keep_their_captions():
    """They show the class, not the subject."""
    _, dataset = addressed(["a photo of my-word", "a dog"], trigger="sks")
    of_class = replace(dataset.examples[1], captions=("a photo of my-word",), trigger="", prior=True)
    found = textual_inversion.insert_placeholder(
        replace(dataset, examples=(dataset.examples[0], of_class)), "my-word", "object"
    )
    assert found.examples[1] == of_class


@pytest.mark.parametrize("caption, trigger", [("a sks dog", "sks dog"), ("", "sks dog"), ("a photo of my-word", "")])
def test_class_prompts_by_caption_replace_the_word(caption, trigger):
    """The base's prediction for the subject itself must not be held."""
    dataset = from_arrays([np.zeros((64, 64, 3), np.uint8)], [caption], trigger, 64)
    dataset = replace(dataset, trigger=trigger or caption)
    dataset = prior.add_prior_target(dataset, "a dog", 1.0, prior.BY_CAPTION)
    (example,) = textual_inversion.insert_placeholder(dataset, "my-word", "object").examples
    for variant in range(len(example.captions)):
        caption = captions.make_variant(example, variant)
        (prompt,) = prior.class_prompts(example.anchor, caption)
        assert "my-word" in caption and "my-word" not in prompt and "a dog" in prompt


def test_the_word_is_neither_dropped_nor_shuffled_away():
    _, dataset = addressed(["red, big, my-word, old"], shuffle_tags=True, tag_dropout=0.9)
    [example] = dataset.examples
    for number in range(50):
        assert "embedding:my-word" in captions.make_variant(example, number)


@pytest.mark.parametrize(
    "name", ["", "my word", "a/b", "..", "../x", "x,", "x:y", "(x)", "x.", "x.safetensors", "\u00e4", "a\nb", "x" * 101]
)
def test_names_that_no_prompt_could_address_are_refused(name):
    with pytest.raises(SettingsError, match="A prompt cannot use the embedding name") as error:
        textual_inversion.check_name(name)
    assert error.value.input == "name"


@pytest.mark.parametrize("name", ["my-word", "x1", "style_a", "v1.5-dog", "_x"])
def test_names_that_a_prompt_can_address_pass(name):
    textual_inversion.check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "my word",
        "my\tword",
        "a(b)",
        "(a",
        "a:1.2",
        "a\\b",
        "word,",
        ",word",
        "a\u3000b",
        "",
        "[word]",
        "word[1]",
        "a<b",
    ],
)
def test_file_names_that_no_prompt_can_call_are_known(name):
    assert not textual_inversion.is_addressable(name)


@pytest.mark.parametrize("name", ["word", "folder/word-1.5", "a,b", "{word}", "w\u00f6rter", "EasyNegative_v2"])
def test_file_names_that_a_prompt_can_call_pass(name):
    assert textual_inversion.is_addressable(name)


def test_a_word_alone_is_trained_and_nothing_else(tmp_path):
    host = make_host()
    before = [value.clone() for value in host.denoiser._unet.state_dict().values()]
    result = run_session(tmp_path, host=host, **ALONE)
    assert result.adapter is None
    assert set(result.embedding) == {"clip_l"}
    assert result.embedding.name == "my-word"
    state = state_of(result)
    assert list(state.trainables) == ["embedding/clip_l"]
    assert len(state.optimizer) == 1
    assert all(torch.equal(a, b) for a, b in zip(host.denoiser._unet.state_dict().values(), before, strict=True))
    assert os.listdir(result.run.embeddings) == ["step-00000004.safetensors"]
    assert not os.path.exists(result.run.adapters)
    again = run_session(tmp_path, **ALONE)
    assert again.resumed_from == 4
    assert same_tensors(again.embedding, result.embedding)


def stopped(folder, at, **fields):
    """Interrupt a run after a step and resume it."""

    class Stop(Exception):
        pass

    def report(event, payload):
        if event == "step" and payload["step"] == at:
            raise Stop

    with pytest.raises(Stop):
        run_session(folder, report, **fields)
    return run_session(folder, **fields)


@pytest.mark.parametrize("at", [1, 3, 4, 5])
@pytest.mark.parametrize("fields", [ALONE, PIVOTAL], ids=["alone", "pivotal"])
def test_a_stopped_run_goes_on_to_the_same_bits(fields, at, tmp_path):
    whole = run_session(tmp_path / "whole", **{**fields, "steps": 6, "ema_decay": 0.9})
    parts = stopped(tmp_path / "parts", at, **{**fields, "steps": 6, "ema_decay": 0.9})
    assert parts.resumed_from == at
    assert same_state(state_of(whole), state_of(parts))
    assert same_tensors(whole.embedding, parts.embedding)


def test_pivotal_tuning_freezes_the_word_and_goes_on_with_the_adapter(tmp_path):
    found = {}

    def watch(steps):
        result = run_session(tmp_path / str(steps), **{**PIVOTAL, "embedding_stop": 3 / 6, "steps": 6, "save_every": 1,
                                                       "keep_last": 9})  # fmt: skip
        for step in result.run.states():
            found[step] = result.run.load(step).trainables
        return result

    result = watch(6)
    words = [found[step]["embedding/clip_l"] for step in range(1, 7)]
    assert not torch.equal(words[0], words[1])
    assert not torch.equal(words[1], words[2])
    assert torch.equal(words[2], words[3])
    assert torch.equal(words[2], words[5])
    adapters = [name for name in found[1] if not name.startswith("embedding/")]
    assert any(not torch.equal(found[5][name], found[6][name]) for name in adapters)
    assert result.adapter and result.embedding
    assert not any("embedding" in key for key in result.adapter)
    assert torch.equal(result.embedding["clip_l"], words[5])


def test_a_frozen_word_stays_frozen_when_steps_are_added(tmp_path):
    """Later training relies on the frozen embedding."""
    first = run_session(tmp_path, **{**PIVOTAL, "steps": 4})
    more = run_session(tmp_path, **{**PIVOTAL, "steps": 12})
    assert more.resumed_from == 4
    assert state_of(more).frozen == ["embedding/clip_l"]
    assert torch.equal(more.embedding["clip_l"], first.embedding["clip_l"])


def test_captions_that_were_dropped_teach_nothing_and_stop_nothing(tmp_path):
    dataset = make_dataset()
    examples = tuple(replace(one, handling=Augmentation(caption_dropout=0.9)) for one in dataset.examples)
    result = run_session(
        tmp_path, dataset=replace(dataset, examples=examples), **{**ALONE, "batch_size": 1, "steps": 8}
    )
    assert len(result.losses) == 8


def test_the_gradient_is_checked_on_a_batch_that_names_the_word(tmp_path):
    """With this seed the first batch's captions are dropped."""
    dataset = make_dataset()
    handling = Augmentation(caption_dropout=0.5)
    dataset = replace(dataset, examples=tuple(replace(one, handling=handling) for one in dataset.examples))
    fields = {**ALONE, "steps": 6, "gradient_check": "on", "batch_size": 1, "seed": 1}
    assert run_session(tmp_path, dataset=dataset, **fields).step == 6


def test_class_images_beside_a_word_alone_are_refused(tmp_path):
    dataset = make_dataset()
    examples = (replace(dataset.examples[0], prior=True), *dataset.examples[1:])
    with pytest.raises(DatasetError, match="changes no weight"):
        run_session(tmp_path, dataset=replace(dataset, examples=examples), **ALONE)


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        (
            "optimizer",
            {"optimizer": "AdamWScheduleFree"},
            "AdamWScheduleFree .*keeps the length of an embedding's vectors",
        ),
        ("adapter", {"dropout": 0.1}, "dropout is set, but this node trains no adapter"),
        ("adapter", {"target_patterns": "attn"}, "target_patterns is set"),
        ("adapter", {"start_from": "a.safetensors"}, "start_from is set"),
        ("adapter", {"alpha": 2.0}, "alpha is set"),
    ],
)
def test_options_that_a_word_alone_cannot_go_with_are_refused(kind, fields, message):
    options = Options().adding(kind, fields)
    with pytest.raises(SettingsError, match=message):
        resolve(
            options, family_of("SD1"), RecipeInputs("embedding", 10, 0.0, 0, 1, 0, 64, "", EmbeddingSpec("w", "dog", 1))
        )


def test_an_optimizer_that_finds_its_rate_finds_the_words_too():
    options = (
        Options().adding("pivotal", {"name": "w", "init_text": "dog"}).adding("optimizer", {"optimizer": "Prodigy"})
    )
    recipe = resolve(options, family_of("SD1"), RecipeInputs("LoRA", 10, 0.5, 4, 1, 0, 64, ""))
    assert recipe.embedding_learning_rate == recipe.learning_rate == 0.5


def alone(vectors=1):
    """Return the inputs of a node that trains an embedding alone."""
    return RecipeInputs("embedding", 10, 0.0, 0, 1, 0, 64, "", EmbeddingSpec("w", "dog", vectors))


def test_the_word_has_no_weight_decay_and_a_rate_of_its_own(tmp_path):
    recipe = resolve(
        Options(), family_of("SD1"), RecipeInputs("embedding", 10, 0.0, 0, 1, 0, 64, "", EmbeddingSpec("w", "dog", 1))
    )
    assert recipe.learning_rate == recipe.embedding_learning_rate == 5e-4
    group = textual_inversion.group({"embedding/clip_l": torch.nn.Parameter(torch.ones(1, 4))}, recipe)
    assert (group.learning_rate, group.weight_decay, group.until) == (5e-4, 0.0, None)


def test_pivotal_options_say_which_word(tmp_path):
    base = (family_of("SD1"), RecipeInputs("LoRA", 10, 0.0, 4, 1, 0, 64, ""))
    assert resolve(Options(), *base).embedding_name == ""
    options = Options().adding("pivotal", {"name": "w", "init_text": "dog"})
    recipe = resolve(options, *base)
    assert (recipe.embedding_vectors, recipe.embedding_stop, recipe.embedding_learning_rate) == (2, 0.5, 5e-4)
    assert recipe.learning_rate == 1e-4
    with pytest.raises(SettingsError, match="have no name for the embedding"):
        resolve(Options().adding("pivotal", {"init_text": "dog"}), *base)
    with pytest.raises(SettingsError, match="trains its own embedding"):
        resolve(
            options, family_of("SD1"), RecipeInputs("embedding", 10, 0.0, 0, 1, 0, 64, "", EmbeddingSpec("w", "dog", 1))
        )
    with pytest.raises(SettingsError, match="A prompt cannot use the embedding name"):
        Options().adding("pivotal", {"name": "two words"})


@pytest.mark.parametrize("vectors", [0, 65])
def test_numbers_of_vectors_out_of_range_are_refused(vectors):
    with pytest.raises(SettingsError, match="embedding_vectors") as error:
        resolve(
            Options(),
            family_of("SD1"),
            RecipeInputs("embedding", 10, 0.0, 0, 1, 0, 64, "", EmbeddingSpec("w", "dog", vectors)),
        )
    assert error.value.input == "vectors"


def test_a_run_without_a_word_has_the_identity_it_had(tmp_path):
    """Runs made before embeddings could be trained are still found."""
    recipe = resolve(Options(), family_of("SD1"), RecipeInputs("LoRA", 10, 0.0, 4, 1, 0, 64, ""))
    assert not [name for name in recipe.deciding() if name.startswith("embedding")]
    fields = ["method", "learning_rate", "rank", "alpha", "batch_size", "seed", "resolution", "optimizer"]
    fields += ["weight_decay", "schedule", "warmup_steps", "accumulation", "max_grad_norm", "ema_decay"]
    fields += ["validation_fraction", "family", "trigger"]
    assert list(recipe.deciding()) == fields


def test_files_say_what_made_them(tmp_path):
    from graft_pack.trainers.formats.files import read_metadata

    result = run_session(tmp_path, **ALONE)
    kept = read_metadata(os.path.join(result.run.embeddings, "step-00000004.safetensors"))
    assert kept["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert kept["modelspec.trigger_phrase"] == "embedding:my-word"
    assert json.loads(kept["graft_recipe"])["embedding_vectors"] == 2
    assert "ss_network_dim" not in kept
