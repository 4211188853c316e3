"""Inputs for augmentation of images and captions, shared by all nodes that build a dataset."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainers.data.examples import Augmentation, read_resolutions
from .schema import advanced


def widgets() -> list:
    """Return the augmentation inputs, in the order of the parameters of `augmentation`.

    All are optional, and their defaults change nothing.
    """
    return [
        io.Boolean.Input(
            "shuffle_tags",
            default=False,
            optional=True,
            tooltip="Shuffles the comma-separated parts of a caption at each visit.",
        ),
        io.Int.Input(
            "keep_tokens",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Number of parts at the start of a caption that are neither moved nor dropped. A trigger put in "
            "front does not count.",
        ),
        io.Float.Input(
            "tag_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Chance of dropping each comma-separated part at a visit. Typical: 0.1.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Chance of a visit with no caption at all, not even the trigger. Typical: 0.05 to 0.1.",
        ),
        advanced(
            io.Boolean.Input(
                "wildcards",
                default=False,
                optional=True,
                tooltip="Chooses one of several words in braces, separated by bars. Off: braces are text.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "lines_are_variants",
                default=False,
                optional=True,
                tooltip="Each line of a caption is a separate caption, and they take turns. Off: all lines are one "
                "caption.",
            )
        ),
        advanced(
            io.Int.Input(
                "caption_variants",
                default=0,
                min=0,
                max=10000,
                optional=True,
                tooltip="Number of encoded versions of a varying caption. 0: 4 to 64, fewer with more pictures.",
            )
        ),
        io.Boolean.Input(
            "flip",
            default=False,
            optional=True,
            tooltip="Mirrors the picture at half of the visits. Not for faces, text, or anything with a left and a "
            "right.",
        ),
        advanced(
            io.Boolean.Input(
                "upscale",
                default=False,
                optional=True,
                tooltip="Enlarges small pictures to the resolution. Off: they train at their own size.",
            )
        ),
        advanced(
            io.String.Input(
                "more_resolutions",
                default="",
                optional=True,
                tooltip="Further resolutions, such as 512, 768. A picture trains at each one that it is large enough "
                "for.",
            )
        ),
        advanced(
            io.Float.Input(
                "mask_minimum",
                default=0.0,
                min=0.0,
                max=1.0,
                step=0.01,
                optional=True,
                tooltip="Smallest weight in the loss where a mask is black. Typical: 0 to 0.1.",
            )
        ),
    ]


# Rules for these inputs, for `checked`.
CHECKED = {
    "tag_dropout": None,
    "caption_dropout": None,
    "more_resolutions": read_resolutions,
    "mask_minimum": None,
}


def augmentation(
    shuffle_tags=False,
    keep_tokens=0,
    tag_dropout=0.0,
    caption_dropout=0.0,
    wildcards=False,
    lines_are_variants=False,
    caption_variants=0,
    flip=False,
    upscale=False,
    more_resolutions="",
    mask_minimum=0.0,
) -> Augmentation:
    """Build the augmentation from the inputs.

    It ignores `lines_are_variants`, which applies when captions are read. It accepts it so that callers can pass all
    inputs.
    """
    return Augmentation(
        shuffle_tags=shuffle_tags,
        keep_tokens=keep_tokens,
        tag_dropout=tag_dropout,
        caption_dropout=caption_dropout,
        wildcards=wildcards,
        caption_variants=caption_variants,
        flip=flip,
        upscale=upscale,
        resolutions=read_resolutions(more_resolutions),
        mask_minimum=mask_minimum,
    )
