"""Inputs and outputs that several nodes share."""

from __future__ import annotations

from comfy_api.latest import io

from .host.model.sampling import SAMPLERS, SCHEDULERS
from .schema import Adapter, LossMap

TOP_SEED = 0xFFFFFFFFFFFFFFFF


def base(model: str) -> list:
    """Return the inputs for the outputs of a checkpoint loader: model, clip and vae.

    Args:
        model: tooltip of the model.
    """
    return [
        io.Model.Input("model", tooltip=model),
        io.Clip.Input("clip", tooltip="The model's text encoder."),
        io.Vae.Input("vae", tooltip="The model's VAE."),
    ]


def steps(default: int = 1000) -> io.Int.Input:
    """Return the input for the number of optimizer steps."""
    return io.Int.Input(
        "steps",
        default=default,
        min=1,
        max=1_000_000,
        tooltip="Number of training steps. A larger number later continues the same run.",
    )


def learning_rate(tooltip: str) -> io.Float.Input:
    """Return the input for the learning rate. 0 stands for a default, which the tooltip names."""
    return io.Float.Input("learning_rate", default=0.0, min=0.0, max=10.0, step=0.0000001, round=False, tooltip=tooltip)


def rank() -> io.Int.Input:
    """Return the input for the rank of a LoRA. 0 stands for the rank of the adapter to start from."""
    return io.Int.Input(
        "rank",
        default=16,
        min=0,
        max=1024,
        tooltip="Size of the LoRA. Alpha equals the rank, so the effective scale is 1, unless options set another "
        "alpha. 0: rank and alpha of the connected adapter.",
    )


def start_adapter():
    """Return the optional input for an adapter to start from."""
    return Adapter.Input(
        "adapter",
        optional=True,
        tooltip="Adapter to start from, such as an earlier training's. The result replaces it. Connect a model without "
        "it.",
    )


def batch_size(default: int = 1, tooltip: str = "Pictures per step.") -> io.Int.Input:
    """Return the input for the batch size of a training step."""
    return io.Int.Input("batch_size", default=default, min=1, max=1024, tooltip=tooltip)


def seed(
    tooltip: str = "Determines the start, the order of the pictures and the noise. Another seed makes another run.",
) -> io.Int.Input:
    """Return a seed input that stays fixed. The frontend would otherwise change it and start a new run each time."""
    return io.Int.Input("seed", default=0, min=0, max=TOP_SEED, control_after_generate=False, tooltip=tooltip)


def resolution(tooltip: str) -> io.Int.Input:
    """Return the input for the side of a square in pixels. 0 stands for the model's own resolution."""
    return io.Int.Input("resolution", default=0, min=0, max=8192, step=8, tooltip=tooltip)


def sampling_steps(default: int) -> io.Int.Input:
    """Return the input for the number of sampling steps."""
    return io.Int.Input("steps", default=default, min=1, max=1000, tooltip="Sampling steps.")


def cfg() -> io.Float.Input:
    """Return the input for the guidance scale. 0 stands for the default of the model's family."""
    return io.Float.Input(
        "cfg", default=0.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance. 0: the default of the model's family."
    )


def negative_prompt() -> io.String.Input:
    """Return the input for the negative prompt."""
    return io.String.Input(
        "negative_prompt", default="", multiline=True, tooltip="Text that the pictures should avoid."
    )


def sampler() -> list:
    """Return the inputs for sampler and scheduler. "auto" stands for the default of the model's family."""
    return [
        io.Combo.Input("sampler_name", options=["auto", *SAMPLERS], default="auto", tooltip="auto: euler."),
        io.Combo.Input(
            "scheduler",
            options=["auto", *SCHEDULERS],
            default="auto",
            tooltip="auto: the default of the model's family.",
        ),
    ]


def trained() -> list:
    """Return the outputs of a node that trains the model."""
    return [
        io.Model.Output("trained_model", display_name="model"),
        io.Clip.Output("trained_clip", display_name="clip"),
        Adapter.Output("trained_adapter", display_name="adapter"),
        LossMap.Output("loss", display_name="loss"),
    ]
