"""Tests of adapters on the host's text encoders, beside those on the network: gradients, files, ranks and rates."""

import pytest
import torch
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.formats.adapter import load_adapter, save_adapter
from graft_pack.trainers.methods import ADAPTERS
from graft_pack.trainers.methods.targets import LINEAR
from graft_pack.trainers.recipe.parsing import parse_arguments

from tests.support import diffusers_host, models
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")

CAPTION = "a photo of a red dog, on a beach"


def of_text(trainables):
    """Return the trainable parameters of the text encoders."""
    return {name: value for name, value in trainables.items() if name.startswith("text/")}


def encoded(clip, caption=CAPTION):
    """Return the outputs of the host's encoder for a literal caption, each as one vector."""
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    return ComfyText(clip).encode(caption)


def assert_applied(found, trained, base):
    """Check DESIGN's bar: the error is at most a thousandth of the effect."""
    for name, value in trained.items():
        if models.distance(value, base[name]) > 0:
            assert float((found[name] - value).norm() / (value - base[name]).norm()) <= 1e-3, name


def in_float64(name):
    """Return the network and text encoders of a family, in float64."""
    return models.patcher(name, torch.float64), models.text(name, dtype=torch.float64)


@pytest.mark.parametrize("name", models.TEXT)
def test_gradients_are_exact(name):
    """Each encoder's own gradients, through encoder and network, with and without checkpointing."""
    found = []
    model, clip = in_float64(name)
    for checkpointing in (False, True):
        exact = models.with_text(name, checkpointing, model, clip, spread=0.1)
        with exact as training, models.float64_throughout(training):
            trainables = of_text(training.plan.trainables)
            assert {path.split(".")[0] for path in trainables} == {
                f"text/{key}" for key in models.TEXT[name] if key[0] != "t"
            }
            for stem in ("lora_A", "lora_B"):
                chosen = [value for path, value in trainables.items() if stem in path]
                error, slope = directional_error(training.losses, chosen, step=0.005)
                assert error <= 1e-5, stem
                assert abs(slope) > 1e-5, stem
            found.append(models.joined(training.gradients()))
    assert models.distance(found[1], found[0]) <= 1e-6


@pytest.mark.parametrize("name", models.TEXT)
def test_captions_that_are_encoded_at_once_get_what_is_their_own(name):
    """Captions of one and of several chunks, with an adapter that has no effect yet."""
    long = ", ".join(["a photo of a red dog on a beach"] * 12)
    captions = ["a red dog", "blue sky", long, "a red dog"]
    with models.with_text(name) as training:
        text = training.host.text
        expected = [text.encode(caption) for caption in captions]
        found = text.encode_live(captions)
    for caption, one, other in zip(captions, found, expected, strict=True):
        assert any(value.requires_grad for value in one.values())
        for key, value in other.items():
            assert models.distance(one[key].detach(), value) <= 1e-5, (caption, key)


def test_without_the_cure_it_raises(monkeypatch):
    from contextlib import nullcontext

    from graft_pack.trainers.steps import predict

    monkeypatch.setattr(predict, "OutOfPlace", nullcontext)
    with models.with_text("SD1", spread=0.1) as training:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            training.gradients()


# SD1 for every type; every family for the types with different key names.
PAIRS = [
    (kind, name, "") for kind in ADAPTERS for name in models.TEXT if name == "SD1" or kind in ("LoRA", "DoRA", "LoKr")
]
PAIRS += [("LoRA", name, "train_norm=true train_bias=true") for name in models.TEXT]


@pytest.mark.parametrize("kind, name, arguments", PAIRS)
def test_what_the_host_loads_from_the_file_is_what_was_trained(kind, name, arguments, comfy, tmp_path):
    """Loaded by core's own loader; the graph's encoder stays unchanged, the disabled adapter gives the base's bits."""
    import nodes

    model, clip = models.patcher(name), models.text(name)
    before = encoded(clip)
    weights = [value.clone() for value in clip.cond_stage_model.state_dict().values()]
    fields = {"method": kind, "targets": "attention + feed-forward", "alpha": 4.0}
    fields["adapter_args"] = parse_arguments(arguments)
    with models.with_text(name, model=model, clip=clip, **fields) as training, torch.no_grad():
        plan, text = training.plan, training.host.text
        [start] = text.encode_live([CAPTION])
        for value in of_text(plan.trainables).values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        [trained] = text.encode_live([CAPTION])
        with plan.switched_off():
            [off] = text.encode_live([CAPTION])
        adapter = plan.export(plan.trainables, 0).adapter
        assert training.denoiser.check_adapter(adapter) == []
    for key, value in before.items():
        assert models.distance(start[key], value) <= 1e-5, "no effect at the start"
        assert models.distance(off[key], value) <= 1e-6
    assert max(models.distance(trained[key], before[key]) for key in before) >= 1e-2
    path = comfy.base / "models" / "loras" / f"text {kind} {name}.safetensors"
    save_adapter(str(path), adapter, kind)
    _, applied = nodes.LoraLoader().load_lora(model, clip, path.name, 1.0, 1.0)
    assert_applied(encoded(applied), trained, before)
    _, none = nodes.LoraLoader().load_lora(model, clip, path.name, 1.0, 0.0)
    for key, value in before.items():
        assert torch.equal(encoded(none)[key], value)
        assert torch.equal(encoded(clip)[key], value)
    after = clip.cond_stage_model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(after, weights, strict=True))


