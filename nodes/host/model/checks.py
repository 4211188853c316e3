"""Checks of MODEL, CLIP and VAE before training."""

from __future__ import annotations

from ....trainers.errors import ModelError
from . import families


def check_sockets(model, clip, vae) -> None:
    """Refuse inputs that cannot be trained before any file is read.

    Raises:
        ModelError: the checkpoint lacks a text encoder or VAE, or the model's format has no gradients.
    """
    for name, value in (("model", model), ("clip", clip), ("vae", vae)):
        if value is None:
            raise ModelError(
                f"The {name} that arrived is empty: the loaded file holds none.",
                "Load it with a loader of its own and connect that.",
                name,
            )
    if not hasattr(model, "get_model_object") or not hasattr(model.model, "diffusion_model"):
        raise ModelError(f"A {type(model).__name__} is no model that can be trained.", "Load the original.", "model")
    hidden = families.hidden_format(model)
    if hidden:
        raise ModelError(
            f"The model is loaded in the format {hidden}, whose weights no training goes through yet.",
            "Load the original with ComfyUI's own loader; fp8 is fine.",
            "model",
        )
