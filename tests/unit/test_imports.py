"""Tests of the import of other trainers' settings, on small files with the fields that their documentation names."""

import json

import pytest
from graft_pack.trainers.engine.imports import converters
from graft_pack.trainers.engine.imports.settings import TRAINERS, WIDGETS, import_settings, recognize
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.recipe.options import OPTIONS

from tests.support.host import ROOT

FILES = ROOT / "tests" / "fixtures" / "recipes"

# Options, widgets and parts of the report by file, written from the tools' documentation and Graft's.
EXPECTED = {
    "sd_scripts.toml": (
        {
            "adapter.type": "LoKr",
            "adapter.targets": "attention + feed-forward",
            "adapter.alpha": 16.0,
            "adapter.adapter_args": "decompose_both=True factor=8",
            "adapter.text_encoder": "on",
            "adapter.text_encoder_learning_rate": 5e-5,
            "optimizer.optimizer": "AdamW8bit",
            "optimizer.weight_decay": 0.05,
            "optimizer.beta1": 0.9,
            "optimizer.beta2": 0.99,
            "optimizer.optimizer_args": "eps=1e-6",
            "optimizer.max_grad_norm": 0.0,
            "optimizer.accumulation": 4,
            "optimizer.schedule": "cosine with restarts",
            "optimizer.warmup_ratio": 0.1,
            "optimizer.num_cycles": 3,
            "objective.weighting": "min-SNR",
            "objective.min_snr_gamma": 7.0,
            "objective.noise_offset": 0.0357,
            "objective.noise_offset_random_strength": "on",
            "objective.adaptive_noise_scale": 0.00357,
            "objective.input_perturbation": 0.1,
            "objective.min_timestep": 10,
            "objective.max_timestep": 990,
            "objective.loss": "Huber",
            "objective.huber_c": 0.2,
            "objective.huber_schedule": "exponential",
            "memory.checkpointing": "on",
            "memory.compute_dtype": "bf16",
            "memory.base_dtype": "fp8 (scaled)",
            "memory.offload": "on",
            "run.name": "my lora",
            "run.save_every": 100,
            # sd-scripts keeps the saves of the last 300 steps: 1200, 1300, 1400 and 1500.
            "run.keep_last": 4,
            "run.tensorboard": "on",
            "preview.every": 200,
            "preview.sampler_name": "euler_ancestral",
        },
        {"steps": 1500, "learning_rate": 1e-4, "rank": 32, "batch_size": 2, "seed": 1234},
        ("timestep_bias = 3: Graft has nothing like it.", "zsnr", "flip of the dataset node", "LoKr has no dropout"),
    ),
    "sd_scripts.json": (
        {
            "adapter.type": "LoRA",
            "adapter.targets": "attention + feed-forward",
            # sd-scripts' default.
            "adapter.alpha": 1.0,
            "optimizer.optimizer": "AdEMAMix8bit",
            "optimizer.schedule": "warmup-stable-decay",
            "optimizer.warmup_steps": 50,
            "optimizer.decay_ratio": 0.25,
            "optimizer.min_lr_ratio": 0.1,
            "objective.timesteps": "shifted",
            "objective.timestep_shift": 3.1582,
            "objective.timestep_std": 1.2,
        },
        {"steps": 1000, "learning_rate": 1e-4, "rank": 8, "batch_size": 1, "seed": 0},
        ("max_train_epochs = 10: Graft counts steps", "min_snr_gamma = 5: sd-scripts does not use it for flow models"),
    ),
    "kohya_ss.json": (
        {
            "adapter.type": "LoRA with conv",
            "adapter.targets": "linear + conv",
            "adapter.alpha": 16.0,
            "adapter.text_encoder": "on",
            "optimizer.optimizer": "Prodigy",
            "optimizer.weight_decay": 0.0,
            "optimizer.optimizer_args": "use_bias_correction=false safeguard_warmup=false d_coef=2 decouple=True",
            "optimizer.schedule": "cosine",
            # 5 percent.
            "optimizer.warmup_ratio": 0.05,
            "objective.pyramid_discount": 0.2,
            "objective.loss": "MSE",
            "memory.checkpointing": "on",
            "memory.compute_dtype": "fp16",
            "preview.every": 150,
            "preview.prompts": "a dog --w 768 --h 512 --d 1\na cat",
        },
        {"steps": 900, "learning_rate": 1.0, "rank": 16, "batch_size": 4, "seed": 31337},
        ("text_encoder_lr = 0.5: This optimizer finds one learning rate", "caption_dropout of the dataset node"),
    ),
    "onetrainer.json": (
        {
            "adapter.type": "DoRA",
            "adapter.targets": "attention",
            "adapter.alpha": 12.0,
            "adapter.text_encoder": "on",
            "optimizer.optimizer": "Prodigy",
            "optimizer.weight_decay": 0.0,
            "optimizer.beta2": 0.99,
            "optimizer.optimizer_args": "d_coef=0.5 use_bias_correction=false safeguard_warmup=false",
            "optimizer.schedule": "cosine with restarts",
            # OneTrainer counts batches, two for each step.
            "optimizer.warmup_steps": 200,
            "optimizer.num_cycles": 2,
            "optimizer.min_lr_ratio": 0.2,
            "optimizer.accumulation": 2,
            "optimizer.max_grad_norm": 0.0,
            # Its average moves at every second step.
            "optimizer.ema_decay": pytest.approx(0.99**0.5),
            "objective.weighting": "P2",
            "objective.p2_gamma": 2.0,
            "objective.loss": "MSE + L1",
            "objective.l1_fraction": 0.3,
            "objective.noise_offset": 0.05,
            "objective.input_perturbation": 0.1,
            "objective.timesteps": "shifted",
            "objective.timestep_shift": 2.0,
            "objective.timestep_mean": -0.25,
            "objective.timestep_std": 1.5,
            "objective.min_timestep": 100,
            "objective.max_timestep": 900,
            "memory.compute_dtype": "bf16",
            "memory.base_dtype": "fp8 (scaled)",
            "memory.checkpointing": "off",
            "run.save_every": 100,
            "preview.prompts": "a red cube --w 512 --h 640 --s 15 --l 6.5 --d 7",
        },
        {"steps": 1000, "learning_rate": 2e-4, "rank": 24, "batch_size": 3, "seed": 0},
        ("epochs = 20: Graft counts steps", "sample_after = 10: Graft counts steps", "optimizer.growth_rate = inf"),
    ),
    "ai_toolkit.yaml": (
        {
            "run.name": "flux_subject",
            "adapter.type": "LoRA",
            "adapter.targets": "attention + feed-forward",
            "adapter.alpha": 8.0,
            "optimizer.optimizer": "Adafactor",
            "optimizer.weight_decay": 1e-4,
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": 20,
            "optimizer.accumulation": 2,
            "optimizer.ema_decay": 0.99,
            "objective.loss": "smooth L1",
            "objective.huber_c": 0.01,
            "objective.huber_schedule": "constant",
            "objective.timesteps": "shifted",
            "objective.timestep_shift": 1.0,
            "objective.timestep_std": 1.0,
            # Its levels count from the noise.
            "objective.min_timestep": 100,
            "objective.max_timestep": 900,
            "memory.checkpointing": "on",
            "memory.compute_dtype": "bf16",
            "memory.base_dtype": "fp8 (scaled)",
            "run.save_every": 250,
            "run.keep_last": 3,
            "preview.every": 300,
            "preview.prompts": "p3r5on on a beach --w 1024 --h 768 --g 4\n"
            "a bulldog: in a jacket --w 1024 --h 768 --g 4",
            "preview.seed": 42,
            "preview.steps": 25,
        },
        {"steps": 2000, "learning_rate": 1e-4, "rank": 16, "batch_size": 2, "seed": 0},
        ("train.diff_output_preservation = true", "datasets = 1: Add the other folders", "trigger of the dataset node"),
    ),
}