@pytest.mark.parametrize(
    "name, starts",
    [
        ("SD1", {"lora_te_text_model_encoder_layers_0_self_attn_q_proj"}),
        ("SD2", {"lora_te_text_model_encoder_layers_0_self_attn_q_proj"}),
        ("SDXL with text", {f"lora_te{n}_text_model_encoder_layers_0_self_attn_q_proj" for n in (1, 2)}),
        ("Flux", {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj"}),
    ],
)
def test_names_are_kohyas(name, starts):
    with models.with_text(name) as training:
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    found = {key.split(".")[0] for key in adapter if key.startswith("lora_te")}
    assert {one for one in found if "layers_0_self_attn_q_proj" in one} == starts


def test_ranks_rates_and_scale_of_its_own():
    fields = {
        "rank": 4,
        "alpha": 8.0,
        "learning_rate": 1e-3,
        "text_encoder_learning_rate": 1e-5,
        "block_ranks": ((r"layers\.0\.", 1),),
        "block_learning_rates": (("clip_g", 3e-5),),
    }
    with models.with_text("SDXL with text", **fields) as training:
        shapes = {name: tuple(value.shape) for name, value in training.plan.trainables.items()}
        rates = {name: group.learning_rate for group in training.plan.groups for name in group.names}
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    assert rates.keys() == shapes.keys()
    for name, shape in shapes.items():
        if name.startswith("text/"):
            assert min(shape) == (1 if "layers.0." in name else 2)
            assert rates[name] == (3e-5 if "clip_g" in name else 1e-5)
        else:
            assert min(shape) == 4
            assert rates[name] == 1e-3
    for name, value in adapter.items():
        if name.endswith(".alpha"):
            assert float(value) / adapter[name.replace("alpha", "lora_down.weight")].shape[0] == 2.0


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"targets": "attention"}, ["k_proj", "out_proj", "q_proj", "v_proj"]),
        ({"targets": "attention + feed-forward"}, ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]),
        ({"targets": "linear + conv"}, ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]),
        ({"targets": "patterns", "target_patterns": ("attn2",)}, ["k_proj", "out_proj", "q_proj", "v_proj"]),
        ({"targets": "patterns", "target_patterns": ("attn2", "fc1")}, ["fc1"]),
    ],
    ids=str,
)
def test_targets_choose_layers_of_the_encoder_too(fields, expected):
    """Patterns that match none of its layers apply to the network only."""
    with models.with_text("SD1", **fields) as training:
        found = {name.split(".lora_")[0].rpartition(".")[2] for name in of_text(training.plan.trainables)}
    assert sorted(found) == expected


def test_a_pattern_may_be_about_the_encoder_alone_and_is_refused_when_it_is_about_nothing():
    with models.with_text("SD1", block_learning_rates=(("self_attn", 1e-4),)):
        pass
    with pytest.raises(SettingsError, match="'selfattn'.*no layer"):
        with models.with_text("SD1", block_learning_rates=(("selfattn", 1e-4),)):
            pass


