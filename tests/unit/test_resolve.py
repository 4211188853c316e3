"""Tests of options, defaults, ranges, and of the settings that start a new run."""

from dataclasses import fields, replace

import pytest
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, describe_preset, resolve, summarize
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.families import FAMILIES, family_of, is_attention
from graft_pack.trainers.recipe.options import OPTIONS, STOPS_FALLING
from graft_pack.trainers.recipe.presets import PRESETS
from graft_pack.trainers.recipe.recipe import Recipe

from tests.support import models


def resolved(options=None, method="LoRA", family="SD1", **widgets):
    values = {"steps": 10, "learning_rate": 0.0, "rank": 4, "batch_size": 1, "seed": 0, "resolution": 0, "trigger": ""}
    return resolve(options or Options(), family_of(family), RecipeInputs(method, **{**values, **widgets}))


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_untouched_option_node_changes_nothing(kind):
    options = Options().adding(kind, {name: option.unset for name, option in OPTIONS[kind].items()})
    assert options == {}
    assert resolved(options) == resolved()


# A value different from the unset one for each field.
SET = {
    "run": {
        "name": "my run",
        "on_existing": "new",
        "save_every": 7,
        "keep_last": 3,
        "validation_fraction": 0.1,
        "prompt_node": "TextEncodeQwenImageEditPlus",
        "validate_every": 9,
        "gradient_check": "on",
        "tensorboard": "on",
        "processes": 2,
        "keep_best": "on",
        "stop_when": STOPS_FALLING,
        "patience": 3,
        "tag_frequency": "on",
        "give_way": "to everything",
        "communication": "bf16",
        "first_frame_probability": 0.5,
    },
    "preview": {
        "prompts": "a\nb",
        "every": 3,
        "steps": 4,
        "cfg": 2.5,
        "sampler_name": "ddim",
        "scheduler": "karras",
        "seed": 5,
        "negative_prompt": "blurry",
        "strength": 0.8,
    },
    "optimizer": {
        "optimizer": "AdamW",
        "weight_decay": 0.5,
        "schedule": "cosine",
        "warmup_steps": 3,
        "accumulation": 4,
        "max_grad_norm": 0.0,
        "ema_decay": 0.9,
        "beta1": 0.8,
        "beta2": 0.99,
        "num_cycles": 3,
        "power": 2.0,
        "loss_spike_factor": 20.0,
        "warmup_ratio": 0.1,
        "min_lr_ratio": 0.1,
        "decay_ratio": 0.5,
        "optimizer_args": "eps=1e-6 betas=0.8,0.9",
        "schedule_points": "0:1, 50:0.5",
        "preset": "Flux character",
    },
    "memory": {
        "checkpointing": "on",
        "compute_dtype": "bf16",
        "micro_batch": 2,
        "offload": "on",
        "shard": "off",
        "recompute": "all but attention",
        "compile": "on",
        "base_dtype": "nf4",
        "preset": "Flux character",
    },
    "pivotal": {"name": "w", "init_text": "dog", "vectors": 3, "learning_rate": 0.1, "stop_fraction": 0.3},
    "objective": {
        "timesteps": "logit-normal",
        "min_timestep": 100,
        "max_timestep": 900,
        "weighting": "min-SNR",
        "min_snr_gamma": 2.0,
        "loss": "L1",
        "noise_offset": 0.05,
        "input_perturbation": 0.1,
        "pyramid_discount": 0.3,
        "timestep_mean": -0.5,
        "timestep_std": 2.0,
        "timestep_shift": 2.0,
        "huber_c": 0.2,
        "huber_schedule": "constant",
        "timestep_mode_scale": 0.5,
        "timestep_alpha": 3.0,
        "timestep_beta": 3.0,
        "stratified": "on",
        "p2_gamma": 0.5,
        "l1_fraction": 0.3,
        "noise_offset_random_strength": "on",
        "adaptive_noise_scale": 0.1,
        "masked_prior_weight": 1.0,
        "preset": "Flux character",
    },
    "adapter": {
        "type": "LoHa",
        "alpha": 2.0,
        "targets": "all linear",
        "dropout": 0.1,
        "text_encoder": "on",
        "text_encoder_rank": 2,
        "text_encoder_learning_rate": 1e-5,
        "adapter_args": "rank_dropout=0.1",
        "preset": "Flux character",
        "start_from": "a.safetensors",
        "target_patterns": "attn1",
        "block_ranks": "middle_block=2",
        "block_learning_rates": "middle_block=1e-5",
        "lora_plus_ratio": 4.0,
        "weight_dtype": "bf16",
    },
}
# Other fields that a field needs, because it has no effect alone and is refused.
BESIDE = {
    "num_cycles": ("optimizer", {"schedule": "cosine with restarts"}),
    "power": ("optimizer", {"schedule": "polynomial"}),
    "patience": ("run", {"stop_when": STOPS_FALLING}),
    "min_lr_ratio": ("optimizer", {"schedule": "cosine"}),
    "decay_ratio": ("optimizer", {"schedule": "warmup-stable-decay"}),
    "schedule_points": ("optimizer", {"schedule": "points", "schedule_points": "0:1"}),
    "text_encoder_rank": ("adapter", {"text_encoder": "on"}),
    "text_encoder_learning_rate": ("adapter", {"text_encoder": "on"}),
    "min_snr_gamma": ("objective", {"weighting": "min-SNR"}),
    "timestep_mean": ("objective", {"timesteps": "shifted"}),
    "timestep_std": ("objective", {"timesteps": "resolution-shifted"}),
    "timestep_shift": ("objective", {"timesteps": "shifted"}),
    "huber_c": ("objective", {"loss": "Huber"}),
    "huber_schedule": ("objective", {"loss": "Huber"}),
    "timestep_mode_scale": ("objective", {"timesteps": "mode"}),
    "timestep_alpha": ("objective", {"timesteps": "beta"}),
    "timestep_beta": ("objective", {"timesteps": "beta"}),
    "p2_gamma": ("objective", {"weighting": "P2"}),
    "l1_fraction": ("objective", {"loss": "MSE + L1"}),
    "noise_offset_random_strength": ("objective", {"noise_offset": 0.05}),
    "adaptive_noise_scale": ("objective", {"noise_offset": 0.05}),
}
# Fields that may change in a finished run; a change of any other field starts a new run.
FREE = {"run", "preview", "memory"}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in SET for name in SET[kind]])
def test_every_field_arrives_in_the_recipe(kind, name):
    if name == "weight_dtype":
        # For an adapter this field cannot be chosen; for full fine-tuning it decides the result.
        with pytest.raises(SettingsError, match="always train in fp32"):
            resolved(Options().adding(kind, {name: SET[kind][name]}))
        recipes = [
            resolved(options, method="all weights") for options in (Options(), Options().adding(kind, {name: "bf16"}))
        ]
        assert [recipe.weight_dtype for recipe in recipes] == ["fp32", "bf16"]
        assert recipes[0].identity("d", "b") != recipes[1].identity("d", "b")
        return
    # An embedding needs a name before any of its other fields is allowed.
    word = {"name": "w"} if kind == "pivotal" and name != "name" else {}
    without = Options().adding(*BESIDE.get(name, (kind, word)))
    if name == "preset":
        # It decides by the fields that it fills.
        assert resolved(without.adding(kind, {name: "Flux character"})).ema_decay == 0.99
        return
    widgets = {"batch_size": 2} if name == "stratified" else {}
    recipe = resolved(without.adding(kind, {name: SET[kind][name]}), **widgets)
    if name != "optimizer":
        assert recipe != resolved(without, **widgets)
    # The content of the starting adapter counts as part of the base; its file name does not.
    deciding = ("validation_fraction", "prompt_node", "communication", "first_frame_probability", "base_dtype")
    same_run = kind in FREE and name not in deciding or name == "start_from"
    if name != "optimizer":
        assert (recipe.identity("d", "b") == resolved(without, **widgets).identity("d", "b")) == same_run