def recipe_of(imported):
    widgets = {"resolution": 0, "trigger": "", **imported.widgets}
    return resolve(imported.options, family_of("SD1"), RecipeInputs("LoRA", **widgets))


def imported_scripts(**fields):
    return import_settings(json.dumps({"learning_rate": 1e-4, "network_module": "networks.lora", **fields}))


def chosen(imported, node, input):
    return imported.options.value(node, input, None)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_gives_the_documented_values(name):
    options, widgets, parts = EXPECTED[name]
    imported = import_settings((FILES / name).read_text())
    assert {f"{node}.{input}": value for (node, input), value in imported.options.items()} == options
    assert imported.widgets == widgets and list(imported.widgets) == list(WIDGETS)
    for part in parts:
        assert part in imported.report


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_takes_all_imported_options(name):
    imported = import_settings((FILES / name).read_text())
    recipe = recipe_of(imported)
    for (node, input), value in imported.options.items():
        owner = recipe.objective if node == "objective" else recipe
        declared = OPTIONS[node][input]
        assert getattr(owner, declared.name) == declared.value_of(value), input


# Fields that other fields' rows read, or that their tool does not read for this model.
READ_ELSEWHERE = {"transformer.weight_dtype", "transformer.gradient_checkpointing", "sample.guidance_scale"} | {
    "timestep_sampling",
    "optimizer_args.relative_step",
    "network_args.conv_dim",
    "network_args.conv_alpha",
    "training_method",
    "weighting_scheme",
    "train.optimizer_params.relative_step",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_field_is_in_the_report(name):
    text = (FILES / name).read_text()
    tool, fields = recognize(text)
    report = import_settings(text).report
    read = {field for field, target in TRAINERS[tool].TABLE.items() if not target} | READ_ELSEWHERE
    assert [field for field in fields.keys() - read if field not in report] == []
    assert len(fields.keys() - read) > len(fields) / 2


@pytest.mark.parametrize("trainer", TRAINERS.values())
def test_every_row_has_a_target_that_exists(trainer):
    for field, target in trainer.TABLE.items():
        node, _, input = target.partition(".")
        if node and node not in ("dataset", "adapter_args", "optimizer_args"):
            assert input in WIDGETS if node == "trainer" else input in OPTIONS[node], field


# A field of sd-scripts with its values, and the option with Graft's values; None: it is reported.
CHOICES = {
    "lr_scheduler": (
        ("optimizer", "schedule"),
        {
            "constant": "constant",
            "constant_with_warmup": "constant",
            "linear": "linear",
            "cosine": "cosine",
            "cosine_with_restarts": "cosine with restarts",
            "cosine_with_min_lr": "cosine",
            "polynomial": "polynomial",
            "inverse_sqrt": "inverse square root",
            "warmup_stable_decay": "warmup-stable-decay",
            "adafactor": None,
            "piecewise_constant": None,
        },
    ),
    "optimizer_type": (
        ("optimizer", "optimizer"),
        {
            "AdamW": "AdamW",
            "adamw8bit": "AdamW8bit",
            "PagedAdamW8bit": "PagedAdamW8bit",
            "Lion": "Lion",
            "Lion8bit": "Lion8bit",
            "AdaFactor": "Adafactor",
            "DAdaptAdam": "DAdaptAdam",
            "DAdaptLion": "DAdaptLion",
            "Prodigy": "Prodigy",
            "AdamWScheduleFree": "AdamWScheduleFree",
            "RAdamScheduleFree": "RAdamScheduleFree",
            "pytorch_optimizer.CAME": "CAME",
            "prodigyplus.ProdigyPlusScheduleFree": "ProdigyPlusScheduleFree",
            "SGDNesterov": None,
            "DAdaptation": None,
            "my.Optimizer": None,
        },
    ),
    "loss_type": (
        ("objective", "loss"),
        {"l2": "MSE", "l1": "L1", "huber": "Huber", "smooth_l1": "smooth L1", "x": None},
    ),
    "mixed_precision": (("memory", "compute_dtype"), {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": None}),
    "network_module": (
        ("adapter", "type"),
        {
            "networks.lora": "LoRA",
            "networks.loha": "LoHa",
            "networks.lokr": "LoKr",
            "networks.oft": "OFT",
            "networks.dylora": None,
            "lycoris.kohya": "LoRA with conv",
        },
    ),
    "sample_sampler": (
        ("preview", "sampler_name"),
        {"ddim": "ddim", "k_euler": "euler", "dpm_2_a": "dpm_2_ancestral", "pndm": None},
    ),
}
CASES = [(field, value) for field, (_, values) in CHOICES.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES)
def test_a_choice_of_sd_scripts_has_its_name_here(field, value):
    (node, input), values = CHOICES[field]
    imported = imported_scripts(**{field: value})
    assert chosen(imported, node, input) == values[value]
    assert f"{field} = {value}" in imported.report
    recipe_of(imported)


@pytest.mark.parametrize(
    ("arguments", "kind", "targets", "words"),
    [
        ("", "LoRA with conv", "linear + conv", None),
        ("algo=locon dora_wd=True", "DoRA", "linear + conv", None),
        ("algo=loha preset=attn-only dora_wd=True", "LoHa", "attention", "dora_wd=True"),
        ("algo=lokr full_matrix=True factor=-1", "LoKr", "linear + conv", "full_matrix=True"),
        ("algo=boft preset=full-lin", "BOFT", "all linear", None),
        ("algo=diag-oft", "OFT", "all linear", None),
        ("algo=ia3", "IA3", "all linear", None),
        ("algo=glora", "GLoRA", "all linear", None),
        ("algo=full", None, None, None),
        ("algo=loha preset=my.toml", None, None, None),
    ],
)
def test_an_algorithm_of_lycoris_is_a_type(arguments, kind, targets, words):
    imported = imported_scripts(network_module="lycoris.kohya", network_args=arguments.split())
    assert [chosen(imported, "adapter", name) for name in ("type", "targets", "adapter_args")] == [kind, targets, words]
    if kind is None:
        assert "network_module = lycoris.kohya: Graft" in imported.report


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"timestep_sampling": "sigmoid"}, ("shifted", 1.0, 0.0, 1.0)),
        ({"timestep_sampling": "shift"}, ("shifted", 3.0, 0.0, 1.0)),
        ({"timestep_sampling": "flux_shift", "sigmoid_scale": 0.8}, ("resolution-shifted", None, 0.0, 0.8)),
        # The levels count from the noise.
        ({"weighting_scheme": "logit_normal", "logit_mean": 0.5}, ("shifted", 3.0, -0.5, 1.0)),
        ({"timestep_sampling": "uniform"}, (None, None, 0.0, None)),
    ],
)
def test_timesteps_of_flow_models_are_those_of_sd_scripts(fields, expected):
    imported = imported_scripts(network_module="networks.lora_flux", **fields)
    got = [
        chosen(imported, "objective", name) for name in ("timesteps", "timestep_shift", "timestep_mean", "timestep_std")
    ]
    assert (got[0], got[1], got[2] or 0.0, got[3]) == expected
    if got[0] is None:
        assert "Graft draws uniformly" in imported.report


