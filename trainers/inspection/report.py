"""Dataset report: contents and problems to look at before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data import captions
from ..data.buckets import Crop, bucket_sizes, choose_crops
from ..data.clips import with_pieces
from ..data.examples import LeftOut, reason_of, shortened
from ..data.source_images import is_alike
from ..errors import DatasetError
from ..text import join_first
from .dataset_warnings import warn_of_enlarged, warn_of_resolution, warn_of_scan, warn_of_skipped
from .near_duplicates import find_near_duplicates, signatures

if TYPE_CHECKING:
    from ..data.examples import Dataset, Example
    from ..protocols import Geometry

_SOURCE_SHAPE = "source of another shape"
_CHUNK = 75
_KEPT = 0.8
_LISTED = 8
_TAGS = 20


@dataclass
class Finding:
    """Results of inspecting one example.

    Attributes:
        crops: one crop for each resolution that the picture reaches.
        caption: the plain caption with its trigger; for an encoded prompt, a note.
        tokens: tokens of the longest caption; -1 if not counted.
        flags: problems to look at, in a few words each.
        loss: the loss of a run on the picture, relative to its median picture; None if unknown.
        mark: "hardest" or "memorized" if the loss differs much from the others, else empty.
    """

    example: Example
    crops: list[Crop]
    caption: str
    tokens: int = -1
    flags: list[str] = field(default_factory=list)
    loss: float | None = None
    mark: str = ""

    @property
    def kept(self) -> float:
        """Fraction of the picture that its worst crop keeps."""
        return min(crop.kept for crop in self.crops)


@dataclass(frozen=True)
class Findings:
    """Results of inspecting a dataset.

    Attributes:
        rows: results of the examples that can be trained on, in order.
        left_out: examples that cannot be trained on, and files that are not examples.
        pairs: names of pictures that look alike.
        buckets: number of crops in each bucket.
        tags: number of captions that hold each comma-separated part.
    """

    dataset: Dataset
    geometry: Geometry
    rows: list[Finding]
    left_out: list[LeftOut]
    pairs: list[tuple[str, str]]
    buckets: Counter
    tags: Counter


def inspect(
    dataset: Dataset,
    geometries: dict[int, Geometry],
    count_tokens: Callable[[str], int] | None,
    signatures_folder: str | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
    losses: Mapping[str, tuple[float, str]] | None = None,
    snap: Callable[[int], int] = lambda frames: frames,
) -> Findings:
    """Inspect every picture and caption of a dataset.

    Args:
        geometries: by resolution; 0 is the dataset's own.
        count_tokens: returns the number of tokens of a caption; None if no text encoder is connected.
        signatures_folder: folder that keeps the pictures' signatures between calls; None to keep none.
        tick: called with (done, total); may raise to interrupt.
        losses: `loss` and `mark` of the pictures that a run was trained on, by name.
        snap: as `ImageCodec.snap_frames`.
    """
    losses = losses or {}
    marks, broken = signatures(dataset.examples, signatures_folder, tick)
    left_out = [*dataset.left_out, *broken]
    rows: list[Finding] = []
    places: dict[int, Finding] = {}
    for place, example in enumerate(dataset.examples):
        if marks[place] is None:
            continue
        try:
            finding = inspect_example(example, geometries, count_tokens, snap)
        except DatasetError as error:
            left_out.append(LeftOut(example.source.name, reason_of(error, example.source.name)))
            continue
        if example.source.name in losses and not example.prior:
            finding.loss, finding.mark = losses[example.source.name]
            finding.flags += [finding.mark] * bool(finding.mark)
        rows.append(finding)
        places[place] = finding
    pairs = []
    for first, second in find_near_duplicates(marks):
        if first in places and second in places:
            names = places[first].example.source.name, places[second].example.source.name
            pairs.append(names)
            places[second].flags.append(f"like {names[0]}")
    buckets = Counter(crop.shape for row in rows for crop in row.crops)
    return Findings(dataset, geometries[0], rows, left_out, pairs, buckets, _tags(rows))


def inspect_example(
    example: Example,
    geometries: dict[int, Geometry],
    count_tokens: Callable[[str], int] | None,
    snap: Callable[[int], int] = lambda frames: frames,
) -> Finding:
    """Inspect one picture and its captions, without decoding the picture.

    Args:
        geometries, count_tokens, snap: as in `inspect`.

    Raises:
        DatasetError: the picture is too small.
    """
    wanted = [geometries[side] for side in (0, *example.handling.resolutions)]
    name, upscale = example.source.name, example.handling.upscale
    crops = choose_crops(example.size, wanted, name, upscale, example.center)
    caption = captions.unvaried_caption(example) if example.encoded is None else "(conditioning from the graph)"
    finding = Finding(example, list(with_pieces(example, crops, snap)[0]), caption)
    if example.clip is not None:
        finding.flags += ["short clip"] * (example.clip.count < example.clip.frames)
        finding.flags += ["needs a video VAE"] * (snap(1) == 0)
    _flag(finding, wanted, count_tokens)
    return finding


def _flag(finding: Finding, geometries: Sequence[Geometry], count_tokens: Callable[[str], int] | None) -> None:
    example = finding.example
    if finding.kept < _KEPT:
        finding.flags.append(f"loses {1 - finding.kept:.0%}")
    smallest = min(geometries, key=lambda geometry: geometry.resolution)
    if finding.crops[0].bucket not in bucket_sizes(smallest):
        finding.flags.append("small")
    if _is_enlarged(example, finding.crops) or _is_enlarged(example.paired, finding.crops):
        finding.flags.append("enlarged")
    if not finding.caption:
        finding.flags.append("no caption")
    if count_tokens is not None:
        finding.tokens = max(count_tokens(text) for text in {captions.unvaried_caption(example), *example.captions})
        if finding.tokens > _CHUNK:
            finding.flags.append(f"{finding.tokens} tokens")
    if example.mask is not None and _other_shape(example):
        finding.flags.append("mask of another shape")
    if not all(is_alike(source.size, example.size) for source in example.sources):
        finding.flags.append(_SOURCE_SHAPE)


def _is_enlarged(picture: Example | None, crops: Sequence[Crop]) -> bool:
    return picture is not None and any(crop.scaled[0] > picture.size[0] for crop in crops)


def _other_shape(example: Example) -> bool:
    try:
        return not is_alike(example.mask.open().size, example.size)
    except DatasetError:
        return True


def _tags(rows: Sequence[Finding]) -> Counter:
    counts: Counter = Counter()
    for row in rows:
        for text in row.example.captions:
            # Count a tag once per caption, in the caption's order, so that every report has the same order.
            counts.update(dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip()).keys())
    return counts


def common_tags(findings: Findings, most: int) -> list[tuple[str, int]]:
    """Return the most frequent tags; leave out tags that occur once, as the parts of full sentences do."""
    return [(tag, number) for tag, number in findings.tags.most_common(most) if number > 1]


def report(findings: Findings, cache_bytes: int = -1) -> str:
    """Return a dataset's contents and possible problems as a list of plain lines.

    Args:
        cache_bytes: size of all cached latents and conditionings; -1 to leave it out.
    """
    dataset = findings.dataset
    rows = findings.rows
    own = [row for row in rows if not row.example.prior]
    held_out = sum(row.example.held_out for row in own)
    epoch = sum(row.example.repeats * len(row.crops) for row in own if not row.example.held_out)
    lines = [
        f"Dataset '{dataset.name}': {len(own)} pictures, {epoch} in an epoch"
        + (f", {held_out} held out for validation." if held_out else "."),
        *_prior_lines(rows, epoch),
        f"Resolution {findings.geometry.resolution}, buckets in steps of {findings.geometry.step} pixels.",
        *(f"bucket {bucket_name(bucket)}: {number}" for bucket, number in sorted(findings.buckets.items())),
        *_clip_lines(rows),
        *_repeats(rows),
        *dataset.warnings,
    ]
    if findings.left_out:
        lines.append(f"{len(findings.left_out)} left out: {shortened(findings.left_out, 20)}")
    lines += _trigger_lines(findings)
    bare = [row for row in rows if not any(row.example.captions) and row.example.encoded is None]
    lines += _named("without a caption of their own", bare)
    lines += _named("with neither caption nor trigger (training refuses them)", [r for r in rows if not r.caption])
    lines += _named("smaller than their bucket's usual size", [row for row in rows if "small" in row.flags])
    lines += _named("enlarged", [row for row in rows if _is_enlarged(row.example, row.crops)])
    lines += _named(
        "with an enlarged worse picture", [row for row in rows if _is_enlarged(row.example.paired, row.crops)]
    )
    worst = sorted((row for row in rows if row.kept < _KEPT), key=lambda row: row.kept)
    lines += _named("cropped by more than a fifth", worst, lambda row: f" (loses {1 - row.kept:.0%})")
    if findings.pairs:
        pairs = [f"{second} like {first}" for first, second in findings.pairs]
        lines.append(f"{len(pairs)} look like another picture: {join_first(pairs, _LISTED)}")
    lines += _loss_lines(rows)
    lines += _source_and_mask_lines(rows) + _token_lines(rows) + _augmentation_lines(findings)
    listed = ", ".join(f"{tag} ({number})" for tag, number in common_tags(findings, _TAGS))
    if listed:
        lines.append(f"Most frequent of {len(findings.tags)} tags: {listed}")
    if cache_bytes >= 0:
        size = f"{cache_bytes / 1e6:.0f} MB" if cache_bytes >= 1e6 else "less than 1 MB"
        lines.append(f"All cached latents and texts take {size}; you can delete them at any time.")
    # Format as a list: a node that renders Markdown would join plain lines.
    return "\n".join(f"- {line}" for line in lines)


def warnings(findings: Findings, family: str) -> list[dict[str, Any]]:
    """List the warnings that are known before training is set up.

    Args:
        family: name of the model's family, empty without a model.
    """
    dataset = findings.dataset
    candidates = [
        warn_of_skipped(findings.left_out, len(dataset.examples) + len(dataset.left_out)),
        *warn_of_scan(dataset),
        warn_of_enlarged([(row.example, crop) for row in findings.rows for crop in row.crops]),
        warn_of_resolution(findings.geometry.resolution, family),
    ]
    return [warning for warning in candidates if warning]


def _prior_lines(rows: Sequence[Finding], epoch: int) -> list[str]:
    classes = [row for row in rows if row.example.prior]
    lines = []
    if classes:
        weights = ", ".join(f"{weight:g}" for weight in sorted({row.example.weight for row in classes}))
        texts = [f"'{caption}'" for caption in sorted({row.caption for row in classes})]
        lines.append(
            f"Plus {len(classes)} class images, weight {weights}; an epoch shows {epoch} of them, in turn. "
            f"Their captions: {join_first(texts, _LISTED)}"
        )
    targets = sorted({(str(a), a.weight) for row in rows if (a := row.example.anchor) is not None})
    lines += [
        f"Prior target: the model's own prediction for {prompt}, weight {weight:g}." for prompt, weight in targets
    ]
    return lines


def bucket_name(shape: tuple[int, ...]) -> str:
    """Return a bucket's name in reports: 512x512, or 512x512 x 17 frames."""
    frames = f" x {shape[2]} frames" if len(shape) > 2 else ""
    return f"{shape[0]}x{shape[1]}{frames}"


