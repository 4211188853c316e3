"""Tests of new embeddings on the host's own text encoders: gradients, conditionings, files, and refusals."""

import re

import pytest
import torch
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.formats.embedding import Embedding, load_embedding, save_embedding
from graft_pack.trainers.methods import textual_inversion

from tests.support import models
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")

PROMPTS = {
    "plain": "a red dog on a beach",
    "weighted": "a (red:1.3) dog, ((beach)), [sky]",
    "long": "a red dog on a beach " * 20,
    "empty": "",
}


def vectors_for(clip, count=2, seed=3):
    """Return random vectors for each encoder of a CLIP, by its key."""
    from graft_pack.nodes.host.model import embeddings

    source = torch.Generator().manual_seed(seed)
    found = {}
    for key in embeddings.encoders(clip):
        width = getattr(clip.cond_stage_model, key).transformer.get_input_embeddings().weight.shape[1]
        found[key] = torch.randn(count, width, generator=source)
    return found


def conditioned(clip, prompt):
    """Return the output of CLIPTextEncode: (cross attention, pooled)."""
    with torch.no_grad():
        context, rest = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0]
    return context, rest["pooled_output"]


@pytest.mark.parametrize("name", models.TEXT)
def test_gradients_of_the_vectors_are_exact(name):
    """Through text encoders and network, with and without checkpointing, against a finite difference."""
    found = []
    for checkpointing in (False, True):
        exact = models.learning_word(
            name, checkpointing, models.patcher(name, torch.float64), models.text(name, dtype=torch.float64)
        )
        with exact as training, models.float64_throughout(training):
            error, slope = directional_error(training.losses, list(training.plan.trainables.values()), step=0.005)
            assert error <= 1e-5
            assert abs(slope) > 1e-5
            found.append(models.joined(training.gradients()))
            per_encoder = [float(gradient.norm()) for gradient in training.gradients()]
            assert min(per_encoder) > 0, "each encoder's vectors are reached"
    assert models.distance(found[1], found[0]) <= 1e-6


def test_without_the_cure_the_text_encoder_raises(monkeypatch):
    from contextlib import nullcontext

    from graft_pack.trainers.steps import predict

    monkeypatch.setattr(predict, "OutOfPlace", nullcontext)
    with models.learning_word("SD1") as training:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            training.gradients()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("skip", [None, -1, -2])
@pytest.mark.parametrize("name", models.TEXT)
def test_prompts_without_the_word_are_encoded_as_the_host_does(name, skip, prompt):
    """Also for captions, where parentheses are literal."""
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    clip = models.text(name)
    if skip is not None:
        clip.clip_layer(skip)
    expected = conditioned(clip, PROMPTS[prompt])
    text = ComfyText(clip)
    captions = [PROMPTS[prompt], "another", PROMPTS[prompt]]
    literal = [text.encode(caption) for caption in captions]
    with torch.inference_mode(False), text.training():
        text.attach(models.WORD, vectors_for(clip))
        [(context, rest)] = text.prompt(PROMPTS[prompt])
        live = text.encode_live(captions)
    assert models.distance(context, expected[0]) <= 1e-5
    assert models.distance(rest["pooled_output"], expected[1]) <= 1e-5
    for one, expected in zip(live, literal, strict=True):
        assert one.keys() == expected.keys()
        for key, value in expected.items():
            assert models.distance(one[key].detach(), value) <= 1e-5, key


@pytest.mark.parametrize("name", models.TEXT)
def test_only_the_clip_that_was_handed_on_knows_the_word(name):
    from graft_pack.nodes.host.model import embeddings
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    clip = models.text(name)
    before = conditioned(clip, "a photo of embedding:my-word")
    given = Embedding(vectors_for(clip), models.WORD)
    other = embeddings.apply_embedding(clip, given)
    after = conditioned(other, "a photo of embedding:my-word")
    assert any(models.distance(a, b) > 1e-2 for a, b in zip(after, before, strict=True))
    for a, b in zip(conditioned(clip, "a photo of embedding:my-word"), before, strict=True):
        assert torch.equal(a, b)
    assert ComfyText(other).fingerprint() != ComfyText(clip).fingerprint()
    both = embeddings.apply_embedding(other, Embedding(vectors_for(clip, 1, 9), "other"))
    for a, b in zip(conditioned(both, "a photo of embedding:my-word"), after, strict=True):
        assert torch.equal(a, b), "a second word leaves the first as it was"