@pytest.mark.parametrize(
    ("fields", "on", "rate"),
    [
        ({}, "on", None),
        ({"text_encoder_lr": 1e-4}, "on", None),
        ({"text_encoder_lr": 1e-5}, "on", 1e-5),
        ({"text_encoder_lr": [1e-5, 2e-5]}, None, None),
        ({"text_encoder_lr": 0}, None, None),
        ({"network_train_unet_only": True, "text_encoder_lr": 1e-5}, None, None),
    ],
)
def test_the_text_encoder_is_trained_as_by_sd_scripts(fields, on, rate):
    imported = imported_scripts(**fields)
    assert chosen(imported, "adapter", "text_encoder") == on
    assert chosen(imported, "adapter", "text_encoder_learning_rate") == rate


# Values that Graft refuses, with the field that the report names.
REFUSED = {
    "network_dim": 5000,
    "seed": -1,
    "train_batch_size": "many",
    "learning_rate": "NaN",
    "gradient_accumulation_steps": 1.5,
    "noise_offset": 7,
    "min_snr_gamma": [5],
    "network_alpha": 1e300,
    "max_timestep": 10**40,
    "output_name": "a/b",
    "sample_prompts": "a dog --unknown 3",
    "max_train_steps": True,
    "save_every_n_steps": [1],
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_value_that_graft_refuses_is_named_and_not_taken(field):
    usual, imported = imported_scripts(), imported_scripts(**{field: REFUSED[field]})
    lines = imported.report.split("Not taken:")[1].split("\n\n")[0]
    assert field in lines
    assert imported.options.keys() - {("adapter", "alpha")} <= usual.options.keys()
    assert field in ("learning_rate", "network_dim", "max_train_steps") or imported.widgets == usual.widgets


def test_what_contradicts_is_left_out_and_named():
    imported = imported_scripts(optimizer_type="AdamWScheduleFree", lr_scheduler="cosine", lr_warmup_steps=10)
    assert chosen(imported, "optimizer", "schedule") is None
    assert "lr_scheduler = cosine: AdamWScheduleFree averages" in imported.report
    imported = imported_scripts(noise_offset=0.1, multires_noise_iterations=6)
    assert chosen(imported, "objective", "noise_offset") is None and "noise_offset = 0.1: pyramid" in imported.report


def test_arguments_of_the_optimizer_that_are_off_stay_off():
    imported = imported_scripts(optimizer_type="Prodigy", optimizer_args=["decouple=False", "weight_decay=0"])
    words = chosen(imported, "optimizer", "optimizer_args").split()
    assert sorted(words) == ["decouple=False", "safeguard_warmup=false", "use_bias_correction=false"]
    assert chosen(imported, "optimizer", "weight_decay") == 0.0


@pytest.mark.parametrize(
    ("arguments", "refused"), [("relative_step=False", False), ("relative_step=True", True), ("", True)]
)
def test_adafactors_own_rate_is_not_taken(arguments, refused):
    """Without the argument sd-scripts sets it."""
    imported = imported_scripts(optimizer_type="Adafactor", optimizer_args=arguments.split())
    assert chosen(imported, "optimizer", "optimizer") == "Adafactor"
    assert chosen(imported, "optimizer", "optimizer_args") is None
    assert ("takes the learning rate as it is" in imported.report) == refused


def test_options_upstream_stay_and_the_imported_ones_win():
    before = Options().adding("optimizer", {"optimizer": "Lion", "beta1": 0.8}).adding("run", {"keep_last": 9})
    after = imported_scripts(optimizer_type="AdamW").added_to(before)
    assert [after.value("optimizer", name, None) for name in ("optimizer", "beta1")] == ["AdamW", 0.8]
    assert after.value("run", "keep_last", None) == 9


def test_onetrainers_intervals_of_time_are_not_taken():
    for unit, value in (("STEP", 100), ("MINUTE", None), ("NEVER", None)):
        text = json.dumps({"training_method": "LORA", "lora_rank": 4, "save_every": 100, "save_every_unit": unit})
        assert chosen(import_settings(text), "run", "save_every") == value


def test_a_node_without_a_text_changes_nothing():
    imported = import_settings(" \n")
    assert imported.options == {} and "nothing" in imported.report
    assert imported.widgets == {"steps": 1000, "learning_rate": 0.0, "rank": 16, "batch_size": 1, "seed": 0}


@pytest.mark.parametrize(
    ("method", "node"), [("FINE_TUNE", "Graft Fine-tune"), ("EMBEDDING", "Graft Textual Inversion")]
)
def test_other_methods_name_their_node(method, node):
    imported = import_settings(
        json.dumps({"training_method": method, "model_type": "STABLE_DIFFUSION_15", "ema": "GPU"})
    )
    assert node in imported.report and ("adapter", "type") not in imported.options


BOMB = "a: &a [x]\n" + "".join(f"k{n}: &b{n} [*a, *a, *a, *a]\n" for n in range(9))
HOSTILE = {
    "prose": ("Train it for a while, please.", "no settings file"),
    "number": ("12", "no settings file"),
    "list": ("- a\n- b", "no settings file"),
    "other JSON": ('{"name": "x", "version": 2}', "no settings that Graft knows"),
    "broken JSON": ('{"a": ', "no valid JSON"),
    "broken TOML": ("a = \n", "no valid TOML"),
    "broken YAML": ("a: [1\nb: }", "no valid YAML"),
    "too long": ("a: 1\n" * 40_000, "more than 100000"),
    "alias bomb": (BOMB, "reference or a tag"),
    "merge bomb": ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "reference or a tag"),
    "object": ("a: !!python/object/apply:os.system ['true']", "reference or a tag"),
    "deep YAML": ("a: " + "[" * 500 + "]" * 500, "too deeply"),
    "nested YAML": ("a: " + "[" * 40 + "]" * 40, "too deeply"),
    "deep JSON": ('{"a":' * 15_000 + "1" + "}" * 15_000, "too deeply"),
    "nested JSON": ('{"a":' * 40 + "1" + "}" * 40, "too deeply"),
    "deep TOML": ("a = " + "[" * 20_000 + "]" * 20_000, "too deeply"),
    "huge number": ('{"seed": ' + "9" * 5000 + ', "network_dim": 4}', "no valid JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_an_error_that_names_the_cure(name):
    text, message = HOSTILE[name]
    with pytest.raises(SettingsError, match=message) as caught:
        import_settings(text)
    assert caught.value.input == "text" and caught.value.cure and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "value", [None, [], {}, [[1]], {"a": [None]}, "x" * 5000, "\x00\u202e\ud800", True, -1, 1e308, 10**300]
)
@pytest.mark.parametrize("tool", TRAINERS)
def test_no_value_of_any_field_raises_another_error(tool, value):
    for field in (*TRAINERS[tool].TABLE, *TRAINERS[tool].CONVERTERS):
        values = {"learning_rate": 1e-4, "lora_rank" if tool == "OneTrainer" else "network_dim": 4, field: value}
        if tool == "ai-toolkit":
            section, _, name = field.rpartition(".")
            given = {name: value}
            for part in reversed(section.split(".") if section else []):
                given = {part: given}
            values = {"config": {"process": [{"train": {"lr": 1e-4}, **given}]}}
        try:
            report = import_settings(json.dumps(values)).report
        except SettingsError:
            continue
        assert len(report) < 21_000 and report.isprintable() is False and "\x00" not in report


def test_toml_without_a_reader_names_the_package(monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name in ("tomllib", "tomli"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SettingsError, match="pip install tomli"):
        converters.parse_settings("a = 1")
