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
            "Load the original checkpoint with ComfyUI's own loader; fp8 works.",
            "model",
        )