@pytest.mark.parametrize(
    "prompt", ["embedding:{}", "a (embedding:{}:1.2)", "a embedding:{}, red", "x embedding:{} y z"]
)
@pytest.mark.parametrize("name", ["SD1", "SD2", "SDXL with text"])
def test_the_file_means_what_the_word_in_memory_means(name, prompt):
    """The host's own search finds the file by its name, and both conditionings are bit-identical."""
    import folder_paths
    from graft_pack.nodes.host.model import embeddings

    clip = models.text(name)
    given = Embedding(vectors_for(clip), models.WORD)
    called = f"file-{name.replace(' ', '-')}"
    path = f"{folder_paths.get_folder_paths('embeddings')[0]}/{called}.safetensors"
    save_embedding(path, given, called)
    from_memory = conditioned(embeddings.apply_embedding(clip, given), prompt.format(models.WORD))
    from_file = conditioned(clip, prompt.format(called))
    for a, b in zip(from_memory, from_file, strict=True):
        assert torch.equal(a, b)
    plain = conditioned(clip, prompt.format("nothing-of-that-name"))
    assert models.distance(from_file[0], plain[0]) > 1e-3


def test_an_encoder_without_vectors_reads_nothing_there():
    """Flux's T5: the embedding exists in CLIP-L alone."""
    from graft_pack.nodes.host.model import embeddings

    clip = models.text("Flux")
    other = embeddings.apply_embedding(clip, Embedding(vectors_for(clip), models.WORD))
    with_embedding = other.tokenize("a red embedding:my-word dog")
    assert with_embedding["t5xxl"] == clip.tokenize("a red dog")["t5xxl"]
    assert sum(torch.is_tensor(token) for token, _ in with_embedding["l"][0]) == 2


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("embedding:x", "embedding:x"),
        ("cat,embedding:x", "cat, embedding:x"),
        ("(embedding:x) there", "( embedding:x ) there"),
        ("an embedding:x's tail", "an embedding:x 's tail"),
        ("an embedding:x-1.b.", "an embedding:x-1.b ."),
        ("embedding:x.", "embedding:x ."),
        ("embedding:x-1.b.c and embedding:x-1.b-c", "embedding:x-1.b.c and embedding:x-1.b-c"),
        ("\u732bembedding:x\u306e", "\u732b embedding:x \u306e"),
        ("embedding:x.\u306e", "embedding:x .\u306e"),
        ("embedding:x\u0301", "embedding:x\u0301"),
        ("no word", "no word"),
    ],
)
def test_words_stand_apart_where_the_host_would_not_see_them(caption, expected):
    from graft_pack.nodes.host.model import embeddings

    assert embeddings.spaced(caption, ["x", "x-1.b"]) == expected


def test_start_vectors_are_those_of_the_words(comfy):
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    clip = models.text("SDXL with text")
    text = ComfyText(clip)
    found = text.start_vectors("red dog")
    for key in ("clip_l", "clip_g"):
        table = getattr(clip.cond_stage_model, key).transformer.get_input_embeddings().weight
        assert torch.equal(found[key], table[[736, 1929]])
    assert all(len(rows) == 0 for rows in text.start_vectors("  ").values())
    with models.learning_word("SDXL with text", clip=clip, embedding_templates="object") as training:
        assert [tuple(value.shape) for value in training.plan.trainables.values()] == [(2, 24), (2, 24)]


def test_fewer_words_than_vectors_start_over():
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    text = ComfyText(models.text("SD1"))
    settings = models.recipe("SD1", embedding_name="w", embedding_init="red dog", embedding_vectors=5)
    rows = text.start_vectors("red dog")["clip_l"]
    with torch.inference_mode(False), text.training():
        started = textual_inversion.start(text, settings)["embedding/clip_l"]
    assert torch.equal(started.detach(), rows[[0, 1, 0, 1, 0]])


@pytest.mark.parametrize("name", ["dog", "sks", "Dog"])
def test_a_word_that_exists_is_refused(name):
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    settings = models.recipe("SD1", embedding_name=name, embedding_init="dog", embedding_vectors=1)
    with pytest.raises(SettingsError, match="is already a word of the text encoder"):
        textual_inversion.check_word(settings, ComfyText(models.text("SD1")))


def test_start_words_that_are_none_are_refused():
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    settings = models.recipe("SD1", method="embedding", embedding_name="my-dog", embedding_init=" ")
    with pytest.raises(SettingsError, match="gives no token for the text encoder") as error:
        textual_inversion.check_word(settings, ComfyText(models.text("SD1")))
    assert error.value.input == "init_text"


def test_an_embedding_of_another_family_is_refused_by_name():
    from graft_pack.nodes.host.model import embeddings

    small = Embedding(vectors_for(models.text("SD1")), "small")
    with pytest.raises(ModelError, match="'small' is for other text encoders.*clip_g|'small'.*clip_l"):
        embeddings.apply_embedding(models.text("SDXL with text"), small)


def test_a_text_encoder_without_clip_is_refused():
    from types import SimpleNamespace

    from graft_pack.nodes.host.model import embeddings

    with pytest.raises(ModelError, match="no CLIP part"):
        embeddings.encoders(SimpleNamespace(tokenizer=object(), cond_stage_model=object()))


