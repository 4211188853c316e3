"""Checks of MODEL, CLIP and VAE before training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ....trainers.errors import ModelError
from ....trainers.families import GENERAL
from ....trainers.methods.full import FullFineTune
from . import families
from .quantization import gguf
from .quantization.quantized import check_scales

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

log = logging.getLogger(__name__)


def check_sockets(model, clip, vae, method: str = "") -> None:
    """Before any file is read, refuse inputs that cannot be trained.

    Args:
        method: name of the training method, if the node trains.

    Raises:
        ModelError: the checkpoint lacks a text encoder or VAE, the model's format has no gradients, or a quantized
            weight is damaged.
    """
    for name, value in (("model", model), ("clip", clip), ("vae", vae)):
        if value is None:
            raise ModelError(
                f"The connected {name} is empty: the loaded file contains none.",
                "Load it with a separate loader node, and connect that.",
                name,
            )
    if not hasattr(model, "get_model_object") or not hasattr(model.model, "diffusion_model"):
        raise ModelError(f"Cannot train a {type(model).__name__}.", "Load the original checkpoint.", "model")
    hidden = families.hidden_format(model)
    if hidden:
        raise ModelError(
            f"Cannot train a model that is loaded in the format {hidden}.",
            "Load the original checkpoint with ComfyUI's own loader, or a GGUF file of the model.",
            "model",
        )
    if method == FullFineTune.name and gguf.is_gguf(model):
        raise ModelError(
            "Cannot train all weights of a GGUF model: they are quantized.",
            "Train a LoRA on it, or load the original checkpoint with ComfyUI's own loader.",
            "model",
        )
    check_scales(model.model, "model")


def check_not_applied(model: ModelPatcher, clip: CLIP, start: Mapping[str, torch.Tensor] | None) -> None:
    """Refuse a model or clip that has the connected adapter already: it would act twice, and train as one.

    Detects the tensors themselves, as the node before puts them out, not other copies of their values.

    Raises:
        ModelError: names the input.
    """
    places = {tensor.data_ptr() for tensor in (start or {}).values() if tensor.numel() > 1}
    for name, patcher in (("model", model), ("clip", clip.patcher)):
        patches = (entry[1] for entries in patcher.patches.values() for entry in entries)
        if any(tensor.data_ptr() in places for patch in patches for tensor in _tensors_of(patch)):
            raise ModelError(
                f"The connected {name} already has the connected adapter applied, which would act twice.",
                f"Connect the {name} from before the adapter, such as the loader's: training starts from the adapter's "
                "values.",
                name,
            )


def _tensors_of(patch) -> Iterator[torch.Tensor]:
    parts = patch[1] if isinstance(patch, tuple) and len(patch) > 1 else getattr(patch, "weights", ())
    for part in parts if isinstance(parts, (tuple, list)) else ():
        if hasattr(part, "data_ptr"):
            yield part


def check_trainable(base, device: torch.device | None) -> None:
    """Refuse a model that would train wrongly or fail halfway.

    Args:
        device: device that must hold all weights; None if weights may be offloaded.

    Raises:
        ModelError: weights lie off the device, or the model does more around its network than training reproduces.
    """
    if not families.is_reproduced(base):
        raise ModelError(
            f"Cannot train a {type(base).__name__} yet: ComfyUI does more around its network than training reproduces.",
            "Use another model. Please report the name of this one.",
            "model",
        )
    elsewhere = {parameter.device.type for parameter in base.diffusion_model.parameters()}
    if device is not None and elsewhere - {device.type}:
        raise ModelError(
            f"ComfyUI keeps a part of the model off {device}.",
            "Switch offload on (Graft Memory Options), or start ComfyUI without --novram and --lowvram.",
            "model",
        )


def warn_of_model(model: ModelPatcher, family: str) -> None:
    if family == GENERAL.name:
        log.info(
            "Graft: no description of the model class %s. Graft adapts every linear layer, and checks the gradient "
            "before step 1.",
            type(model.model.model_config).__name__,
        )
    distilled = families.few_step_evidence(model)
    if distilled:
        log.warning(
            "Graft: this model was distilled to draw in a few steps (%s). Training with its usual loss gradually "
            "undoes that: it will need more steps to draw. Train on the model that it was made from and apply the LoRA "
            "here, or keep training short, with a low learning rate.",
            distilled,
        )
