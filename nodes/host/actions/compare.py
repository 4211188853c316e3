"""A grid of images: the same prompts drawn with several adapters, files and strengths."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ....trainers.errors import SettingsError
from ....trainers.families import family_of
from ....trainers.preprocessing.pixels import to_array
from ....trainers.protocols import PictureRequest
from ....trainers.recipe.parsing import parse_lines
from ....trainers.tools.compare import grid
from .. import paths
from ..model import families
from ..model.checks import check_sockets
from ..model.lora import apply_adapter
from ..model.text_encoder import ComfyText
from ..model.vae import ComfyCodec
from ..server.progress import gallery

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

_MOST_STRENGTHS = 32
_MOST_PICTURES = 400
_TOP_STRENGTH = 100.0
BASE = "base"


@dataclass(frozen=True)
class CompareRequest:
    """The values on a comparing node.

    Attributes:
        prompts: one per line.
        strengths: numbers separated by commas or spaces.
        files: names in ComfyUI's LoRA list, one per line; `*` and `?` are wildcards.
        cfg, resolution: 0 for the family's.
        frames: of each clip; 1 for pictures.
        sampler_name, scheduler: "auto" for euler and the family's.
    """

    prompts: str
    strengths: str
    files: str
    negative: str
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    resolution: int
    seed: int
    frames: int = 1


@dataclass(frozen=True)
class Column:
    """A column of the grid; without an adapter it shows the model as it came."""

    label: str
    adapter: Mapping[str, torch.Tensor] | str | None
    strength: float

    def open(self) -> Mapping[str, torch.Tensor]:
        """Return the adapter. A file is read only now, so that at most one is in memory."""
        return paths.load_named_adapter(self.adapter) if isinstance(self.adapter, str) else self.adapter


def compare(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    request: CompareRequest,
    adapters: Mapping[str, Mapping | None],
    node: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (grid [T, H, W, 3], pictures [N, h, w, 3] row by row), float32 in 0..1. T is 1, or the frames of clips.

    Args:
        adapters: connected adapters by their label, None for an input without one.
    """
    from ..model.sampling import PromptSampler

    check_sockets(model, clip, vae)
    prompts = parse_lines(request.prompts)
    if not prompts:
        raise SettingsError("There is no prompt to draw.", "Write one or more prompts, one per line.", "prompts")
    columns = columns_of(request, adapters)
    _check_count(len(prompts), len(columns))
    # Record the embedding files that the prompts call, so that the node runs again if one is replaced.
    ComfyText(clip).embedded_digest((*prompts, request.negative))
    requests = _picture_requests(model, vae, request, prompts)
    tick = gallery(node, len(prompts) * len(columns))
    drawn = []
    for column in columns:
        tick(len(drawn) * len(prompts))
        given, text = model, clip
        if column.adapter is not None:
            given, text = apply_adapter(model, clip, column.open(), column.strength, column.strength)
        pictures = PromptSampler(given, ComfyText(text), vae).draw(requests)
        drawn.append([picture if isinstance(picture, list) else [picture] for picture in pictures])
        tick(len(drawn) * len(prompts), drawn[-1][0][0])
    rows = list(zip(*drawn, strict=True))
    batch = [torch.from_numpy(to_array(frame)) for row in rows for clip in row for frame in clip]
    labels = [column.label for column in columns]
    sheets = [
        torch.from_numpy(grid(prompts, labels, [[clip[number] for clip in row] for row in rows]))
        for number in range(len(rows[0][0]))
    ]
    return torch.stack(sheets), torch.stack(batch)


def _check_count(prompts: int, columns: int) -> None:
    total = prompts * columns
    if total > _MOST_PICTURES:
        raise SettingsError(
            f"{prompts} prompts with {columns} columns each make {total} pictures; the limit is {_MOST_PICTURES}.",
            "Write fewer prompts, files or strengths.",
            "prompts",
        )


def _picture_requests(
    model: ModelPatcher, vae: VAE, request: CompareRequest, prompts: tuple[str, ...]
) -> list[PictureRequest]:
    family = family_of(families.family_name(model))
    geometry = families.geometry(model, int(vae.spacial_compression_encode()), request.resolution)
    cfg, sampler_name, scheduler = families.drawing(family, request.cfg, request.sampler_name, request.scheduler)
    size = (geometry.side, geometry.side)
    drawing = (size, request.steps, cfg, sampler_name, scheduler)
    frames = _snapped_frames(model, vae, request.frames)
    return [
        PictureRequest(prompt, *drawing, (request.seed + index) % 2**64, request.negative, frames=frames)
        for index, prompt in enumerate(prompts)
    ]