@pytest.mark.parametrize("name", ["SD1", "SDXL with text"])
def test_weights_are_the_same_bits_after_training(name, tmp_path):
    model, clip = models.patcher(name), models.text(name)
    before = [value.clone() for part in (model.model, clip.cond_stage_model) for value in part.state_dict().values()]
    with models.learning_word(name, model=model, clip=clip) as training:
        started = models.joined(training.plan.trainables.values())
        state = models.train(training, tmp_path, steps=3)
        assert models.distance(models.joined(training.plan.trainables.values()), started) > 1e-4
        assert len(state.optimizer) == len(models.TEXT[name]), "the vectors alone have a state"
        assert all(slot.numel() <= 2 * 48 for slots in state.optimizer.values() for slot in slots.values())
    after = [value for part in (model.model, clip.cond_stage_model) for value in part.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_learning_a_word_lowers_the_loss(tmp_path):
    from graft_pack.trainers.steps import step

    with models.learning_word("SD1", captions=[f"embedding:{models.WORD}"]) as training:
        plan = training.plan
        before = float(step.fixed_losses(plan.train, plan.recipe, training.host).mean())
        models.train(training, tmp_path, steps=40, batch_size=1)
        after = float(step.fixed_losses(plan.train, plan.recipe, training.host).mean())
    assert after < 0.999 * before


def test_norms_are_drawn_to_the_vocabularys_median(tmp_path):
    with models.learning_word("SD1") as training:
        median = training.host.text.median_norms()["clip_l"]
        with torch.no_grad():
            training.plan.trainables["embedding/clip_l"].mul_(5.0)
        models.train(training, tmp_path, steps=4)
        norms = training.plan.trainables["embedding/clip_l"].norm(dim=-1)
    assert torch.allclose(norms, torch.full_like(norms, median), rtol=0.05)


@pytest.mark.parametrize("name, layers", [("SD1", ["clip_l"]), ("SDXL with text", ["clip_l", "clip_g"])])
def test_diffusers_reads_the_file(name, layers, tmp_path):
    """The same vectors under its own token, in each of its text encoders."""
    from diffusers.loaders import TextualInversionLoaderMixin
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = models.text(name)
    given = Embedding(vectors_for(clip), models.WORD)
    path = tmp_path / "my-word.safetensors"
    save_embedding(str(path), given, models.WORD)
    state = load_file(path)
    for key in layers:
        table = getattr(clip.cond_stage_model, key).transformer.get_input_embeddings().weight
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=table.shape[1],
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        encoder = CLIPTextModel(config)
        tokenizer = getattr(clip.tokenizer, key).tokenizer.__class__.from_pretrained(
            getattr(clip.tokenizer, key).tokenizer.name_or_path
        )
        # As diffusers documents it: SD1 loads the file, SDXL loads one encoder's tensor at a time.
        source = str(path) if name == "SD1" else {"emb_params": state[key]}
        reader = type("Reader", (TextualInversionLoaderMixin,), {"_execution_device": torch.device("cpu")})()
        reader.components, reader.hf_device_map = {}, None
        reader.load_textual_inversion(source, token="<mine>", text_encoder=encoder, tokenizer=tokenizer)
        ids = tokenizer("<mine> <mine>_1", add_special_tokens=False)["input_ids"]
        assert len(ids) == 2
        loaded = encoder.get_input_embeddings().weight[ids].detach()
        assert torch.equal(loaded, given[key])


def test_a_file_of_something_else_is_refused(tmp_path):
    from graft_pack.trainers.formats import files

    path = str(tmp_path / "lora.safetensors")
    files.write_tensors(path, {"a.lora_down.weight": torch.zeros(4, 8), "a.lora_up.weight": torch.zeros(8, 4)}, {})
    with pytest.raises(ModelError, match="holds no embedding for CLIP"):
        load_embedding(path, "lora")
    files.write_tensors(path, {"anything": torch.ones(768)}, {})
    assert {key: tuple(value.shape) for key, value in load_embedding(path, "x").items()} == {"clip_l": (1, 768)}


@pytest.mark.parametrize("name", ["my word (1)", "a:2", "word,"])
def test_files_that_no_prompt_can_call_are_refused(comfy, name):
    from graft_pack.nodes.host import paths

    for file in (f"{name}.safetensors", "folder/x.safetensors"):
        path = comfy.base / "models" / "embeddings" / file
        path.parent.mkdir(exist_ok=True, parents=True)
        save_embedding(str(path), Embedding({"clip_l": torch.ones(1, 768)}, "x"), "x")
    with pytest.raises(ModelError, match=f"No prompt can call the embedding '{re.escape(name)}.safetensors'.*such as"):
        paths.load_named_embedding(f"{name}.safetensors")
    assert paths.load_named_embedding("folder/x.safetensors").name == "folder/x"
