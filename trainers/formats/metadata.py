"""Metadata of an adapter file: kohya's `ss_*` fields and ModelSpec 1.0.1.

Sources: github.com/Stability-AI/ModelSpec; the field names that kohya's sd-scripts writes and other tools read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .json_files import parse_json

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
    "Flux 2": "flux-2",
    "Lumina 2": "lumina-2",
}


ARCHITECTURE = "modelspec.architecture"
# Fields with the identity and the folder's name of the run that made a file.
IDENTITY, RUN = "graft_identity", "graft_run"
# Field with the validation loss, in the files that a run keeps as its best.
VALIDATION_LOSS = "graft_validation_loss"


def architecture_of(family: str, kind: str) -> str:
    """Return ModelSpec's name of a family and a kind of file."""
    return f"{_ARCHITECTURES.get(family, family)}/{kind}"


def describe_training(given: dict, kind: str) -> dict[str, str]:
    """Return the metadata of a trained file.

    Args:
        given: `ss_*` fields without that prefix, and `family`, `parameterization`, `resolution` (pixels), `trigger`,
            `recipe` (JSON-compatible), `identity` and `run` (of the run) and `thumbnail` (data URI).
        kind: ModelSpec's name of the kind of file: "lora" or "textual-inversion".
    """
    facts = dict(given)
    identity = facts.pop("identity")
    run = facts.pop("run")
    thumbnail = facts.pop("thumbnail")
    family = facts.pop("family")
    recipe = facts.pop("recipe")
    trigger = facts.pop("trigger")
    prediction = facts.pop("parameterization")
    fields = {f"ss_{name}": _text(value) for name, value in facts.items() if value is not None}
    fields["modelspec.sai_model_spec"] = "1.0.1"
    fields[ARCHITECTURE] = architecture_of(family, kind)
    fields["modelspec.implementation"] = "https://github.com/comfyanonymous/ComfyUI"
    fields["modelspec.prediction_type"] = {"eps": "epsilon", "v": "v"}.get(prediction, prediction)
    fields["modelspec.resolution"] = f"{facts['resolution']}x{facts['resolution']}"
    if trigger:
        fields["modelspec.trigger_phrase"] = trigger
    if thumbnail:
        fields["modelspec.thumbnail"] = thumbnail
    fields[IDENTITY] = identity
    fields[RUN] = run
    fields["graft_recipe"] = json.dumps(recipe, sort_keys=True)
    return fields


# Field with the origin of a merged, resized or extracted adapter.
MADE = "graft_made"
# Fields that belong to a single training or file, so that derived files do not inherit them.
_OWN = (
    IDENTITY,
    VALIDATION_LOSS,
    "graft_recipe",
    "lora_adapter_metadata",
    "modelspec.title",
    "modelspec.date",
    "modelspec.hash_sha256",
    "modelspec.thumbnail",
    "ss_output_name",
    "ss_network_module",
    "ss_network_args",
    "ss_network_dim",
    "ss_network_alpha",
    "sshs_model_hash",
    "sshs_legacy_hash",
)
_TRIGGER = "modelspec.trigger_phrase"


def derived(origin: dict, sources: list[dict[str, str]], rank: int | None) -> dict[str, str]:
    """Return the metadata of an adapter made from others: the fields they agree on, their triggers and its origin.

    Args:
        origin: description of the operation, JSON-compatible.
        sources: metadata of the source adapters.
        rank: rank of all layers; None if they differ or have none.
    """
    first = sources[0] if sources else {}
    alike = {name for name in first if all(other.get(name) == first[name] for other in sources)}
    fields = {name: first[name] for name in alike if name not in _OWN}
    triggers = list(dict.fromkeys(source[_TRIGGER] for source in sources if source.get(_TRIGGER)))
    if triggers:
        fields[_TRIGGER] = ", ".join(triggers)
    if rank is not None:
        fields.update(ss_network_module="networks.lora", ss_network_dim=str(rank), ss_network_alpha=str(float(rank)))
    history = [_history(source) for source in sources]
    fields[MADE] = json.dumps({**origin, "of": history} if history else origin, sort_keys=True)
    return fields


def title_of(metadata: dict[str, str]) -> str:
    """Return an adapter's title from its metadata, empty if it has none."""
    return metadata.get("modelspec.title") or metadata.get("ss_output_name") or ""


def source_of(metadata: dict[str, str]) -> str:
    """Return the name of the run that made an adapter or embedding, or its title; empty if its metadata has neither.

    A derived adapter has the run of its sources, if it is one run.
    """
    return metadata.get(RUN) or title_of(metadata) or metadata.get(IDENTITY, "")[:8]


def _history(metadata: dict[str, str]) -> dict:
    entry = {"title": title_of(metadata), "trained": metadata.get(IDENTITY, "")[:8]}
    with contextlib.suppress(ValueError):
        entry["made"] = parse_json(metadata.get(MADE, ""))
    return {name: value for name, value in entry.items() if value}


def stamped(metadata: dict[str, str], tensors: Mapping[str, torch.Tensor], title: str) -> dict[str, str]:
    """Return a copy of metadata with title, date and the hash of the tensors added, ready to write."""
    fields = dict(metadata)
    fields["modelspec.title"] = title
    fields["modelspec.date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    fields["modelspec.hash_sha256"] = "0x" + tensors_hash(tensors)
    fields["ss_output_name"] = title
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def data_uri(path: str) -> str:
    """Return a picture file as a data URI: a JPEG of at most 256 pixels per side."""
    import base64
    import io

    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((256, 256))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, dtypes, shapes and bytes."""
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
