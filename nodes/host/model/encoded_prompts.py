"""CONDITIONING from the graph as encoded prompts of a dataset, and back as the values of ComfyUI's `extra_conds`.

A dataset's caches and jobs hold tensors only. So the values of an entry are packed: tensors under their own names,
tensors inside lists and dicts under paths such as `reference_latents.0`, and all else as JSON in one tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ....trainers.data.examples import EncodedPrompt
from ....trainers.errors import DatasetError
from ....trainers.memory.transfer import upload
from .fingerprint import tensor_checksum

if TYPE_CHECKING:
    Arrived = list[tuple[torch.Tensor | None, dict[str, Any]]]

_INPUT = "conditioning"
# Name of the tensor that holds the JSON. ComfyUI has no value of this name.
_REST = "graft_values"

# Values by which ComfyUI's sampler restricts, weights or extends a prediction. Training has a place for none of them.
_REFUSED = {
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "area": "an area",
    "mask": "a mask",
    "hooks": "hooks",
    "default": "a default for the areas of other prompts",
    "model_conds": "inputs of a model",
    "additional_models": "another model",
    "guiding_frame_index": "a first frame in the sampler's latent (v2)",
    "time_dim_replace": "a first frame in the sampler's latent",
    "keyframe_idxs": "guide frames in the sampler's latent",
}
# The same for numbers, with the one that changes nothing.
_NEUTRAL = {
    "strength": (1.0, "a strength"),
    "start_percent": (0.0, "a range of timesteps"),
    "end_percent": (1.0, "a range of timesteps"),
    "clip_start_percent": (0.0, "a range of timesteps"),
    "clip_end_percent": (1.0, "a range of timesteps"),
}
# Companions of a refused value, without effect alone.
_IDLE = {"mask_strength", "set_area_to_bounds", "control_apply_to_uncond", "uuid"}
_PICTURES = ("reference_latents", "concat_latent_image")
_SD1_WIDTH = 768
_OUTPUT = "clip_vision_output"


def encoded_prompts(arrived: Sequence[Arrived]) -> list[EncodedPrompt]:
    """Return an encoded prompt for each CONDITIONING.

    Raises:
        DatasetError: training cannot use all of it as ComfyUI's sampler does.
    """
    return [_encoded_prompt(_values_of(conditioning)) for conditioning in arrived]


def _values_of(conditioning: Arrived) -> dict[str, Any]:
    if len(conditioning) != 1:
        raise DatasetError(
            f"A conditioning has {len(conditioning)} entries. ComfyUI's sampler draws one picture with all of them.",
            "Remove Conditioning (Combine), or use Conditioning (Concat). For a prompt for each picture, connect a "
            "list of conditionings.",
            _INPUT,
        )
    ((tensor, more),) = conditioning
    for name, value in more.items():
        if name in _REFUSED and value is not None:
            _refuse(_REFUSED[name])
        if name in _NEUTRAL and value != _NEUTRAL[name][0]:
            _refuse(_NEUTRAL[name][1])
    if len(more.get("unclip_conditioning") or ()) > 1:
        # ComfyUI merges them with noise that no seed decides.
        _refuse("several unCLIP images")
    values = {name: value for name, value in more.items() if name not in {*_REFUSED, *_NEUTRAL, *_IDLE}}
    if tensor is not None:
        values["cross_attn"] = tensor
    _refuse_batch(values)
    pooled = values.get("pooled_output")
    if tensor is not None and pooled is not None and tensor.shape[-1] == pooled.shape[-1] == _SD1_WIDTH:
        # Checkpoints of SD1 lack the projection, so this is uninitialized memory. SD1 does not read it.
        del values["pooled_output"]
    return values


def _refuse(what: str) -> None:
    raise DatasetError(
        f"A conditioning has {what}, which Graft cannot train with.",
        "Connect the conditioning from before the node that sets it.",
        _INPUT,
    )


def _refuse_batch(values: dict[str, Any]) -> None:
    for name in ("cross_attn", "pooled_output"):
        rows = len(values[name]) if values.get(name) is not None else 1
        if rows != 1:
            raise DatasetError(
                f"A conditioning holds a batch of {rows} prompts.",
                "Connect a list with one conditioning for each picture.",
                _INPUT,
            )


def _encoded_prompt(values: dict[str, Any]) -> EncodedPrompt:
    tensors: dict[str, torch.Tensor] = {}
    packed = {name: _packed(value, name, tensors) for name, value in values.items()}
    rest = {name: value for name, value in packed.items() if value != {"tensor": name}}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise DatasetError(
            "A conditioning contains numbers that are not finite.", "Load the text encoder in float32.", _INPUT
        )
    if rest:
        text = json.dumps(rest, sort_keys=True)
        tensors[_REST] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor_checksum(tensor))
    return EncodedPrompt(total.hexdigest(), tensors, any(name in values for name in _PICTURES))


def _packed(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    import comfy.clip_vision

    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, (list, tuple)):
        return [_packed(part, f"{path}.{place}", tensors) for place, part in enumerate(value)]
    if isinstance(value, comfy.clip_vision.Output):
        return {_OUTPUT: _packed(vars(value), path, tensors)}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _packed(part, f"{path}.{name}", tensors) for name, part in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _refuse(f"'{path}' of type {type(value).__name__}")


def values_of(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Return a sample's conditioning values by ComfyUI's names, on a device.

    Args:
        tensors: of an encoded prompt, or of a caption, which has nothing but tensors.
    """
    # Some models read the mask; in ComfyUI's sampler, too, it is on the CPU then.
    values = {
        name: tensor if name == "attention_mask" else upload(tensor, device)
        for name, tensor in tensors.items()
        if name != _REST
    }
    if _REST in tensors:
        rest = json.loads(bytes(tensors[_REST].tolist()))
        values.update({name: _restored(value, values) for name, value in rest.items()})
    return values


def _restored(value: Any, tensors: dict[str, Any]) -> Any:
    import comfy.clip_vision

    if isinstance(value, list):
        return [_restored(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors.pop(content)
    if kind == "dict":
        return {name: _restored(part, tensors) for name, part in content.items()}
    output = comfy.clip_vision.Output()
    for name, part in _restored(content, tensors).items():
        output[name] = part
    return output
