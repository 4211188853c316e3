"""Recipes and datasets of exported jobs as JSON, decoded strictly."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ..data.examples import Augmentation, Clip, Dataset, EncodedPrompt, Example, LeftOut, PriorTarget, Source
from ..errors import RunError
from ..objective.options import Objective
from ..recipe.recipe import Recipe
from .validation import check_recipe


def pictures_as_json(pictures: Mapping[str, Example]) -> dict[str, Any]:
    """Return the source pictures of prompts, by their names there, without their pixels."""
    return {name: _example_as_json(example) for name, example in pictures.items()}


def decode_pictures(value: dict[str, Any]) -> dict[str, Example]:
    return {check_text_field(name): _example_of(row) for name, row in value.items()}


def dataset_as_json(dataset: Dataset) -> dict[str, Any]:
    return {
        "examples": [_example_as_json(example) for example in dataset.examples],
        "trigger": dataset.trigger,
        "resolution": dataset.resolution,
        "name": dataset.name,
        "left_out": [asdict(row) for row in dataset.left_out],
        "warnings": list(dataset.warnings),
    }


def _example_as_json(example: Example) -> dict[str, Any]:
    row = {name: getattr(example, name) for name in _PLAIN}
    row["handling"] = asdict(example.handling)
    row["name"] = example.source.name
    row["mask"] = [example.mask.name, example.mask.digest] if example.mask is not None else None
    row["anchor"] = example.anchor and {k: v for k, v in asdict(example.anchor).items() if v or k == "prompt"}
    row["control"] = _example_as_json(example.control) if example.control is not None else None
    row["left_out"] = asdict(example.left_out) if example.left_out is not None else None
    # These, and later fields of the anchor, only where there is one, so that earlier versions read other jobs.
    if example.center is not None:
        row["center"] = example.center
    if example.encoded is not None:
        row["encoded"] = example.encoded.digest
    if example.more_controls:
        row["more_controls"] = [_example_as_json(source) for source in example.more_controls]
    if example.paired is not None:
        row["paired"] = _example_as_json(example.paired)
    if example.clip is not None:
        row["clip"] = asdict(example.clip)
    return row


# Fields of an example that JSON holds unchanged.
_PLAIN = ("captions", "size", "digest", "trigger", "repeats", "held_out", "weight", "prior")


_BESIDE = (
    "handling",
    "name",
    "mask",
    "anchor",
    "control",
    "left_out",
    "center",
    "encoded",
    "more_controls",
    "paired",
    "clip",
)


def decode_recipe(values: dict[str, Any]) -> Recipe:
    """Decode a recipe. Raise ValueError, TypeError or SettingsError for an invalid one."""
    objective = _decode(Objective, values["objective"])
    recipe = _decode(Recipe, {**values, "objective": objective})
    check_recipe(recipe)
    return recipe


def decode_dataset(value: dict[str, Any]) -> Dataset:
    examples = tuple(_example_of(row) for row in value["examples"])
    left_out = tuple(_decode(LeftOut, row) for row in value["left_out"])
    plain = {name: value[name] for name in ("trigger", "resolution", "name")}
    # Jobs of earlier versions lack the warnings.
    warnings = value.get("warnings", [])
    return _decode(Dataset, {**plain, "examples": examples, "left_out": left_out, "warnings": warnings})


def _example_of(row: dict[str, Any]) -> Example:
    unknown = row.keys() - {*_PLAIN, *_BESIDE}
    if unknown:
        # A field of a later version. Ignoring it would train another run.
        raise ValueError(f"{min(unknown)} is unknown")
    plain = {name: row[name] for name in _PLAIN}
    mask, anchor, control = row["mask"], row["anchor"], row["control"]
    # Jobs of earlier versions lack these fields.
    left_out, center = row.get("left_out"), row.get("center")
    decoded = {
        "source": _Absent(check_text_field(row["name"]), check_text_field(row["digest"])),
        "handling": _decode(Augmentation, row["handling"]),
        "mask": None if mask is None else _Absent(check_text_field(mask[0]), check_text_field(mask[1])),
        "anchor": None if anchor is None else _decode(PriorTarget, anchor),
        "control": None if control is None else _example_of(control),
        "left_out": None if left_out is None else _decode(LeftOut, left_out),
        "more_controls": tuple(_example_of(source) for source in row.get("more_controls", [])),
        "center": center,
        "paired": _example_of(row["paired"]) if "paired" in row else None,
        "clip": _decode(Clip, row["clip"]) if "clip" in row else None,
        # Only rows with a prompt that arrived encoded have this field.
        "encoded": EncodedPrompt(check_text_field(row["encoded"])) if "encoded" in row else None,
    }
    return _decode(Example, {**plain, **decoded})


class _Absent(Source):
    """Picture that a job does not contain, because its latent is in the job's cache."""

    def __init__(self, name: str, digest: str):
        self.name = name
        self.digest = digest

    def open(self):
        """Raise RunError. Another error type would leave the picture out of training, and so train another run."""
        raise RunError(
            f"The encoded data of the picture '{self.name}' is missing or damaged, and a job has no pictures.",
            "Export the job again.",
        )


def _decode(kind: type, values: dict[str, Any]) -> Any:
    """Make a dataclass from JSON values; lists become tuples. Fields may also hold objects that are already decoded.

    Raises:
        ValueError: a field is unknown, missing or has another type. The error names it.
    """
    import msgspec

    unknown = values.keys() - {field.name for field in fields(kind)}
    if unknown:
        # msgspec ignores unknown fields of dataclasses.
        raise ValueError(f"{min(unknown)} is unknown")
    # Only check: msgspec turns 1 into 1.0 where a float belongs, and the run identity distinguishes the two.
    msgspec.convert(values, kind)
    return kind(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def check_text_field(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is not a text")
    return value
