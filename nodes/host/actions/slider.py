"""A slider from a node's texts, or from a dataset of pairs."""

from dataclasses import replace

from ....trainers.data.examples import Dataset, Example, PriorTarget
from ....trainers.data.prior import captioned
from ....trainers.data.source_images import is_alike
from ....trainers.errors import DatasetError, SettingsError
from ....trainers.recipe.parsing import parse_lines
from ....trainers.recipe.recipe import SliderSpec

_NAME_LENGTH = 40


def from_prompts(
    target: str, positive: str, negative: str, anchors: str, strength: float
) -> tuple[SliderSpec, Dataset]:
    """Return the slider of a node's texts, and a dataset without pictures. It is named after the first prompt.

    A text of one line belongs to all lines of the others.

    Raises:
        SettingsError: the numbers of lines differ, or positive and negative are the same.
    """
    columns = {"target": parse_lines(target), "positive": parse_lines(positive), "negative": parse_lines(negative)}
    count = max(map(len, columns.values()))
    for name, lines in columns.items():
        if len(lines) not in (0, 1, count):
            raise SettingsError(
                f"{name} has {len(lines)} lines, but another text has {count}.",
                "Write as many lines in each, or one line that belongs to all.",
                name,
            )
    rows = tuple(zip(*((lines or ("",)) * (count if len(lines) < 2 else 1) for lines in columns.values()), strict=True))
    same = next((row for row in rows if row[1] == row[2]), None) if rows else ("", "", "")
    if same is not None:
        raise SettingsError(
            f"positive and negative are both '{same[1][:80]}'.",
            "Write what the slider leads to at positive strengths, and what at negative ones.",
            "positive",
        )
    name = f"slider {rows[0][1] or rows[0][2]}"[:_NAME_LENGTH].strip()
    return SliderSpec(rows, parse_lines(anchors), strength), Dataset((), "", 0, name)


def from_pairs(
    dataset: Dataset, target: str, positive: str, negative: str, anchors: str, strength: float
) -> tuple[SliderSpec, Dataset]:
    """Return the slider of a dataset of pairs, and the dataset with its source pictures as the negative sides.

    Each picture is there once for each anchor.

    Raises:
        SettingsError: positive or negative is set.
        DatasetError: a picture has not one source picture, or the dataset preserves a class.
    """
    for name, text in (("positive", positive), ("negative", negative)):
        if text.strip():
            raise SettingsError(
                f"{name} is set, but with a dataset its pictures take the place of positive and negative.",
                "Empty positive and negative, or disconnect dataset.",
                name,
            )
    wrong = next((example for example in dataset.examples if not _is_pair(example)), None)
    if wrong is not None:
        raise DatasetError(
            f"The picture '{wrong.source.name}' is no pair: a slider needs one source picture of the same shape "
            "for each, no worse picture and no class.",
            "Set control_folder in Graft Load Dataset to the pictures of the negative side, under the same names, and "
            "leave worse_folder empty.",
            "dataset",
        )
    lines = parse_lines(anchors)
    kept = [PriorTarget(line, 1.0) for line in lines] or [None]
    examples = captioned(dataset, target, "target").examples
    rows = [
        replace(example, control=None, paired=example.control, anchor=anchor) for anchor in kept for example in examples
    ]
    return SliderSpec((), lines, strength), replace(dataset, examples=tuple(rows))


def _is_pair(example: Example) -> bool:
    alone = example.paired is None and not example.prior and example.anchor is None
    # The crop of the first picture must fit the second.
    return alone and len(example.sources) == 1 and is_alike(example.control.size, example.size)
