"""Inspection of an adapter: its type, its norm per block, its metadata and its fit to a model."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import ModelError
from ..formats.convert import host_places
from ..formats.json_files import parse_json
from ..formats.keys import ALPHA, DORA, DOWN, block_of, is_text, split, type_of
from ..formats.metadata import MADE, title_of
from ..text import counted, join_first
from .difference import Difference, difference
from .foreign import GUESS, has_guessed_alpha, kind_of

if TYPE_CHECKING:
    import torch

    from ..families import Family
    from ..formats.peft_format import PeftAdapter

_LISTED = 5
# More keys than this part of an adapter that fit no layer are an error.
MOST_UNREAD = 0.1


class Fit(Protocol):
    """The fit of an adapter to a model.

    Attributes:
        read, unread: number of keys that the model uses, and the keys that it does not use.
        misfits: (weight's key, mismatch) of tensors of another size.
        paths: the paths of the model's weights by layer name.
    """

    model: str
    read: int
    unread: list[str]
    misfits: list[tuple[str, str]]
    paths: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One layer of an adapter.

    Attributes:
        kind: adapter type.
        rank, scale: of its factors, None if it has none.
        norm: Frobenius norm of its difference, None if that depends on the weight.
    """

    name: str
    block: str
    kind: str
    rank: int | None
    scale: float | None
    norm: float | None


@dataclass(frozen=True)
class Findings:
    """The facts about an adapter.

    Attributes:
        numbers, size: count of numbers in its tensors, and their bytes.
        method: the type it was trained as, None if unknown.
    """

    rows: list[Row]
    others: list[str]
    numbers: int
    size: int
    metadata: dict[str, str]
    method: str | None


def look(adapter: dict[str, torch.Tensor], paths: dict[str, str] | None = None) -> Findings:
    """Inspect an adapter. Values that cannot be determined for a layer are None.

    Args:
        paths: the paths of the connected model's weights by layer name. Blocks then get the model's names.
    """
    layers, others = split(adapter)
    held = adapter
    rows = [_row(name, tensors, (paths or {}).get(name, name)) for name, tensors in layers.items()]
    native = getattr(adapter, "native", None) if not len(adapter) else None
    if native is not None:
        held = native.all_tensors()
        rows = [_native_row(name, *place, (paths or {}).get(name, name)) for name, place in host_places(native).items()]
    numbers = sum(tensor.numel() for tensor in held.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    method = adapter.made_by() if hasattr(adapter, "made_by") else None
    return Findings(sorted(rows, key=_order), others, numbers, size, getattr(adapter, "metadata", {}), method)


def _row(name: str, tensors: dict[str, torch.Tensor], path: str) -> Row:
    rank = scale = None
    if DOWN in tensors:
        rank = tensors[DOWN].shape[0]
    elif "hada_w1_b" in tensors:
        rank = tensors["hada_w1_b"].shape[0]
    if rank is not None:
        scale = float(tensors[ALPHA]) / rank if ALPHA in tensors else 1.0
    try:
        norm = _norm(difference(name, {end: part for end, part in tensors.items() if end != DORA}, ""))
    except ModelError:
        norm = None
    return Row(name, block_of(path), type_of(tensors), rank, scale, norm)


def _native_row(name: str, part: PeftAdapter, place: str, path: str) -> Row:
    """Return the row of a layer that only peft's form can hold. Its norm depends on the weight."""
    down = part.tensors.get(f"{place}.lora_A.weight")
    rank = None if down is None else down.shape[0]
    return Row(name, block_of(path), part.method, rank, part.scales.get(place), None)


def _norm(given: Difference) -> float:
    squares = 0.0
    if given.up is not None:
        if given.rank >= min(given.up.shape[0], given.down[0].numel()):
            # The factors are larger than their product, and their Gram matrices larger still.
            squares = float(given.value().double().square().sum())
        else:
            up, down = given.up.double(), given.down.flatten(1).double()
            squares = float(((up.t() @ up) * (down @ down.t())).sum())
    elif given.whole is not None:
        squares = float(given.whole.double().square().sum())
    if given.bias is not None:
        squares += float(given.bias.double().square().sum())
    # Rounding may give a negative square. NaN is passed on.
    return math.sqrt(squares) if not squares < 0 else 0.0


_FIRST = ("input", "down", "double", "middle", "mid", "transformer", "joint", "output", "up", "single")


def _order(row: Row) -> tuple:
    return block_order(row.block), row.name


def block_order(block: str) -> tuple:
    """Return a sort key for blocks: in the order in which the model runs them, text encoders last."""
    text = bool(re.match(r"te\d ", block))
    stem, number = re.fullmatch(r"(.*?)(?:\.(\d+))?", block).groups()
    place = next((index for index, word in enumerate(_FIRST) if stem.startswith(f"{word}_")), len(_FIRST))
    return text, place, stem, int(number or 0)


def block_norms(findings: Findings) -> list[tuple[str, float]]:
    """Return (block, norm of the differences of all its weights), in the model's order."""
    squares: dict[str, float] = {}
    for row in findings.rows:
        if row.norm is not None:
            squares[row.block] = squares.get(row.block, 0.0) + row.norm**2
    return [(block, math.sqrt(value)) for block, value in squares.items()]


def report(findings: Findings, fit: Fit | None, family: Family | None = None) -> str:
    """Return a report as text.

    Args:
        family: of the connected model; its presets of `targets` are listed.
    """
    lines = [*_described(findings), *_origin(findings.metadata), *_fitting(fit)]
    if family is not None and family.presets:
        lines.append(f"Presets of targets for {family.name}: {', '.join(family.presets)}")
    return "\n".join(lines)


def headline(findings: Findings) -> str:
    """Return types, ranks and number of layers in one line."""
    ranks = sorted({row.rank for row in findings.rows if row.rank is not None})
    kinds = " + ".join(kind for kind, _ in Counter(row.kind for row in findings.rows).most_common())
    rank = f", rank {_span(ranks)}" if ranks else ""
    return f"{kinds or 'nothing'}{rank}, {counted(len(findings.rows), 'layer')}"


def _described(findings: Findings) -> list[str]:
    if not findings.rows and not findings.others:
        return ["No layers to apply: the adapter is empty."]
    kinds = Counter(row.kind for row in findings.rows)
    named = ", ".join(f"{kind} ({counted(number, 'layer')})" for kind, number in kinds.most_common())
    lines = [f"Type: {named}" + (f"; trained as {findings.method}" if findings.method else "")]
    ranks = Counter(row.rank for row in findings.rows if row.rank is not None)
    if len(ranks) == 1:
        lines.append(f"Rank: {next(iter(ranks))}")
    elif ranks:
        lines.append("Ranks: " + ", ".join(f"{rank} ({counted(ranks[rank], 'layer')})" for rank in sorted(ranks)))
    scales = sorted({round(row.scale, 6) for row in findings.rows if row.scale is not None})
    if scales:
        lines.append(f"Effective scale (alpha / rank): {_span(scales)}")
    text = sum(is_text(row.name) for row in findings.rows)
    lines.append(f"Layers: {len(findings.rows) - text} of the model, {text} of text encoders")
    lines.append(f"Size: {findings.numbers:,} numbers, {findings.size / 1e6:.1f} MB")
    norms = [row.norm for row in findings.rows if row.norm is not None]
    if norms:
        most = max((row for row in findings.rows if row.norm is not None), key=lambda row: row.norm)
        whole = math.sqrt(sum(norm**2 for norm in norms))
        lines.append(f"Norm of all differences: {whole:.4g}; the largest {most.norm:.4g}, at {most.name}")
        if not math.isfinite(whole):
            lines.append("NOT FINITE: it gives black pictures. Train it again at a lower learning rate.")
        elif whole == 0:
            lines.append("It changes nothing: all differences are zero.")
    if any(row.kind == "DoRA" and row.norm is not None for row in findings.rows):
        lines.append("The norms of DoRA cover only the low-rank part; the magnitudes need the model's weights.")
    if has_guessed_alpha(row.name for row in findings.rows):
        lines.append(f"{GUESS[0].upper()}{GUESS[1:]}.")
    unknown = [row.name for row in findings.rows if row.norm is None]
    return (
        lines
        + _named("layers need the model's weights for their norm", unknown)
        + _named("keys belong to no layer", findings.others)
        + ([f"It is {kind.name}. {kind.cure}"] if (kind := kind_of(findings.others)) else [])
    )


def _origin(metadata: dict[str, str]) -> list[str]:
    fields = {
        "Title": title_of(metadata),
        "Trigger": metadata.get("modelspec.trigger_phrase"),
        "Made for": metadata.get("modelspec.architecture"),
        "Base": metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version"),
        "Steps": metadata.get("ss_steps") or metadata.get("ss_max_train_steps"),
        "Resolution": metadata.get("modelspec.resolution") or metadata.get("ss_resolution"),
        "Author": metadata.get("modelspec.author"),
        "Description": metadata.get("modelspec.description"),
        "Licence": metadata.get("modelspec.license"),
    }
    lines = [f"{name}: {' '.join(str(value).split())[:300]}" for name, value in fields.items() if value]
    # The metadata of a file can hold anything.
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
        lines.append("Made by " + _describe_origin(parse_json(metadata[MADE])))
    return lines or ["It has no metadata."]


def _describe_origin(origin: dict) -> str:
    how = ", ".join(f"{name} {value}" for name, value in origin.items() if name not in ("tool", "of"))
    sources = [source.get("title") or source.get("trained") or "an untitled adapter" for source in origin.get("of", [])]
    return f"{origin.get('tool')} ({how})" + (f" of {' and '.join(map(str, sources))}" if sources else "")


def _fitting(fit: Fit | None) -> list[str]:
    if fit is None:
        return ["Connect a model to see whether it fits."]
    total = fit.read + len(fit.unread)
    if not fit.read:
        return [
            f"DOES NOT FIT the connected model ({fit.model}): it has none of the adapter's {total} keys. "
            "The adapter is for another model."
        ]
    lines = [f"Fits the connected model ({fit.model}): {fit.read} of {total} keys."]
    lines += _named("keys fit no layer", fit.unread)
    if len(fit.unread) > MOST_UNREAD * total:
        lines[0] = f"DOES NOT FIT the connected model ({fit.model}): it has only {fit.read} of {total} keys."
    if fit.misfits:
        lines[0] = f"DOES NOT FIT the connected model ({fit.model}), which has the same layers in another size."
        lines += _named("parts of another size", [f"{key} has {what}" for key, what in fit.misfits])
    return lines


def _named(what: str, names: list[str]) -> list[str]:
    return [f"{len(names)} {what}: {join_first(names, _LISTED)}"] if names else []


def _span(values: list) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