def _clip_lines(rows: Sequence[Finding]) -> list[str]:
    clips = [row for row in rows if row.example.clip is not None]
    if not clips:
        return []
    counts = [row.example.clip.count for row in clips]
    rates = Counter(f"{row.example.clip.shown:.4g}" for row in clips if row.example.clip.shown)
    listed = ", ".join(f"{rate} ({number})" for rate, number in sorted(rates.items(), key=lambda row: float(row[0])))
    lines = [f"{len(clips)} clips of {min(counts)} to {max(counts)} frames."]
    lines += [f"Frames per second of the files: {listed}."] if listed else []
    lines += _named("shorter than frames", [row for row in clips if "short clip" in row.flags])
    return lines + _named(
        "clips that this VAE cannot encode", [row for row in clips if "needs a video VAE" in row.flags]
    )


def _repeats(rows: Sequence[Finding]) -> list[str]:
    counts = Counter(row.example.repeats for row in rows)
    if set(counts) <= {1}:
        return []
    return ["Repeats: " + ", ".join(f"{times} (pictures: {number})" for times, number in sorted(counts.items()))]


def _trigger_lines(findings: Findings) -> list[str]:
    triggers = sorted({row.example.trigger for row in findings.rows if row.example.trigger})
    lines = [f"Trigger: {', '.join(triggers) or 'none'}"]
    lacking = [row for row in findings.rows if any(row.example.captions) and lacks_trigger(row.example)]
    return lines + _named("with a caption without the trigger (Graft puts it in front)", lacking)