def as_published(clip, key):
    """Return a host's encoder in transformers' form, with the same weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    inner = getattr(clip.cond_stage_model, key).transformer
    weights = {name.removeprefix("text_model."): value for name, value in inner.state_dict().items()}
    width = weights["embeddings.token_embedding.weight"].shape[1]
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers."))
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, num_hidden_layers=layers
    )
    made = CLIPTextModel(config)
    assert not made.load_state_dict(weights, strict=False).missing_keys
    return made.eval()


def published_output(encoder):
    with torch.no_grad():
        return encoder(torch.arange(49406, 49331, -1)[None]).last_hidden_state


@pytest.mark.parametrize("kind, format", [("LoRA", "diffusers"), ("LoRA", "kohya"), ("LoRA", "peft"), ("LoHa", "peft")])
def test_diffusers_and_peft_load_the_encoders_part(kind, format, tmp_path):
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from peft import PeftModel

    from tests.support.diffusers_host import convert_sd1

    model, clip = models.patcher("SD1"), models.text("SD1")
    spread = 0.3 if kind == "LoHa" else 0.1
    fields = {"method": kind, "alpha": 8.0}
    with models.with_text("SD1", model=model, clip=clip, spread=spread, **fields) as training, torch.no_grad():
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_adapter(str(path), adapter, "a", format)
    encoder = as_published(clip, "clip_l")
    before = published_output(encoder)
    if format == "peft":
        loaded = PeftModel.from_pretrained(encoder, str(path.parent / "text_encoder"))
        found = published_output(loaded)
    else:
        pipe = StableDiffusionPipeline(
            None, encoder, None, convert_sd1(model), DDPMScheduler(), None, None, requires_safety_checker=False
        )
        pipe.load_lora_weights(str(path))
        found = published_output(pipe.text_encoder)
    import comfy.model_management
    from graft_pack.nodes.host.model.lora import apply_adapter

    _, applied = apply_adapter(model, clip, adapter, 1.0, 1.0)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([applied.patcher], force_patch_weights=True)
        expected = published_output(as_published(applied, "clip_l"))
        applied.patcher.unpatch_model(applied.patcher.offload_device)
    assert models.distance(expected, before) >= 1e-2
    assert float((found - expected).norm() / (expected - before).norm()) <= 1e-3


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize("name", ["SD1", "SDXL with text"])
def test_both_formats_come_back_in_the_hosts_names(name, format, tmp_path):
    from graft_pack.nodes.host.model.lora import apply_adapter, unread_keys

    model, clip = models.patcher(name), models.text(name)
    with models.with_text(name, model=model, clip=clip, spread=0.1) as training, torch.no_grad():
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_adapter(str(path), adapter, "a", format)
    back = load_adapter(str(path))
    assert unread_keys(model, clip, back) == []
    _, one = apply_adapter(model, clip, adapter, 1.0, 1.0)
    _, other = apply_adapter(model, clip, back, 1.0, 1.0)
    for key, value in encoded(one).items():
        assert models.distance(encoded(other)[key], value) <= 1e-5


def test_types_without_text_layers_do_not_exist():
    """Every type supports Linears, and an encoder has only those."""
    assert all(LINEAR in kind.kinds for kind in ADAPTERS.values())


class Stopped(Exception):
    """The exception that interrupts a run in a test."""


def stop_at_two(event, payload):
    if event == "step" and payload["step"] == 2:
        raise Stopped


RUN = {
    "steps": 3,
    "rank": 2,
    "alpha": 2.0,
    "batch_size": 2,
    "save_every": 1,
    "text_encoder": True,
    "text_encoder_rank": 1,
    "text_encoder_learning_rate": 2e-2,
}


def run_session(folder, report=None, dataset=None, **fields):
    """Run a whole training over diffusers with an encoder of one layer."""
    host = diffusers_host.make_host(report, diffusers_host.LayeredEncoder())
    dataset = dataset or diffusers_host.make_dataset(2)
    return diffusers_host.run_session(folder, host=host, dataset=dataset, **{**RUN, **fields})


@pytest.mark.parametrize("kind", ["LoRA", "PiSSA", "DoRA"])
def test_a_resumed_run_ends_with_the_same_bits(kind, tmp_path):
    """A finished run returns the same adapter again."""
    fields = {"method": kind, "dropout": 0.3}
    straight = run_session(tmp_path / "straight", **fields)
    with pytest.raises(Stopped):
        run_session(tmp_path / "parts", stop_at_two, **fields)
    resumed = run_session(tmp_path / "parts", **fields)
    assert resumed.resumed_from == 2
    assert diffusers_host.same_state(diffusers_host.state_of(resumed), diffusers_host.state_of(straight))
    again = run_session(tmp_path / "parts", **fields)
    for one in (resumed, again):
        assert diffusers_host.same_tensors(one.adapter, straight.adapter)
        assert diffusers_host.same_tensors(one.adapter.native.all_tensors(), straight.adapter.native.all_tensors())
    moved = [value for name, value in straight.adapter.items() if name.startswith("lora_te") and "up" in name]
    assert moved and all(float(value.abs().max()) > 0 for value in moved)


def test_nothing_is_dropped_outside_of_a_step():
    """Gradient checks, previews and validation see the whole adapter, also before the first step."""
    with models.with_text("SD1", spread=0.1, dropout=0.5) as training, torch.no_grad():
        first = float(training.losses())
        assert float(training.losses()) == first
    with models.with_text("SD1", spread=0.1) as training, torch.no_grad():
        assert float(training.losses()) == first


def test_dropout_reaches_the_encoder(tmp_path):
    """Only the encoder's own layer trains at a rate that changes anything."""
    still = {"learning_rate": 1e-12, "dropout": 0.5}
    one = run_session(tmp_path / "one", **still)
    other = run_session(tmp_path / "other", learning_rate=1e-12)
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
    assert models.distance(one.adapter[name], other.adapter[name]) > 1e-3


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_training_goes_on_from_a_file(format, tmp_path):
    first = run_session(tmp_path)
    path = tmp_path / format / "adapter_model.safetensors"
    save_adapter(str(path), first.adapter, "first", format)
    still = {"steps": 1, "learning_rate": 1e-12, "text_encoder_learning_rate": 1e-12}
    second = run_session(tmp_path, start_from=str(path), **still)
    assert second.run.name != first.run.name
    for name, value in first.adapter.items():
        assert models.distance(second.adapter[name], value) <= 1e-5
    off = {"text_encoder": False, "text_encoder_rank": 0, "text_encoder_learning_rate": 0.0}
    with pytest.raises(ModelError, match="has layers that this run does not train, such as .*text.*") as caught:
        run_session(tmp_path, start_from=str(path), **off)
    assert "text_encoder" in caught.value.cure
    without = run_session(tmp_path / "without", **off)
    path = tmp_path / "without" / format / "adapter_model.safetensors"
    save_adapter(str(path), without.adapter, "without", format)
    with pytest.raises(
        ModelError, match="has no tensors for clip_l" if format == "kohya" else "has no layers for the text encoder"
    ):
        run_session(tmp_path, start_from=str(path))


