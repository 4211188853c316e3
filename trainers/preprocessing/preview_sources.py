"""Source pictures of sample pictures: those that a prompt names, or those of the dataset's first pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.buckets import usual_bucket
from ..data.pictures import FileSource, measure_file
from ..data.source_images import source_image_of
from ..errors import DatasetError, SettingsError
from ..recipe.options import TEXT_ALONE
from ..recipe.parsing import read_prompts
from .source_prompts import SourcePrompt

if TYPE_CHECKING:
    import torch

    from ..data.examples import Example
    from ..recipe.recipe import Recipe
    from ..runs.folders import Folders
    from .crops import CroppedExample
    from .dataset_caches import DatasetCaches
    from .source_prompts import Sources


@dataclass(frozen=True)
class PreviewInput:
    """Encoded source pictures of one sample picture.

    Attributes:
        sources: their latents, see `protocols.Conditioning`.
        encoded: tensors of the prompt and of the negative prompt, encoded together with the source pictures; None if
            the texts are encoded alone.
    """

    sources: tuple[torch.Tensor, ...]
    encoded: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None


@dataclass(frozen=True)
class PreviewSources:
    """Source pictures of one sample picture, before they are encoded.

    Attributes:
        size: (width, height) of the sample picture, pixels.
    """

    sources: Sources
    size: tuple[int, int]
    prompt: str
    negative: str

    @property
    def texts(self) -> tuple[SourcePrompt, SourcePrompt]:
        """Return the prompt and the negative prompt with the source pictures."""
        return SourcePrompt(self.prompt, self.sources), SourcePrompt(self.negative, self.sources, negative=True)


def preview_sources(
    training: Sequence[CroppedExample],
    validation: Sequence[CroppedExample],
    recipe: Recipe,
    caches: DatasetCaches,
    named: Mapping[str, Example],
) -> list[PreviewSources | None]:
    """Choose the source pictures of each sample picture of a recipe; None if it needs none.

    A prompt that names no files gets those of a picture of the most common size, validation pictures first.

    Args:
        named: the source pictures that the prompts name, from `named_sources`.
    """
    if not recipe.preview_prompts:
        return []
    subject = [cropped for cropped in training if not cropped.example.prior]
    usual = usual_bucket([crop.bucket for cropped in subject for crop in cropped.crops])
    crops = [(cropped, crop) for cropped in (*validation, *subject) for crop in cropped.crops]
    usable = [(cropped, crop) for cropped, crop in crops if cropped.example.sources and crop.bucket == usual]
    chosen: list[PreviewSources | None] = []
    for index, prompt in enumerate(read_prompts(recipe.preview_prompts)):
        size = prompt.size(usual)
        sources = tuple(caches.named_source(named[name], size) for name in prompt.sources)
        if not sources and usable:
            sources = caches.sources_of(*usable[index % len(usable)])
        negative = recipe.preview_negative if prompt.negative is None else prompt.negative
        needs_none = not sources and recipe.prompt_node == TEXT_ALONE
        chosen.append(None if needs_none else PreviewSources(sources, size, prompt.text, negative))
    return chosen


def named_sources(recipe: Recipe, folders: Folders) -> dict[str, Example]:
    """Return the source pictures that a recipe's prompts name, by these names.

    Raises:
        SettingsError: there is no file of a name, or it is not a picture.
    """
    names = dict.fromkeys(name for prompt in read_prompts(recipe.preview_prompts) for name in prompt.sources)
    known = folders.pictures
    return {name: known[name] if name in known else _example_of(name, folders.picture_of) for name in names}


def _example_of(name: str, picture_of: Callable[[str], str]) -> Example:
    path = picture_of(name)
    try:
        size, digest, _ = measure_file(path, name)
    except DatasetError as error:
        raise SettingsError(f"--c {name}: {error.message}", "Save the picture again.", "prompts") from error
    root = os.path.dirname(os.path.realpath(path))
    return source_image_of(FileSource(path, name, root, digest), tuple(size))
