"""Adapter tools on ComfyUI's device, one layer at a time, and extraction from two MODELs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import comfy.lora
import comfy.model_management
import comfy.utils
import torch

from ....trainers.errors import ModelError
from ....trainers.families import family_of
from ....trainers.formats.keys import BIAS, WHOLE
from ....trainers.tools.extract import Extraction, Weight, extract
from ....trainers.tools.merge import Merging, merge
from ....trainers.tools.resize import resize
from ..model import families
from ..model.lora import classic
from ..model.lora_schedule import refuse_ranged
from ..server.progress import counter

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

    from ....trainers.formats.adapter import Adapter

log = logging.getLogger(__name__)

# The SVD of a layer needs its matrix this many times, in float32.
_COPIES = 8


def merge_adapters(a: dict, b: dict, how: Merging, node: str) -> Adapter:
    """Merge adapters with `merge` on ComfyUI's device."""
    return merge(a, b, how, _device_for([*a.values(), *b.values()]), counter(node))


def resize_adapter(adapter: dict, rank: int, energy: float, node: str) -> Adapter:
    """Resize an adapter with `resize` on ComfyUI's device."""
    return resize(adapter, rank, energy, _device_for(adapter.values()), counter(node))


def _device_for(tensors) -> torch.device:
    """Return ComfyUI's device, after making room for the largest layer."""
    device = comfy.model_management.get_torch_device()
    largest = max((tensor.numel() for tensor in tensors), default=0)
    comfy.model_management.free_memory(_COPIES * 4 * largest, device)
    return device


def extract_adapter(
    models: tuple[ModelPatcher, ModelPatcher],
    clips: tuple[CLIP | None, CLIP | None],
    how: Extraction,
    node: str,
) -> tuple[Adapter, str]:
    """Return (adapter, report) of the first of each pair minus the second, patches included.

    Raises:
        ModelError: the two are of different architectures, or one CLIP is missing.
    """
    given = _patchers(models, clips)
    total = sum(len(one.model.state_dict()) for one, _, _ in given)
    tick = counter(node)
    with torch.no_grad():
        adapter, report = extract(_differing(given, tick, total), how, [])
    log.info("Graft: extracted an adapter. %s", report.replace("\n", "; "))
    return adapter, report


def _patchers(models, clips) -> list[tuple[ModelPatcher, ModelPatcher, Callable[[str], tuple[str, str]]]]:
    """Return checked (tuned, base, function from a weight's key to its place in the file), with weights in place."""
    if (clips[0] is None) != (clips[1] is None):
        missing = "clip_tuned" if clips[0] is None else "clip_base"
        raise ModelError(
            f"{missing} is not connected, but the other text encoder is.", "Connect both, or neither.", missing
        )
    refuse_ranged(models[0], "model_tuned", "extraction")
    refuse_ranged(models[1], "model_base", "extraction")
    tuned, base = classic(models[0], "model_tuned"), classic(models[1], "model_base")
    _check_alike(tuned, base, "model_tuned")
    found = [(tuned, base, model_names(base))]
    if clips[0] is not None:
        tuned, base = classic(clips[0].patcher, "clip_tuned"), classic(clips[1].patcher, "clip_base")
        _check_alike(tuned, base, "clip_tuned")
        found.append((tuned, base, text_names(clips[1])))
    return found


def _check_alike(tuned: ModelPatcher, base: ModelPatcher, input: str) -> None:
    shapes = [{key: tuple(value.shape) for key, value in _weights(one).items()} for one in (tuned, base)]
    names = [type(one.model).__name__ for one in (tuned, base)]
    odd = sorted(shapes[0].keys() ^ shapes[1].keys())
    odd += [key for key in shapes[0] if key in shapes[1] and shapes[0][key] != shapes[1][key]]
    if odd:
        sizes = " and ".join(str(list(one[odd[0]])) if odd[0] in one else "missing" for one in shapes)
        raise ModelError(
            f"The two inputs have different architectures ({names[0]} and {names[1]}): {odd[0]} is {sizes}.",
            "Connect a trained model and the model it was trained from.",
            input,
        )


def _weights(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """Return the weights that training changes, by key, without buffers and the sampling's tables."""
    whole = dict(patcher.model.named_parameters())
    return {key: value for key, value in whole.items() if not key.startswith("model_sampling.")}


def _differing(given, tick, total: int) -> Iterator[Weight]:
    """Yield one weight's difference at a time, computed on ComfyUI's device as ComfyUI itself patches it."""
    done = 0
    for tuned, base, name_of in given:
        keys = sorted(_weights(base))
        waiting = [one.get_key_patches() for one in (tuned, base)]
        device = _device_for(_weights(base).values())
        for key in keys:
            tick(done, total)
            done += 1
            if _same(*(one[key] for one in waiting)):
                # Skip the computation: the difference would be exactly 0.
                continue
            values = [_value(key, one[key], device) for one in waiting]
            name, end = name_of(key)
            yield Weight(name, end, values[0] - values[1])
    tick(total, total)


def _same(a: list, b: list) -> bool:
    (one, _), (other, _) = a[0], b[0]
    return one is other and len(a) == len(b) == 1


def _value(key: str, patches: list, device: torch.device) -> torch.Tensor:
    """Return a weight with its patches as a new float32 tensor, as ComfyUI's patch_weight_to_device computes it."""
    weight, convert = patches[0]
    value = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
    value = convert(value, inplace=True)
    return comfy.lora.calculate_weight(patches[1:], value, key) if patches[1:] else value


def model_names(model: ModelPatcher) -> Callable[[str], tuple[str, str]]:
    """Return a function from a MODEL's weight key to (layer name, suffix), as training writes them to adapter files."""
    published = {}
    if family_of(families.family_name(model)).diffusers_names:
        names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        published = {ours: theirs for theirs, ours in names.items()}

    def name_of(key: str) -> tuple[str, str]:
        path = key.removeprefix("diffusion_model.")
        if path.endswith(".weight"):
            place = published.get(path, path).removesuffix(".weight")
            return "lora_unet_" + place.replace(".", "_"), WHOLE
        if path.endswith(".bias"):
            weight = path.removesuffix(".bias") + ".weight"
            if f"diffusion_model.{weight}" in known:
                return name_of(f"diffusion_model.{weight}")[0], BIAS
        # A bare parameter has its own name, as ComfyUI reads it.
        return key, WHOLE

    known = {key for key, _ in model.model.named_parameters()}
    return name_of


def text_names(clip: CLIP) -> Callable[[str], tuple[str, str]]:
    """Return the same function for a CLIP: kohya's names if there are any, else ComfyUI's general ones."""
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    several = any(name.startswith("lora_te2_") for name in names)
    wanted = ("lora_te1_", "lora_te2_", "lora_te3_") if several else ("lora_te_",)
    kohya = {key: name for name, key in names.items() if isinstance(key, str) and name.startswith(wanted)}
    known = {key for key, _ in clip.cond_stage_model.named_parameters()}

    def name_of(key: str) -> tuple[str, str]:
        weight = key.removesuffix(".bias") + ".weight" if key.endswith(".bias") else key
        end = BIAS if weight != key else WHOLE
        if not weight.endswith(".weight") or weight not in known:
            # ComfyUI reads only weights and their biases here.
            return f"text_encoders.{key}", ""
        return kohya.get(weight, f"text_encoders.{weight.removesuffix('.weight')}"), end

    return name_of
