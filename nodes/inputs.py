"""Inputs and outputs that several nodes share."""

from collections.abc import Iterable

from comfy_api.latest import io

from ..trainers.data.examples import Augmentation, read_resolutions
from .host.model.sampling import SAMPLERS, SCHEDULERS
from .schema import Adapter, LossMap, advanced, usually

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


def text(
    name: str, tooltip: str, default: str = "", multiline: bool = False, optional: bool = False
) -> io.String.Input:
    """Return an input for a text."""
    return io.String.Input(name, default=default, multiline=multiline, optional=optional, tooltip=tooltip)


def choice(
    name: str, options: Iterable[str], tooltip: str, default: str = "", optional: bool = False
) -> io.Combo.Input:
    """Return an input for one of the options, with the first as default unless another is given."""
    options = list(options)
    return io.Combo.Input(name, options=options, default=default or options[0], optional=optional, tooltip=tooltip)


def steps(default: int = 1000) -> io.Int.Input:
    """Return the input for the number of optimizer steps."""
    return io.Int.Input(
        "steps",
        default=default,
        min=1,
        max=1_000_000,
        tooltip="Number of training steps. A larger number later continues the same run.",
    )


def learning_rate(tooltip: str, usual: str = "", **when: str) -> io.Float.Input:
    """Return the input for the learning rate. 0 stands for a default, which the tooltip names.

    Args:
        usual: the default with optimizer "auto" and the widget values in `when`, as in `usually`. Empty: it varies.
    """
    rate = io.Float.Input("learning_rate", default=0.0, min=0.0, max=10.0, step=0.0000001, round=False, tooltip=tooltip)
    return usually(rate, usual, optimizer="auto", **when) if usual else rate


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


def dataset_resolution() -> io.Int.Input:
    """Return the input for the resolution of a dataset."""
    return resolution("Side in pixels of a square; pictures are scaled to its area. 0: the model's own resolution.")


def trigger() -> io.String.Input:
    """Return the input for the trigger of a dataset."""
    return text(
        "trigger",
        "The word that calls up the learned subject. Captions that do not contain it get it in front.",
    )


def images() -> io.Image.Input:
    """Return the input for the pictures that become a dataset."""
    return io.Image.Input("images", tooltip="Pictures, as a batch or a list.")


def captions() -> io.String.Input:
    """Return the input for their captions."""
    return text("captions", "One caption for all pictures, or a list with one for each.", multiline=True)


def masks() -> io.Mask.Input:
    """Return the optional input for their masks."""
    return io.Mask.Input("masks", optional=True, tooltip="Masks: white is learned, black is not.")


def prior_weight(name: str) -> io.Float.Input:
    """Return the input for the weight of the class in the loss."""
    return io.Float.Input(
        name,
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.01,
        tooltip="Weight of the class in the loss; the subject counts 1. 0: the class is not preserved.",
    )


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
    return text("negative_prompt", "Text that the pictures should avoid.", multiline=True)


def sampler() -> list:
    """Return the inputs for sampler and scheduler. "auto" stands for the default of the model's family."""
    return [
        choice("sampler_name", ["auto", *SAMPLERS], "auto: euler."),
        choice("scheduler", ["auto", *SCHEDULERS], "auto: the default of the model's family."),
    ]


def trained() -> list:
    """Return the outputs of a node that trains the model."""
    return [
        io.Model.Output("trained_model", display_name="model"),
        io.Clip.Output("trained_clip", display_name="clip"),
        Adapter.Output("trained_adapter", display_name="adapter"),
        LossMap.Output("loss", display_name="loss"),
    ]


def lora_or_all() -> io.Combo.Input:
    """Return the input for what a node trains."""
    return choice(
        "train",
        ["LoRA", "all weights"],
        "Train a LoRA, or all weights of the model. rank has no effect on all weights.",
        optional=True,
    )


def augmentation_inputs() -> list:
    """Return the augmentation inputs, in their order on a node.

    All are optional, and their defaults change nothing.
    """
    return [
        _switch("shuffle_tags", "Shuffles the comma-separated parts of a caption at each visit."),
        _number(
            "keep_tokens",
            1000,
            "Number of parts at the start of a caption that are neither moved nor dropped. A trigger put in front does "
            "not count.",
        ),
        _fraction("tag_dropout", "Chance of dropping each comma-separated part at a visit. Typical: 0.1."),
        _fraction(
            "caption_dropout",
            "Chance of a visit with no caption at all, not even the trigger. Typical: 0.05 to 0.1.",
        ),
        advanced(
            _switch("wildcards", "Chooses one of several words in braces, separated by bars. Off: braces are text.")
        ),
        advanced(
            _switch(
                "lines_are_variants",
                "Each line of a caption is a separate caption, and they take turns. Off: all lines are one caption.",
            )
        ),
        advanced(
            _number(
                "caption_variants",
                10000,
                "Number of encoded versions of a varying caption. 0: 4 to 64, fewer with more pictures.",
            )
        ),
        _switch(
            "flip",
            "Mirrors the picture at half of the visits. Not for faces, text, or anything with a left and a right.",
        ),
        advanced(_switch("upscale", "Enlarges small pictures to the resolution. Off: they train at their own size.")),
        advanced(
            text(
                "more_resolutions",
                "Further resolutions, such as 512, 768. A picture trains at each one that it is large enough for.",
                optional=True,
            )
        ),
        advanced(_fraction("mask_minimum", "Smallest weight in the loss where a mask is black. Typical: 0 to 0.1.")),
    ]


def _switch(name: str, tooltip: str) -> io.Boolean.Input:
    return io.Boolean.Input(name, default=False, optional=True, tooltip=tooltip)


def _number(name: str, most: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(name, default=0, min=0, max=most, optional=True, tooltip=tooltip)


def _fraction(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=0.0, min=0.0, max=1.0, step=0.01, optional=True, tooltip=tooltip)


# Rules for the inputs of augmentation, for `checked`.
AUGMENTATION_RULES = {
    "tag_dropout": None,
    "caption_dropout": None,
    "more_resolutions": read_resolutions,
    "mask_minimum": None,
}


def augmentation(lines_are_variants: bool = False, more_resolutions: str = "", **values) -> Augmentation:
    """Build the augmentation from the inputs.

    Args:
        lines_are_variants: has no effect here: it applies when captions are read.
        values: other inputs, which have the names of the augmentation's fields.
    """
    return Augmentation(resolutions=read_resolutions(more_resolutions), **values)
