"""Inputs and outputs that several nodes have, each made in one place."""

from __future__ import annotations

from comfy_api.latest import io

from .host.model.sampling import SAMPLERS, SCHEDULERS
from .schema import Adapter, LossMap

TOP_SEED = 0xFFFFFFFFFFFFFFFF


def base(model: str) -> list:
    """What a checkpoint loader gives.

    Args:
        model: what is said of the model.
    """
    return [
        io.Model.Input("model", tooltip=model),
        io.Clip.Input("clip", tooltip="The model's text encoder."),
        io.Vae.Input("vae", tooltip="The model's VAE."),
    ]


def steps(default: int = 1000) -> io.Int.Input:
    """Of the optimiser."""
    return io.Int.Input(
        "steps",
        default=default,
        min=1,
        max=1_000_000,
        tooltip="Optimiser steps. More steps later go on with the same run.",
    )


def learning_rate(tooltip: str) -> io.Float.Input:
    """0 for a default, which the tooltip tells."""
    return io.Float.Input("learning_rate", default=0.0, min=0.0, max=10.0, step=0.0000001, round=False, tooltip=tooltip)


def rank() -> io.Int.Input:
    """Of a LoRA."""
    return io.Int.Input(
        "rank",
        default=16,
        min=1,
        max=1024,
        tooltip="Size of the LoRA. Alpha equals it, so the effective scale is 1, unless options say otherwise.",
    )


def batch_size(default: int = 1, tooltip: str = "Pictures in a step.") -> io.Int.Input:
    """Of a training step."""
    return io.Int.Input("batch_size", default=default, min=1, max=1024, tooltip=tooltip)


def seed(tooltip: str = "Decides start, order and noise. Another seed is another run.") -> io.Int.Input:
    """One that stays as it is from one Run to the next: the frontend would otherwise make each a new run."""
    return io.Int.Input("seed", default=0, min=0, max=TOP_SEED, control_after_generate=False, tooltip=tooltip)


def resolution(tooltip: str) -> io.Int.Input:
    """Side of a square in pixels, 0 for the model's own."""
    return io.Int.Input("resolution", default=0, min=0, max=8192, step=8, tooltip=tooltip)


def sampling_steps(default: int) -> io.Int.Input:
    """Of a node that draws."""
    return io.Int.Input("steps", default=default, min=1, max=1000, tooltip="Sampling steps.")


def cfg() -> io.Float.Input:
    """Of a node that draws, 0 for the family's own."""
    return io.Float.Input("cfg", default=0.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance. 0: the family's own.")


def negative_prompt() -> io.String.Input:
    """Of a node that draws."""
    return io.String.Input("negative_prompt", default="", multiline=True, tooltip="What not to draw.")


def sampler() -> list:
    """Of a node that draws, as the family is drawn with where they are left alone."""
    return [
        io.Combo.Input("sampler_name", options=["auto", *SAMPLERS], default="auto", tooltip="auto: euler."),
        io.Combo.Input("scheduler", options=["auto", *SCHEDULERS], default="auto", tooltip="auto: the family's own."),
    ]


def trained() -> list:
    """What comes out of a trainer of the model."""
    return [
        io.Model.Output("trained_model", display_name="model"),
        io.Clip.Output("trained_clip", display_name="clip"),
        Adapter.Output("adapter", display_name="adapter"),
        LossMap.Output("loss", display_name="loss"),
    ]
