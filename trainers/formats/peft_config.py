"""Checks of peft's configuration of an adapter, and peft's names of its tensors."""

import re
from collections.abc import Iterable
from typing import Any

from ..errors import ModelError

# peft's start values that it takes out of the base's weight: by name, or by a name and a number of iterations.
_AT_WEIGHT = re.compile(r"(?i:olora)|pissa(_niter_\d{1,4})?")
# Start values that change the base's weight by data or settings that the folder does not hold.
_OF_DATA = ("corda", "loftq", "lora_ga")
# peft has no conversion for it, and repeats the quantization only on a GPU, with bitsandbytes.
_QUANTIZED = (
    "Merge it with peft into its quantized base, save that, and take the difference with Graft Extract Adapter."
)
# Settings of peft's LoRA with which its layers compute something else.
_VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "alora_invocation_tokens", "arrow_config")
_VARIANTS += ("layer_replication", "target_parameters")
_TENSOR = re.compile(
    r"\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(\.weight)?|(hada|lokr)_\w+|oft_R(\.weight)?|boft_[Rs]|ia3_l)$"
)
# Limit on ranks and alphas: far beyond useful values, and safe to multiply in float32.
_LARGEST = 1e9


def check_config(config: Any, path: str) -> dict[str, Any]:
    """Check a peft configuration from a file and return it.

    Raises:
        ModelError: a field that Graft reads has an invalid value.
    """
    if not isinstance(config, dict):
        raise _invalid_config(path, "it is not an object")
    if not isinstance(config.get("peft_type", ""), str):
        raise _invalid_config(path, f"peft_type is {config['peft_type']!r:.40}")
    rank = config.get("r")
    if rank is not None and (type(rank) is not int or not 0 <= rank <= 2**20):
        raise _invalid_config(path, f"r is {rank!r:.40}")
    for name in ("lora_alpha", "alpha"):
        if config.get(name) is not None and not _is_number(config[name]):
            raise _invalid_config(path, f"{name} is {config[name]!r:.40}")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        if pattern is not None and not isinstance(pattern, dict):
            raise _invalid_config(path, f"{name} is not an object")
        for key, value in (pattern or {}).items():
            # A rank is a divisor, so it must be positive.
            if not _is_number(value) or (name == "rank_pattern" and value <= 0):
                raise _invalid_config(path, f"the {name} of {key[:80]} is {value!r:.40}")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _invalid_config(path: str, why: str) -> ModelError:
    return ModelError(
        f"The configuration of the adapter '{path}' is invalid ({why}).",
        "Restore it, or choose another adapter.",
        "adapter_name",
    )


def starts_at_weight(config: dict[str, Any]) -> bool:
    """Report whether a configuration's start values are a part of the base's weight, which peft subtracts from it."""
    init = config.get("init_lora_weights")
    return config.get("peft_type") == "LORA" and isinstance(init, str) and bool(_AT_WEIGHT.fullmatch(init))


def is_of_peft(name: str) -> bool:
    """Report whether a tensor's name ends as peft names the tensors of a layer."""
    return bool(_TENSOR.search(name))


def place_of(name: str) -> str:
    """Return the path of the layer that a tensor in peft's form belongs to."""
    return re.split(r"\.(?:lora_|hada_|lokr_|oft_|boft_|ia3_)", name)[0]


def check_kind(config: dict[str, Any], tensors: Iterable[str], path: str) -> None:
    """Refuse what Graft would apply with another effect than peft.

    Raises:
        ModelError: the configuration has a variant of LoRA, or start values that changed the base's weight in a way
            that the file does not hold; or a tensor has an unknown name.
    """
    variant = next((name for name in _VARIANTS if config.get(name)), None)
    unknown = next((name for name in tensors if not is_of_peft(name)), None)
    if variant or unknown:
        what = f"sets {variant}" if variant else f"has the tensor {unknown[:200]}, which peft adds to no layer"
        raise ModelError(
            f"The adapter '{path}' {what}. Graft cannot apply it.", "Load it with peft itself.", "adapter_name"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_OF_DATA):
        raise ModelError(
            f"The adapter '{path}' is for a base whose weights peft changed before training "
            f"(init_lora_weights is {init[:40]!r}). The file does not hold that change.",
            _QUANTIZED
            if init.lower().startswith("loftq")
            else "Save it in peft with path_initial_model_for_weight_conversion, which makes an ordinary LoRA.",
            "adapter_name",
        )
