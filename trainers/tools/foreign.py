"""Kinds of files that Graft cannot apply, recognized by their keys."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        cure: what the user can do with it.
    """

    name: str
    cure: str


_PEFT = "Load it with peft onto the pipeline's model."
_KINDS = {
    r"lllite_|\.conditioning1\.": Kind("a ControlNet-LLLite", "Use a node for ControlNet-LLLite."),
    r"\bcontrol_model\.|\binput_hint_block|lora_controlnet": Kind("a ControlNet", "Use ComfyUI's Load ControlNet."),
    r"to_k_ip|to_v_ip|^image_proj\.|^ip_adapter\.": Kind("an IP-Adapter", "Use a node for IP-Adapters."),
    r"vera_lambda_[bd]": Kind("a VeRA, whose shared matrices the file does not hold in full", _PEFT),
    r"\.oft_R(\.|$)|\.oft_(?:diag|embedding)": Kind(
        "an OFT of another trainer, whose rotations ComfyUI cannot read",
        "Merge it into a checkpoint with the program that trained it, and take the difference with Graft Extract "
        "Adapter.",
    ),
    r"^base_model\.model\.|\.boft_[Rs](\.|$)|\.ia3_l(\.|$)|\.hra_u|\.ln_tuning|\.vblora_|\.spectrum|\.fourierft": Kind(
        "an adapter of peft without its folder", f"Put adapter_config.json next to it. {_PEFT}"
    ),
    r"motion_modules\.": Kind("a motion module", "Use a node for AnimateDiff."),
    r"^(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": Kind(
        "a checkpoint", "Load it with ComfyUI's Load Checkpoint."
    ),
    r"^(?:encoder|decoder)\.(?:conv_in|mid|down|up)": Kind("a VAE", "Load it with ComfyUI's Load VAE."),
}


GUESS = (
    "the file has no adapter_config.json of peft, so the rank counts as alpha, as in ComfyUI; the strength may differ "
    "from the maker's"
)


def has_guessed_alpha(keys: Iterable[str]) -> bool:
    """Report whether an adapter comes from a file of peft's without its configuration."""
    return any("base_model.model." in key for key in keys)


def kind_of(keys: Iterable[str]) -> Kind | None:
    """Return the kind of a file that no adapter loader reads, None if its keys are of no such kind."""
    names = list(keys)
    for pattern, kind in _KINDS.items():
        search = re.compile(pattern).search
        if any(map(search, names)):
            return kind
    return None