def test_the_class_is_held_to_what_the_frozen_encoder_said(tmp_path):
    """With a dominating prior weight, the encoder trained alone must not move away from the base.

    If the trained encoder computed the target, drift would cost nothing.
    """
    from graft_pack.trainers.data import prior

    dataset = diffusers_host.make_dataset(2)
    fields = {"steps": 12, "learning_rate": 1e-12, "text_encoder_learning_rate": 5e-2}
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    moved = {}
    for weight in (1e-4, 1e4):
        anchored = prior.add_prior_target(dataset, dataset.examples[0].captions[0], weight)
        adapter = run_session(tmp_path / str(weight), dataset=anchored, **fields).adapter
        moved[weight] = float((adapter[f"{name}.lora_up.weight"] @ adapter[f"{name}.lora_down.weight"]).norm())
    assert moved[1e4] < 0.5 * moved[1e-4]


def test_a_word_and_an_encoder_are_trained_together(tmp_path):
    fields = {"embedding_name": "w", "embedding_init": "red", "embedding_vectors": 1, "embedding_learning_rate": 1e-2}
    result = run_session(tmp_path, **fields)
    assert set(result.embedding) == {"clip_l"}
    assert any(name.startswith("lora_te") for name in result.adapter)
    assert not any("embedding" in name for name in result.adapter)


@pytest.mark.parametrize("name", ["SD1", "SDXL with text"])
def test_all_weights_of_the_encoders_are_trained_exactly_and_applied_as_trained(name, tmp_path, comfy):
    """The layers of each CLIP; their difference is in the same file as the model's, and core's loader reads it."""
    import nodes

    model, clip = models.patcher(name), models.text(name)
    before = encoded(clip)
    weights = [value.clone() for value in clip.cond_stage_model.state_dict().values()]
    fields = {"method": "all weights", "targets": "all weights", "rank": 0, "alpha": 0.0, "text_encoder_rank": 0}
    exact = models.with_text(name, False, *in_float64(name), **fields)
    with exact as training, models.float64_throughout(training):
        trainables = of_text(training.plan.trainables)
        for end in ("q_proj.weight", "fc1.bias", "layer_norm1.weight"):
            chosen = [value for path, value in trainables.items() if path.endswith(end)]
            error, slope = directional_error(training.losses, chosen, step=0.005)
            assert error <= 1e-5, end
            assert abs(slope) > 1e-5, end
    with models.with_text(name, model=model, clip=clip, **fields) as training:
        trainables = of_text(training.plan.trainables)
        assert {path.split(".")[0] for path in trainables} == {f"text/{key}" for key in models.TEXT[name]}
        with torch.no_grad():
            for value in trainables.values():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
            [trained] = training.host.text.encode_live([CAPTION])
            with training.plan.switched_off():
                [off] = training.host.text.encode_live([CAPTION])
            adapter = training.plan.export(training.plan.trainables, 0).adapter
        path = comfy.base / "models" / "loras" / f"all of {name}.safetensors"
        save_adapter(str(path), adapter, "all")
        assert training.denoiser.check_adapter(adapter) == []
    for key, value in before.items():
        assert models.distance(off[key], value) <= 1e-6
    assert max(models.distance(trained[key], before[key]) for key in before) >= 1e-2
    _, applied = nodes.LoraLoader().load_lora(model, clip, path.name, 1.0, 1.0)
    assert_applied(encoded(applied), trained, before)
    assert all(torch.equal(encoded(clip)[key], value) for key, value in before.items())
    after = clip.cond_stage_model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(after, weights, strict=True))