def _snapped_frames(model: ModelPatcher, vae: VAE, frames: int) -> int:
    """Return the largest number of frames that the VAE takes. Raise SettingsError for clips of a model of stills."""
    if frames == 1:
        return 1
    snapped = ComfyCodec(vae).snap_frames(frames) if families.takes_clips(model) else 0
    if not snapped:
        raise SettingsError(
            f"frames is {frames}, but this model or its VAE makes stills.", "Set frames to 1.", "frames"
        )
    return snapped


def columns_of(request: CompareRequest, adapters: Mapping[str, Mapping | None]) -> list[Column]:
    """Return a column for every adapter and file at every strength, and one for the plain model if a strength is 0.

    Raises:
        SettingsError: a strength is not a number, or there is nothing to compare.
        ModelError: a file does not exist.
    """
    strengths = strengths_of(request.strengths)
    sources: dict[str, Mapping | str] = {label: adapter for label, adapter in adapters.items() if adapter is not None}
    names = files_of(request.files)
    sources.update(zip(_labels(names), names, strict=True))
    if not sources:
        raise SettingsError(
            "There is nothing to compare.",
            "Connect an adapter, or write names of LoRA files, such as my_run-1a2b3c4d/*.",
            "files",
        )
    base = Column(BASE, None, 0.0)
    # Beside several adapters the model comes first; of one adapter, such as a slider, it has its place in the row.
    columns = [base] if 0.0 in strengths and len(sources) > 1 else []
    for label, source in sources.items():
        for strength in strengths:
            if strength:
                label_at = f"{label} at {strength:g}" if len([value for value in strengths if value]) > 1 else label
                columns.append(Column(label_at, source, strength))
            elif len(sources) == 1:
                columns.append(base)
    return columns


def strengths_of(text: str) -> list[float]:
    """Return the numbers in a text, each once. Raises SettingsError if it holds none, or anything else."""
    numbers: list[float] = []
    for word in re.split(r"[\s,;]+", text.strip()):
        try:
            number = float(word)
        except ValueError:
            number = float("nan")
        if not abs(number) <= _TOP_STRENGTH:
            raise SettingsError(
                f"'{word[:40]}' is not a strength.",
                f"Write numbers from -{_TOP_STRENGTH:g} to {_TOP_STRENGTH:g}, separated by commas, such as 0, 0.5, 1.",
                "strengths",
            )
        if number not in numbers:
            numbers.append(number)
    if len(numbers) > _MOST_STRENGTHS:
        raise SettingsError(f"{len(numbers)} strengths are too many.", f"Write at most {_MOST_STRENGTHS}.", "strengths")
    return numbers


def files_of(text: str) -> list[str]:
    """Return the listed LoRA files and saves of runs that a text names or matches by pattern, each once.

    Raises SettingsError for a line without a match.
    """
    # List the saves of runs only if a line has a folder: most texts name none.
    choices = paths.adapter_choices() + (paths.save_choices() if "/" in text.replace("\\", "/") else [])
    # On Windows, ComfyUI's list has backslashes.
    plain = {name.replace(os.sep, "/"): name for name in choices}
    files: list[str] = []
    for line in parse_lines(text):
        wanted = line.replace("\\", "/")
        fitting = [wanted] if wanted in plain else sorted(fnmatch.filter(plain, wanted))
        if not fitting:
            raise SettingsError(
                f"No LoRA file matches '{wanted[:80]}'.",
                "Write a name as Graft Load Adapter lists it. * matches anything, as in my_run-1a2b3c4d/*.",
                "files",
            )
        files += [plain[name] for name in fitting if plain[name] not in files]
    return files


def states_of(text: str) -> list:
    """Return values that change with the files of a text; missing files raise when the node executes."""
    try:
        return [(name, paths.file_state(name, paths.adapter_path)) for name in files_of(text)]
    except SettingsError:
        return []


def _labels(names: list[str]) -> list[str]:
    short = [_short_label(os.path.splitext(os.path.basename(name))[0]) for name in names]
    whole = [f"{os.path.dirname(name)} {label}".strip() for name, label in zip(names, short, strict=True)]
    return [label if short.count(label) == 1 else other for label, other in zip(short, whole, strict=True)]


def _short_label(name: str) -> str:
    save = re.fullmatch(r"step-0*(\d+)", name)
    return f"step {save.group(1)}" if save else name
