"""Checks of MODEL, CLIP and VAE before training."""

from __future__ import annotations

from ....trainers.errors import ModelError
from . import families


def check_sockets(model, clip, vae) -> None:
    """Refuses what cannot be trained before anything is read.

    Raises:
        ModelError: a checkpoint without text encoder or VAE, or a model whose weights cannot be trained through.
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
