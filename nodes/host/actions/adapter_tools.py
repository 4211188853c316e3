"""Adapter tools on ComfyUI's device, one layer at a time, and extraction from two MODELs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import comfy.lora
import comfy.model_management
import comfy.utils
import torch

from ....trainers.errors import ModelError
from ....trainers.families import family_of
from ....trainers.formats.adapter import Adapter
from ....trainers.formats.atomic import replacing
from ....trainers.formats.forms import from_peft
from ....trainers.formats.keys import ALPHA, BIAS, DORA, DOWN, UP, WHOLE, is_text, split
from ....trainers.formats.kohya import LYCORIS_NETWORK, as_dora, has_host_magnitudes, kohya_form
from ....trainers.formats.metadata import ARCHITECTURE, RUN, architecture_of
from ....trainers.formats.peft_format import WEIGHTS
from ....trainers.runs.records import find_run
from ....trainers.tools.difference import difference
from ....trainers.tools.extract import Extraction, Weight, extract, resize
from ....trainers.tools.merge import AVERAGE, Merging, average_saves, merge
from .. import paths
from ..model import families
from ..model.lora import classic, layer_weights
from ..model.lora_schedule import refuse_scheduled_lora
from ..model.quantization import gguf
from ..server.progress import counter

if TYPE_CHECKING:
    import numpy as np
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

log = logging.getLogger(__name__)

# The SVD of a layer needs its matrix this many times, in float32.
_COPIES = 8


def merge_adapters(
    a: dict, b: dict, how: Merging, node: str, model: ModelPatcher | None = None, clip: CLIP | None = None
) -> Adapter:
    """Merge adapters with `merge` on ComfyUI's device.

    Args:
        model, clip: give the weights of layers with a difference that depends on them.
    """
    weights = None if model is None else layer_weights(model, clip, a, b)
    with torch.no_grad():
        return merge(a, b, how, _device_for([*a.values(), *b.values()]), counter(node), weights)


def average_run(a: dict, b: dict, width: float) -> Adapter:
    """Average the kept saves of the run that made both adapters, up to the step of the first one.

    Raises:
        ModelError: no run of Graft made the first adapter, or the second adapter is of another run.
        RunError: the run is gone, or has too few saves.
    """
    name, other = (getattr(adapter, "metadata", {}).get(RUN, "") for adapter in (a, b))
    step = a.metadata.get("ss_steps", "") if name else ""
    if not step.isdecimal():
        raise ModelError(
            f"adapter_a is not from a run of Graft: '{AVERAGE}' has no saves to read.",
            "Connect the adapter of a training node, or of a file that it saved.",
            "adapter_a",
        )
    if other != name:
        raise ModelError(
            f"'{AVERAGE}' reads the run of adapter_a alone, but adapter_b is another adapter.",
            "Connect the same adapter to both inputs. Merge the result with others in a second node.",
            "adapter_b",
        )
    return average_saves(paths.folders(), find_run(paths.folders(), name), int(step), width)


def resize_adapter(
    adapter: dict, rank: int, energy: float, node: str, model: ModelPatcher | None = None, clip: CLIP | None = None
) -> Adapter:
    """Resize an adapter with `resize` on ComfyUI's device.

    Args:
        model, clip: give the weights of layers with a difference that depends on them.
    """
    weights = None if model is None else layer_weights(model, clip, adapter)
    with torch.no_grad():
        return resize(adapter, rank, energy, _device_for(adapter.values()), counter(node), weights)


def restore_magnitudes(adapter: dict, model: ModelPatcher, format: str) -> dict:
    """Return a DoRA or IA3 with the magnitudes that a format means.

    ComfyUI's formula needs others than training has, and only the model tells one from the other. Returns other
    adapters unchanged, and those that have what the format needs.

    Args:
        model: the model that the adapter was trained on. Its other adapters do not count.

    Raises:
        ModelError: the model has no such layer, or the adapter has layers of text encoders.
    """
    if not isinstance(adapter, Adapter):
        return adapter
    if format == "kohya" and not adapter and adapter.native is not None and adapter.native.method == "DoRA":
        tensors = kohya_form(from_peft(adapter.native, format), adapter.metadata)
        return Adapter(_with_magnitudes(tensors, model, format), as_dora(adapter.metadata), None, adapter.bundled)
    is_known = any(name.endswith(DORA) for name in adapter)
    if format == "kohya" or not is_known or not has_host_magnitudes(adapter):
        return adapter
    # peft's form of IA3 has no biases.
    if adapter.native is not None and not (format == "LyCORIS" and adapter.made_by() == "IA3"):
        return adapter
    tensors = _with_magnitudes(adapter, model, format)
    return Adapter(tensors, {**adapter.metadata, **LYCORIS_NETWORK}, None, adapter.bundled)


def save_preview(path: str, picture: np.ndarray) -> None:
    """Write a picture [H, W, 3] beside an adapter's file or folder, where ComfyUI and LoRA managers look for it."""
    from PIL import Image

    place = os.path.dirname(path) if os.path.basename(path) == WEIGHTS else os.path.splitext(path)[0]
    with replacing(f"{place}.preview.png") as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def with_family(adapter: dict, model: ModelPatcher) -> dict:
    """Return an adapter whose metadata names the model's family, which tells families with the same layers apart."""
    family = families.family_name(model)
    if not isinstance(adapter, Adapter) or ARCHITECTURE in adapter.metadata or family == "general":
        return adapter
    metadata = {**adapter.metadata, ARCHITECTURE: architecture_of(family, "lora")}
    return Adapter(adapter, metadata, lambda: adapter.native, adapter.bundled)


