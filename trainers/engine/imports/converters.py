"""Reading of other trainers' settings (TOML, JSON and YAML, within bounds), and tools for the tables of their fields.

A table maps a field to an option (`optimizer.schedule`), a trainer's widget (`trainer.steps`) or an input of the
dataset node (`dataset.flip`), or to "" if another field's converter reads it. A converter takes a value and all fields,
and returns values by target. It raises SettingsError for a value that Graft does not have.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import SettingsError, needing
from ...optimizers import OPTIMIZERS
from ...recipe.options import OPTIONS
from ...text import check_text
from ..validation import check_option, choices_of

Fields = Mapping[str, Any]
Converted = dict[str, Any] | None
Converter = Callable[[Any, Fields], Converted]

_LONGEST_TEXT = 100_000
_DEEPEST = 12
CURE = "Paste the whole settings file of kohya's sd-scripts, kohya_ss, OneTrainer or ai-toolkit."
OWN_LEVELS = "Graft draws uniformly over the model's own levels."
EPOCHS = "Graft counts steps: pictures x repeats x epochs / batch size."
ADAPTER = "Connect Graft Load Adapter to the trainer."
ZERO_SNR = "Put ModelSamplingDiscrete with zsnr before the trainer."

_OFF = {"", "0", "0.0", "false", "none", "off", "never", "[]", "{}"}
# Other names of choices, without case and punctuation.
_ALIASES = {
    "optimizer": "adam=AdamW adam8bit=AdamW8bit adamw8=AdamW8bit schedulefreeadamw=AdamWScheduleFree",
    "schedule": "constantwithwarmup=constant cosinewithminlr=cosine cosinewithhardrestarts=cosinewithrestarts "
    "inversesqrt=inversesquareroot",
    "loss": "l2=MSE mae=L1",
    "compute_dtype": "no=fp32 float=fp32 float32=fp32 tfloat32=fp32 float16=fp16 bfloat16=bf16",
    "base_dtype": "true=fp8scaled float8=fp8scaled qfloat8=fp8scaled qint8=int8 nfloat4=nf4 float16=asitis "
    "bfloat16=asitis float32=asitis",
    "sampler_name": "ddim=ddim euler=euler keuler=euler eulera=euler_ancestral keulera=euler_ancestral heun=heun "
    "dpm2=dpm_2 kdpm2=dpm_2 dpm2a=dpm_2_ancestral kdpm2a=dpm_2_ancestral lms=lms klms=lms",
}


def parse_settings(text: str) -> dict[str, Any]:
    """Parse a settings file, in the format that its first line shows.

    Raises:
        SettingsError: the text is empty, too long, too deeply nested, or is no table of settings.
    """
    if len(text) > _LONGEST_TEXT:
        raise SettingsError(f"The text has {len(text)} characters, more than {_LONGEST_TEXT}.", CURE, "text")
    first = next((line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")), "")
    kind = "JSON" if first.startswith("{") else "TOML" if re.match(r"\[|[\w\"'.-]+\s*=", first) else "YAML"
    try:
        values = {"JSON": json.loads, "TOML": _read_toml, "YAML": _read_yaml}[kind](text)
    except RecursionError as error:
        raise SettingsError(f"The {kind} text is nested too deeply.", CURE, "text") from error
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"The text is no valid {kind}: {_printable(error, 200)}.", CURE, "text") from error
    if not isinstance(values, dict):
        raise SettingsError("The text is no settings file.", CURE, "text")
    return values


def _read_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        # Python 3.10.
        with needing("tomli", "Reading TOML on this Python", "or paste the settings as JSON", "text"):
            import tomli as tomllib
    return tomllib.loads(text)


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                # References can stand for more than memory holds; tags for other types.
                raise ValueError("it has a reference or a tag, which Graft does not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RecursionError
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def flatten(values: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Return nested tables as one, with names such as `train.lr`. Lists stay.

    Raises:
        SettingsError: the tables are nested too deeply.
    """
    if depth > _DEEPEST:
        raise SettingsError("The text is nested too deeply.", CURE, "text")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{_printable(key)}"
        flat.update(flatten(value, f"{name}.", depth + 1) if isinstance(value, dict) and value else {name: value})
    return flat


def split_arguments(value: Any) -> dict[str, str]:
    """Split arguments such as ["a=1", "b=2"] or "a=1 b=2" by name. A part without = has an empty value."""
    words = value if isinstance(value, list) else str(value).split()
    parts = (_printable(word, 200).strip("\"' ").partition("=") for word in words)
    return {name.strip(): text.strip("\"' ") for name, _, text in parts}


def shown(value: Any) -> str:
    """Return a value as reports write it: short, and in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else _printable(value)


def _printable(value: Any, most: int = 60) -> str:
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)[: 4 * most]).split())
    return text if len(text) <= most else f"{text[:most]}..."


def table(**targets: str) -> dict[str, str]:
    """Return targets by field, from words `input=field` by node; `input` stands for two equal names."""
    pairs = [(node, *word.partition("=")) for node, words in targets.items() for word in words.split()]
    return {field or input: f"{node}.{input}" if node != "read" else "" for node, input, _, field in pairs}


def is_off(value: Any) -> bool:
    """Return True for nothing, zero, and a switch that is off."""
    return str(value).strip().lower() in _OFF


def is_on(fields: Fields, name: str) -> bool:
    """Return True if a field is there and not off."""
    return not is_off(fields.get(name))


def number(value: Any) -> float:
    """Return a finite number. YAML has 1e-4 as a text."""
    try:
        result = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise SettingsError("It is no finite number.")
    return result


def whole(value: Any) -> int:
    """Return a whole number."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}", value.strip()):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if number(value) % 1:
        raise SettingsError("It is no whole number.")
    return int(number(value))