def lacks_trigger(example: Example) -> bool:
    """Report whether an example has a trigger that none of its captions contains."""
    trigger = example.trigger
    return bool(trigger) and not any(captions.holds_words(t, trigger) or "[trigger]" in t for t in example.captions)


def _loss_lines(rows: Sequence[Finding]) -> list[str]:
    known = sorted((row for row in rows if row.loss is not None), key=lambda row: -row.loss)
    if not known:
        return []

    def loss_of(row: Finding) -> str:
        return f" ({row.loss:.2f})"

    hard = "hardest (a loss that stays high means a wrong caption or an odd picture)"
    easy = "memorized (a loss far below the others means learned by heart: lower its repeats)"
    return [
        f"Loss of {len(known)} pictures at equal noise, 1 for the median picture: {known[-1].loss:.2f} to "
        f"{known[0].loss:.2f}.",
        *_named(hard, [row for row in known if row.mark == "hardest"], loss_of),
        *_named(easy, [row for row in reversed(known) if row.mark == "memorized"], loss_of),
    ]


def _source_and_mask_lines(rows: Sequence[Finding]) -> list[str]:
    lines = []
    edited = [row for row in rows if row.example.sources]
    if edited:
        lines.append(f"{len(edited)} of {len(rows)} with a source picture, drawn small in the corner.")
        several = sum(len(row.example.sources) > 1 for row in edited)
        lines += [f"{several} with several source pictures."] if several else []
        lines += _named("with a source picture of another shape", [row for row in edited if _SOURCE_SHAPE in row.flags])
    pairs = sum(row.example.paired is not None for row in rows)
    if pairs:
        lines.append(f"{pairs} of {len(rows)} with a worse picture, drawn small in the corner.")
    masked = [row for row in rows if row.example.mask is not None]
    if masked:
        lines.append(f"{len(masked)} with a mask; training ignores the red parts.")
        lines += _named("with a mask of another shape", [row for row in rows if "mask of another shape" in row.flags])
    return lines