def _with_magnitudes(adapter: dict, model: ModelPatcher, format: str) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors with the magnitudes for a format, from those of the other formula."""
    _check_no_text(adapter, format)
    model = classic(model)
    keys, patches = comfy.lora.model_lora_keys_unet(model.model, {}), gguf.key_patches(model)
    tensors = dict(adapter)
    for name, held in split(dict(adapter))[0].items():
        if DORA not in held:
            continue
        if keys.get(name) not in patches:
            raise ModelError(
                f"The connected model has no layer {name}, whose magnitudes depend on its weight.",
                f"Connect the model that the adapter was trained on, or choose '{_other(format)}'.",
                "model",
            )
        weight = _value(keys[name], patches[keys[name]][:1], torch.device("cpu"))
        changed = _for_host(held, weight) if format == "kohya" else _restored(held, weight)
        tensors.update({f"{name}.{end}": tensor for end, tensor in changed.items()})
        if BIAS in held:
            # LyCORIS changes biases by full differences alone.
            for end in (UP, DOWN, ALPHA, DORA):
                tensors.pop(f"{name}.{end}", None)
    return tensors


def _for_host(held: dict[str, torch.Tensor], weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a layer's magnitudes for ComfyUI's formula, which divides by the norm of the frozen weight."""
    changed, norm = _changed(held, weight)
    length = changed.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return {DORA: held[DORA].float() * (norm / length).view_as(held[DORA])}


def _other(format: str) -> str:
    return "LyCORIS" if format == "kohya" else "kohya"


def _check_no_text(adapter: dict, format: str) -> None:
    name = next((name for name, held in split(adapter)[0].items() if DORA in held and is_text(name)), None)
    if name is not None:
        raise ModelError(
            f"The magnitudes of text-encoder layers, such as {name}, depend on weights that this node does not have.",
            f"Choose '{_other(format)}', or connect the adapter from the training node, which knows the magnitudes.",
            "format",
        )


def _restored(held: dict[str, torch.Tensor], weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a layer's magnitudes as trained, or its full difference if its bias changes, too."""
    changed, norm = _changed(held, weight)
    if BIAS in held:
        return {WHOLE: (changed * (held[DORA].float().flatten() / norm)[:, None]).view_as(weight) - weight}
    return {DORA: held[DORA].float() * (changed.norm(dim=1) / norm).view_as(held[DORA])}


def _changed(held: dict[str, torch.Tensor], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weight with a layer's difference, norms of the frozen weight's rows), the weight as a matrix."""
    if DOWN in held:
        scale = float(held.get(ALPHA, len(held[DOWN]))) / len(held[DOWN])
        added = scale * held[UP].float().flatten(1) @ held[DOWN].float().flatten(1)
    else:
        factors = {end: tensor for end, tensor in held.items() if end not in (DORA, BIAS)}
        added = difference("", factors, "adapter").value().reshape(weight.shape).flatten(1)
    changed = weight.flatten(1) + added
    # A row of zeros has no direction, and stays zero.
    return changed, weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


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
    total = sum(len(tuned.model.state_dict()) for tuned, _, _ in given)
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
    refuse_scheduled_lora(models[0], "model_tuned", "extraction")
    refuse_scheduled_lora(models[1], "model_base", "extraction")
    tuned, base = classic(models[0], "model_tuned"), classic(models[1], "model_base")
    _check_alike(tuned, base, "model_tuned")
    patchers = [(tuned, base, model_names(base))]
    if clips[0] is not None:
        tuned, base = classic(clips[0].patcher, "clip_tuned"), classic(clips[1].patcher, "clip_base")
        _check_alike(tuned, base, "clip_tuned")
        patchers.append((tuned, base, text_names(clips[1])))
    return patchers


def _check_alike(tuned: ModelPatcher, base: ModelPatcher, input: str) -> None:
    shapes = [{key: tuple(value.shape) for key, value in _weights(patcher).items()} for patcher in (tuned, base)]
    names = [type(patcher.model).__name__ for patcher in (tuned, base)]
    odd = sorted(shapes[0].keys() ^ shapes[1].keys())
    odd += [key for key in shapes[0] if key in shapes[1] and shapes[0][key] != shapes[1][key]]
    if odd:
        sizes = " and ".join(str(list(by_key[odd[0]])) if odd[0] in by_key else "missing" for by_key in shapes)
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
        waiting = [gguf.key_patches(patcher) for patcher in (tuned, base)]
        device = _device_for(_weights(base).values())
        for key in keys:
            tick(done, total)
            done += 1
            if _same(*(patches[key] for patches in waiting)):
                # Skip the computation: the difference would be exactly 0.
                continue
            values = [_value(key, patches[key], device) for patches in waiting]
            name, end = name_of(key)
            yield Weight(name, end, values[0] - values[1])
    tick(total, total)


def _same(a: list, b: list) -> bool:
    (weight, _), (other, _) = a[0], b[0]
    return weight is other and len(a) == len(b) == 1


def _value(key: str, patches: list, device: torch.device) -> torch.Tensor:
    """Return a weight with its patches as a new float32 tensor, as ComfyUI's patch_weight_to_device computes it."""
    weight, convert = patches[0]
    value = comfy.model_management.cast_to_device(gguf.dequantized(weight), device, torch.float32, copy=True)
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