@pytest.mark.parametrize("node", ["adapter", "optimizer", "memory", "objective"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_what_the_user_leaves_unset(name, node):
    """The run is the one of the same fields without a preset; what the user sets stays, on either side of the chain."""
    preset, own = {"preset": name}, Options()
    for (node, input), value in PRESETS[name].items():
        own = own.adding(node, {input: value})
    model = {"family": "SDXL" if name.startswith("SDXL") else "SD1"}
    filled = resolved(Options().adding(node, preset), **model)
    assert filled.identity("d", "b") == resolved(own, **model).identity("d", "b")
    assert filled == replace(resolved(own, **model), preset=name)
    assert describe_preset(filled).startswith(f"Preset {name}: ")
    assert all(f"{input} {value}" in describe_preset(filled) for (_, input), value in PRESETS[name].items())
    mine = Options().adding("adapter", {"targets": "all linear"}).adding(node, preset)
    mine = mine.adding("optimizer", {"optimizer": "Lion", "ema_decay": 0.5})
    recipe = resolved(mine, **model)
    assert (recipe.targets, recipe.optimizer, recipe.ema_decay) == ("all linear", "Lion", 0.5)
    assert "Prodigy" not in describe_preset(recipe) and "Adafactor" not in describe_preset(recipe)


@pytest.mark.parametrize("options, blames", [({}, True), ({"optimizer": "Adafactor"}, True), ({"beta2": 0.9}, False)])
def test_an_error_over_what_a_preset_has_set_names_the_preset(options, blames):
    """The user cannot unset what is unset."""
    fields = {"preference_beta": 2000.0} if not options else {}
    options = {"optimizer": "Adafactor", **options} if options else options
    with pytest.raises(SettingsError) as caught:
        resolved(Options().adding("optimizer", {**options, "preset": "SDXL character"}), **fields)
    assert ("The preset SDXL character has set it" in caught.value.cure) == blames


def test_without_a_preset_nothing_is_told():
    assert describe_preset(resolved()) == ""


def test_settings_of_a_schedule_that_contradict_each_other_are_refused():
    for values, name in (
        ({"schedule": "points"}, "schedule_points"),
        ({"schedule": "cosine", "schedule_points": "0:1"}, "schedule_points"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio"),
    ):
        with pytest.raises(SettingsError) as caught:
            resolved(Options().adding("optimizer", values))
        assert caught.value.input == name


@pytest.mark.parametrize("name", BESIDE)
def test_a_field_that_would_have_no_effect_is_refused(name):
    kind, _ = BESIDE[name]
    with pytest.raises(SettingsError, match=f"{name} is set, but .* no effect") as caught:
        resolved(Options().adding(kind, {name: SET[kind][name]}))
    assert caught.value.input == name


# The identity that the first version with runs gave to the recipe of `resolved`.
FIRST_IDENTITY = "45051b1be5a096ba30ca2ce6d9560ff4ea45014124abf0e74612040080c2d4e4"


def test_runs_from_before_a_field_came_keep_their_identity():
    assert resolved().identity("d", "b") == FIRST_IDENTITY
    named = {"timesteps": "uniform", "weighting": "native", "loss": "MSE", "max_timestep": 1000}
    spelt_out = Options().adding("objective", named).adding("optimizer", {"beta1": 0.9, "beta2": 0.999})
    assert resolved(spelt_out).identity("d", "b") == FIRST_IDENTITY


def test_a_default_of_the_objective_that_is_in_use_is_part_of_a_run():
    """A later version with another default then starts a new run."""
    recipe = resolved(Options().adding("objective", {"weighting": "min-SNR"}))
    assert recipe.deciding()["objective"] == {"weighting": "min-SNR", "min_snr_gamma": 5.0}


@pytest.mark.parametrize(
    "optimizer, learning_rate, weight_decay, betas",
    [
        ("AdamW", 1e-4, 0.01, (0.9, 0.999)),
        ("AdamW8bit", 1e-4, 0.01, (0.9, 0.999)),
        ("PagedAdamW8bit", 1e-4, 0.01, (0.9, 0.999)),
        ("Adafactor", 1e-4, 0.0, (0.0, 0.0)),
        ("Prodigy", 1.0, 0.01, (0.9, 0.999)),
        ("Lion", 1e-4 / 3, 0.03, (0.9, 0.99)),
        ("CAME", 1e-4, 0.0, (0.9, 0.999)),
        ("AdamWScheduleFree", 1e-4, 0.01, (0.9, 0.999)),
        ("SGD", 0.1, 0.0, (0.0, 0.0)),
        ("ADOPT", 1e-4, 0.0, (0.9, 0.9999)),
        ("Lamb", 1e-3, 0.0, (0.9, 0.999)),
    ],
)
def test_defaults_depend_on_the_optimizer(optimizer, learning_rate, weight_decay, betas):
    options = Options().adding("optimizer", {"optimizer": optimizer})
    recipe = resolved(options)
    assert (recipe.learning_rate, recipe.weight_decay) == (learning_rate, weight_decay)
    assert (recipe.beta1, recipe.beta2) == betas
    assert (recipe.schedule, recipe.warmup_steps) == ("constant", 0)
    assert resolved(options, learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    "optimizer, field, value",
    [
        ("AdamWScheduleFree", "schedule", "cosine"),
        ("AdamWScheduleFree", "ema_decay", 0.9),
        ("AdamWScheduleFree", "beta1", 0.0),
        ("SGDScheduleFree", "beta2", 0.9),
        ("ProdigyPlusScheduleFree", "schedule", "cosine"),
        ("Adafactor", "beta2", 0.9),
        ("SGD", "beta1", 0.9),
        ("AdamW", "optimizer_args", "momentum=0.9"),
        ("AdamW", "optimizer_args", "lr=1"),
        ("AdamW", "optimizer_args", "weight_decay=1"),
        ("AdamW", "optimizer_args", "betas=2,2"),
        ("SOAP", "optimizer_args", "precondition_frequency=0"),
        ("SOAP", "optimizer_args", "betas=0.9"),
        ("Muon", "optimizer_args", "ns_steps=0"),
        ("DAdaptAdam", "optimizer_args", "d0=0"),
        ("pytorch-optimizer", "optimizer_args", "eps=1e-6"),
        ("pytorch-optimizer", "optimizer_args", "name=LBFGS"),
        ("pytorch-optimizer", "optimizer_args", "name=LOMO maximize=false"),
        ("pytorch-optimizer", "optimizer_args", "name=AliG momentum=0.5"),
        ("pytorch-optimizer", "optimizer_args", "name=ADOPT hat=1"),
    ],
)
def test_what_an_optimizer_cannot_go_with_is_refused(optimizer, field, value):
    with pytest.raises(SettingsError, match=f"{field}|{optimizer}") as caught:
        resolved(Options().adding("optimizer", {"optimizer": optimizer, field: value}))
    assert caught.value.input == field


def test_every_option_is_tried_above():
    assert {kind: set(values) for kind, values in OPTIONS.items()} == {
        kind: set(values) for kind, values in SET.items()
    }


def test_options_that_came_later_leave_the_identity_of_earlier_runs():
    """Fields added after the first runs need a listed value that means the old behavior."""
    recipe = resolved()
    assert recipe.deciding() == {
        "method": "LoRA",
        "learning_rate": 1e-4,
        "rank": 4,
        "alpha": 4.0,
        "batch_size": 1,
        "seed": 0,
        "resolution": 512,
        "optimizer": "AdamW",
        "weight_decay": 0.01,
        "schedule": "constant",
        "warmup_steps": 0,
        "accumulation": 1,
        "max_grad_norm": 1.0,
        "ema_decay": 0.0,
        "validation_fraction": 0.0,
        "family": "SD1",
        "trigger": "",
    }
    assert recipe.identity("d", "b") == "45051b1be5a096ba30ca2ce6d9560ff4ea45014124abf0e74612040080c2d4e4"


@pytest.mark.parametrize(
    "values, named",
    [
        ({"alpha": -1.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"lora_plus_ratio": -1.0}, "lora_plus_ratio"),
        ({"type": "LoKr", "dropout": 0.1}, "LoKr has no dropout"),
        ({"type": "IA3", "alpha": 2.0}, "IA3 has no alpha"),
        ({"type": "OFT", "block_ranks": "attn=2"}, "OFT has no block_ranks"),
        ({"type": "LoHa", "lora_plus_ratio": 4.0}, "LoHa has no lora_plus_ratio"),
        ({"type": "QLoRA"}, "QLoRA"),
        ({"targets": "patterns"}, "target_patterns"),
        ({"targets": "attention", "target_patterns": "attn1"}, "target_patterns"),
        ({"target_patterns": "attn("}, "attn\\("),
        ({"block_ranks": "attn"}, "block_ranks"),
        ({"block_ranks": "attn=many"}, "block_ranks"),
        ({"block_ranks": "attn=-1"}, "block_ranks"),
        ({"block_learning_rates": "attn(=1"}, "attn\\("),
    ],
    ids=str,
)
def test_adapter_options_that_make_no_sense_are_refused_by_name(values, named):
    with pytest.raises(SettingsError, match=named):
        resolved(Options().adding("adapter", values))


def test_oft_needs_blocks_of_two():
    with pytest.raises(SettingsError, match="rank is 1"):
        resolved(Options().adding("adapter", {"type": "OFT"}), rank=1)


@pytest.mark.parametrize("kind, scale", [("LoRA", "scale 2"), ("rsLoRA", "scale 4"), ("LoHa", "scale 2")])
def test_the_effective_scale_is_shown(kind, scale):
    recipe = resolved(Options().adding("adapter", {"type": kind, "alpha": 8.0}))
    assert f"(effective {scale})" in summarize(recipe)


def test_types_without_alpha_show_no_scale():
    assert "scale" not in summarize(resolved(Options().adding("adapter", {"type": "IA3"})))


def test_the_node_nearest_the_trainer_wins():
    far = Options().adding("optimizer", {"weight_decay": 0.1, "warmup_steps": 5})
    near = far.adding("optimizer", {"weight_decay": 0.2, "warmup_steps": -1})
    recipe = resolved(near)
    assert (recipe.weight_decay, recipe.warmup_steps) == (0.2, 5)
    assert far.value("optimizer", "weight_decay", None) == 0.1


def test_an_unknown_option_is_refused():
    with pytest.raises(SettingsError, match="weigth_decay"):
        Options().adding("optimizer", {"weigth_decay": 1.0})


@pytest.mark.parametrize(
    "widgets",
    [{"learning_rate": 1e-3}, {"rank": 8}, {"batch_size": 2}, {"seed": 1}, {"resolution": 256}, {"trigger": "sks"}],
    ids=lambda widgets: next(iter(widgets)),
)
def test_widgets_that_decide_the_result_make_another_run(widgets):
    assert resolved(**widgets).identity("d", "b") != resolved().identity("d", "b")


def test_more_steps_are_the_same_run():
    assert resolved(steps=20).identity("d", "b") == resolved().identity("d", "b")


def test_another_dataset_or_base_is_another_run():
    recipe = resolved()
    assert len({recipe.identity("d", "b"), recipe.identity("e", "b"), recipe.identity("d", "c")}) == 3


def test_the_method_and_the_family_are_part_of_a_run():
    recipe = resolved()
    others = [replace(recipe, method="other"), replace(recipe, family="SDXL")]
    assert len({one.identity("d", "b") for one in [recipe, *others]}) == 3


@pytest.mark.parametrize(
    "field, value",
    [("rank", 0), ("steps", 0), ("batch_size", 0), ("learning_rate", 101.0), ("learning_rate", -1.0)],
)
def test_what_is_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(SettingsError, match=field) as caught:
        resolved(**{field: value})
    assert caught.value.input == field


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", ".hidden", "end.", "nul\0", "x" * 200, "CON:"])
def test_names_that_are_no_folder_are_refused(name):
    with pytest.raises(SettingsError, match="name"):
        resolved(Options().adding("run", {"name": name}))


def test_defaults_are_those_of_the_family():
    assert resolved().learning_rate == family_of("SD1").lora_learning_rate
    assert resolved().resolution == 512
    assert resolved().alpha == 4.0
    assert resolve(Options(), family_of("Flux"), RecipeInputs("LoRA", 1, 0.0, 4, 1, 0, 0, "")).preview_cfg == 1.0


def test_a_recipe_can_be_written_down():
    import json

    recipe = models.recipe("SD1")
    text = json.loads(json.dumps(recipe.as_json()))
    assert set(text) == {field.name for field in fields(Recipe)}


@pytest.mark.parametrize(
    "family, path, attention",
    [
        ("SD1", "input_blocks.1.1.transformer_blocks.0.attn1.to_q", True),
        ("SD1", "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0", True),
        ("SD1", "input_blocks.1.1.transformer_blocks.0.ff.net.2", False),
        ("SD1", "input_blocks.1.1.proj_in", False),
        ("SDXL", "middle_block.1.transformer_blocks.3.attn2.to_v", True),
        ("Flux", "double_blocks.0.img_attn.qkv", True),
        ("Flux", "double_blocks.0.txt_attn.proj", True),
        ("Flux", "double_blocks.0.img_mlp.0", False),
        ("Flux", "single_blocks.12.linear1", True),
        ("Flux", "img_in", False),
        ("general", "anything", True),
    ],
)
def test_which_layers_are_attention(family, path, attention):
    assert is_attention(path, family_of(family)) == attention


def test_every_family_has_a_name_of_its_own():
    assert all(name == family.name for name, family in FAMILIES.items())


def test_a_preset_of_layers_that_the_family_lacks_is_refused():
    with pytest.raises(SettingsError, match="targets is 'style', but Graft knows no such layers in SD1") as caught:
        resolved(Options().adding("adapter", {"targets": "style"}))
    assert caught.value.input == "targets"
    inputs = RecipeInputs("LoRA", 10, 0.0, 4, 1, 0, 0, "")
    assert resolve(Options().adding("adapter", {"targets": "style"}), family_of("SDXL"), inputs).targets == "style"
    with pytest.raises(SettingsError, match="choose content, style, or attention"):
        resolve(Options().adding("adapter", {"targets": "single blocks"}), family_of("SDXL"), inputs)
