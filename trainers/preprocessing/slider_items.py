"""Training without pictures: the prompts of a slider as dataset items, with empty latents that the base fills."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ModelError, SettingsError
from ..protocols import HOLE, Conditioning
from ..recipe.parsing import read_prompts
from ..rng import stream_seed
from .items import DatasetItem, Poles, Sample

if TYPE_CHECKING:
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from .cache_filler import CacheFiller
    from .dataset_caches import DatasetCaches


def slider_items(recipe: Recipe, host: Host, caches: DatasetCaches, filler: CacheFiller) -> list[DatasetItem]:
    """Encode the prompts that are not cached, and return an item for each row of prompts.

    Raises:
        ModelError: the model draws only with pictures, or text encoder and model do not belong together.
        SettingsError: the prompt of a sample picture names a source picture.
    """
    denoiser = host.denoiser
    if denoiser.conditioning_kind == HOLE:
        raise ModelError(
            "This model fills masked pictures, and a slider without pictures has none.",
            "Connect a dataset of pairs, or use another model.",
            "dataset",
        )
    if any(prompt.sources for prompt in read_prompts(recipe.preview_prompts)):
        raise SettingsError(
            "A prompt of a sample picture has a --c, but a slider without pictures takes none.",
            "Remove --c.",
            "options",
        )
    filler.fill_prompts(recipe.slider_texts)
    side = denoiser.geometry(recipe.resolution).side
    latent = denoiser.empty_latent((side, side))
    denoiser.check_inputs(latent, host.text.encode("") if caches.texts is None else caches.texts.get(""))
    # The prompts are few: keep their conditionings in memory.
    read = functools.cache(lambda text: {} if caches.texts is None else caches.texts.get(text))

    def sample(text: str, poles: Poles | None = None, anchor: Sample | None = None) -> Sample:
        conditioning = Conditioning(read(text), (side, side), (0, 0), (side, side))
        caption = text if caches.texts is None else None
        return Sample(latent, conditioning, caption=caption, prior_target=anchor, poles=poles)

    return [
        DatasetItem(
            name=f"{positive or 'nothing'} - {negative or 'nothing'}",
            bucket=(side, side),
            repeats=1,
            show=functools.partial(_show, recipe, place, sample),
            has_prior_target=bool(recipe.slider_anchors),
        )
        for place, (_, positive, negative) in enumerate(recipe.slider_prompts)
    ]


def _show(recipe: Recipe, place: int, sample: Callable[..., Sample], visit: int | None) -> Sample:
    """Return the sample of a row of prompts at a visit, with one of the anchors."""
    target, positive, negative = recipe.slider_prompts[place]
    unconditional = sample("")
    anchor = None
    if recipe.slider_anchors:
        number = stream_seed("anchor", recipe.seed, place, visit or 0) % len(recipe.slider_anchors)
        anchor = sample(recipe.slider_anchors[number], Poles(None, None, unconditional))
    return sample(target, Poles(sample(positive), sample(negative), unconditional), anchor)
