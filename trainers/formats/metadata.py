"""Metadata of an adapter file: kohya's `ss_*` fields and ModelSpec 1.0.1.

Source: github.com/Stability-AI/ModelSpec; the field names kohya sd-scripts writes and other tools read.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ARCHITECTURES = {
    "SD1": "stable-diffusion-v1",
    "SD2": "stable-diffusion-v2-512",
    "SD2 v": "stable-diffusion-v2-768-v",
    "SDXL": "stable-diffusion-xl-v1-base",
    "SDXL refiner": "stable-diffusion-xl-v1-refiner",
    "SD3": "stable-diffusion-3",
    "Flux": "flux-1",
}


# The run that made a file.
IDENTITY = "graft_identity"


def describe_training(given: dict, kind: str) -> dict[str, str]:
    """Metadata of what was trained.

    Args:
        kind: ModelSpec's word for it: "lora", "textual-inversion".
        given: `ss_*` fields by name without the prefix, and `family`, `parameterisation`,
            `resolution` (pixels), `trigger`, `recipe` (JSON-able), `identity` (of the run), `thumbnail` (data URI).
    """
    facts = dict(given)
    identity = facts.pop("identity")
    thumbnail = facts.pop("thumbnail")
    family = facts.pop("family")
    recipe = facts.pop("recipe")
    trigger = facts.pop("trigger")
    prediction = facts.pop("parameterisation")
    fields = {f"ss_{name}": _text(value) for name, value in facts.items() if value is not None}
    fields["modelspec.sai_model_spec"] = "1.0.1"
    fields["modelspec.architecture"] = f"{_ARCHITECTURES.get(family, family)}/{kind}"
    fields["modelspec.implementation"] = "https://github.com/comfyanonymous/ComfyUI"
    fields["modelspec.prediction_type"] = {"eps": "epsilon", "v": "v"}.get(prediction, prediction)
    fields["modelspec.resolution"] = f"{facts['resolution']}x{facts['resolution']}"
    if trigger:
        fields["modelspec.trigger_phrase"] = trigger
    if thumbnail:
        fields["modelspec.thumbnail"] = thumbnail
    fields[IDENTITY] = identity
    fields["graft_recipe"] = json.dumps(recipe, sort_keys=True)
    return fields


def stamped(metadata: dict[str, str], tensors: Mapping[str, torch.Tensor], title: str) -> dict[str, str]:
    """The metadata of a file about to be written: with title, date and the hash of its tensors."""
    fields = dict(metadata)
    fields["modelspec.title"] = title
    fields["modelspec.date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    fields["modelspec.hash_sha256"] = "0x" + tensors_hash(tensors)
    fields["ss_output_name"] = title
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def data_uri(path: str) -> str:
    """A picture file as a data URI: JPEG of at most 256 pixels a side."""
    import base64
    import io

    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((256, 256))
        held = io.BytesIO()
        small.save(held, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash over names, dtypes, shapes and bytes of tensors."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        total.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else b"")
    return total.hexdigest()


def _text(value) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True)
    return str(value)