def _token_lines(rows: Sequence[Finding]) -> list[str]:
    if not rows or rows[0].tokens < 0:
        return ["Connect clip to count the tokens of the captions."]
    lines = [f"Longest caption: {max(row.tokens for row in rows)} tokens."]
    long = sorted((row for row in rows if row.tokens > _CHUNK), key=lambda row: -row.tokens)
    what = f"with a caption of more than {_CHUNK} tokens (encoded in parts, not cut)"
    return lines + _named(what, long, lambda row: f" ({row.tokens})")


def _augmentation_lines(findings: Findings) -> list[str]:
    lines = []
    for augmentation in dict.fromkeys(row.example.handling for row in findings.rows):
        parts = []
        if augmentation.shuffle_tags:
            parts.append(
                f"tags shuffled, the first {augmentation.keep_tokens} kept"
                if augmentation.keep_tokens
                else "tags shuffled"
            )
        if augmentation.tag_dropout:
            parts.append(f"{augmentation.tag_dropout:.0%} of tags dropped")
        if augmentation.caption_dropout:
            parts.append(f"{augmentation.caption_dropout:.0%} of captions dropped")
        if augmentation.wildcards:
            parts.append("wildcards")
        if augmentation.flip:
            parts.append("half mirrored")
        if augmentation.resolutions:
            parts.append(f"also at {', '.join(str(side) for side in augmentation.resolutions)}")
        if parts:
            lines.append("Varied: " + ", ".join(parts) + ".")
    versions = [captions.variant_count(row.example, len(findings.dataset.examples)) for row in findings.rows]
    if versions and max(versions) > 1:
        lines.append(f"Graft encodes up to {max(versions)} versions of a caption.")
    return lines


def _named(what: str, rows: Sequence[Finding], more: Callable[[Finding], str] = lambda row: "") -> list[str]:
    names = [f"{row.example.source.name}{more(row)}" for row in rows]
    return [f"{len(rows)} {what}: {join_first(names, _LISTED)}"] if rows else []