def plain(name: Any) -> str:
    """Return a name without module, case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", str(name).rpartition(".")[2].lower())


def choice(input: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return the choice that a name stands for."""
    aliases = dict(word.split("=") for word in _ALIASES.get(input, "").split())
    name = aliases.get(plain(value), str(value))
    known = {plain(choice): choice for choice in choices or aliases.values()}
    if plain(name) not in known or name == "pytorch-optimizer":
        raise SettingsError("Graft has no such choice.")
    return known[plain(name)]


def typed(node: str, input: str, value: Any) -> Any:
    """Return a value as the option takes it."""
    declared = OPTIONS[node][input]
    if isinstance(declared.unset, (int, float)):
        value = (whole if isinstance(declared.unset, int) else number)(value)
    elif declared.choices == ("on", "off"):
        value = "off" if is_off(value) else "on"
    elif declared.unset == "auto":
        value = choice(input, value, choices_of(declared.choices))
    else:
        value = str(value)
        check_text(value, input, 100_000)
    check_option(node, input, value)
    return value


def optimizer(value: Any, fields: Fields) -> Converted:
    """Convert an optimizer, with its library's defaults where Graft has others."""
    name = choice("optimizer", value, tuple(OPTIMIZERS))
    undecayed = "Prodigy", "Lion", "RAdamScheduleFree", *(() if "model_type" in fields else ("AdamWScheduleFree",))
    values: dict[str, Any] = {"optimizer.optimizer": name}
    if name in undecayed or plain(value) in ("adam", "adam8bit"):
        values["optimizer.weight_decay"] = 0.0
    if name == "Prodigy":
        values |= {"optimizer_args.use_bias_correction": False, "optimizer_args.safeguard_warmup": False}
    given = {field.rpartition(".")[2] for field, value in fields.items() if value is not None and value is not False}
    return {target: value for target, value in values.items() if target.partition(".")[2] not in given - {"optimizer"}}


def betas(value: Any, fields: Fields) -> Converted:
    """Convert two betas."""
    texts = value if isinstance(value, list) else str(value).strip("()[]").split(",")
    if len(texts) != 2:
        raise SettingsError("Graft takes two betas.")
    return {"optimizer.beta1": texts[0], "optimizer.beta2": texts[1]}


def warmup(value: Any, fields: Fields) -> Converted:
    """Convert steps, or a part of all steps. sd-scripts takes a 1 for a step, OneTrainer for all of them."""
    steps = number(value)
    if steps < 1 or (steps == 1 and "learning_rate_warmup_steps" in fields):
        return {"optimizer.warmup_ratio": steps}
    return {"optimizer.warmup_steps": per_step(value, fields)}


def per_step(value: Any, fields: Fields) -> int:
    """Return optimizer steps. OneTrainer and ai-toolkit's older accumulation count batches."""
    scripts = "train.lr" not in fields and "learning_rate_warmup_steps" not in fields
    name = "train.gradient_accumulation_steps" if "train.lr" in fields else "gradient_accumulation_steps"
    batches = 1 if scripts or not is_on(fields, name) else whole(fields[name])
    return max(1, whole(number(value) // batches)) if batches > 1 else whole(value)


def in_steps(target: str) -> Converter:
    """Return a converter of a number of steps."""
    return lambda value, fields: {target: per_step(value, fields)}


def min_snr(value: Any, fields: Fields) -> Converted:
    """Convert the gamma of min-SNR."""
    return {"objective.weighting": "min-SNR", "objective.min_snr_gamma": value}


def shifted(factor: float, mean: float, std: float) -> Converted:
    """Return logit-normal timesteps whose odds of noise a factor shifts."""
    names = ("timesteps", "timestep_shift", "timestep_mean", "timestep_std")
    return {f"objective.{name}": value for name, value in zip(names, ("shifted", factor, mean, std), strict=True)}


def same_as(name: str) -> Converter:
    """Return a converter that refuses another value than that of a field."""

    def convert(value: Any, fields: Fields) -> None:
        if number(value) != number(fields.get(name)):
            raise SettingsError("Graft gives convolutions rank and alpha of the other layers.")

    return convert


def factor(value: Any, fields: Fields) -> Converted:
    """Leave out a factor that the trainer chooses itself."""
    return {"adapter_args.factor": whole(value)} if number(value) >= 1 else None


def prompt_lines(value: Any, fields: Fields, flags: str) -> Converted:
    """Return prompts one per line, with the settings of each as flags: words `flag=field`."""
    lines = []
    for sample in value if isinstance(value, list) else [value]:
        sample = sample if isinstance(sample, dict) else {"prompt": sample}
        if sample.get("enabled") is False or is_off(sample.get("prompt")):
            continue
        parts = [str(sample["prompt"]).replace("[trigger]", str(fields.get("trigger_word") or ""))]
        for flag, name in (word.split("=") for word in flags.split()):
            given = sample.get(name, fields.get(f"sample.{name}") if flag in "whg" else None)
            parts += [] if is_off(given) else [f"--{flag} {given}"]
        lines.append(" ".join(" ".join(parts).split()).lstrip("# "))
    return {"preview.prompts": "\n".join(lines)}
