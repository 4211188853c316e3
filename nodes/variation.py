"""Inputs for augmentation of images and captions, shared by all nodes that build a dataset."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainers.data.examples import Augmentation, read_resolutions
from . import inputs
from .schema import advanced


def widgets() -> list:
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
            inputs.text(
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


# Rules for these inputs, for `checked`.
CHECKED = {
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
