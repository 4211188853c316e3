"""Class images from the graph's own base model: images on disk are reused, missing ones are drawn."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ....trainers.data.class_images import STEPS, ClassImages, Drawing
from ....trainers.data.prior import checked_prompt
from ....trainers.families import family_of
from ....trainers.fingerprints import base_digest
from ....trainers.preprocessing.pixels import to_array
from ....trainers.protocols import PictureRequest
from ....trainers.runs.earlier import claim
from .. import paths
from ..model import families
from ..model.checks import check_sockets
from ..model.fingerprint import patcher_digest, sampled_patcher_digest
from ..model.text_encoder import ComfyText
from ..model.vae import ComfyCodec
from ..server.progress import gallery

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ....trainers.data.examples import Dataset
    from ..model.sampling import ClassSampler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassImageRequest:
    """A node's request for class images; unset values are the family's own.

    Attributes:
        sampler_name, scheduler: "auto" for euler and the family's.
        batch_size: images drawn at once; it does not affect any image.
        first: number of the first image; `count` is one past the last.
    """

    prompt: str
    count: int
    steps: int = STEPS
    cfg: float = 0.0
    resolution: int = 0
    seed: int = 0
    negative: str = ""
    sampler_name: str = "auto"
    scheduler: str = "auto"
    batch_size: int = 1
    first: int = 0


@dataclass(frozen=True)
class ClassImageSet:
    """Class images on disk.

    Attributes:
        dataset: exactly the requested images.
        drawn: number of images that were missing before.
        shown: descriptions for the node's `ui`.
    """

    dataset: Dataset
    drawn: int
    folder: str
    previews: list[dict[str, str]]

    def batch(self) -> torch.Tensor:
        """Return the images as [N, H, W, 3] float32 in 0..1."""
        import torch

        return torch.stack([torch.from_numpy(to_array(example.source.open())) for example in self.dataset.examples])


def make(model: ModelPatcher, clip: CLIP, vae: VAE, request: ClassImageRequest, node: str) -> ClassImageSet:
    """Make the requested class images. Each is saved as soon as it is drawn, so an interruption loses nothing."""
    check_sockets(model, clip, vae)
    family = family_of(families.family_name(model))
    geometry = families.geometry(model, int(vae.spacial_compression_encode()), request.resolution)
    cfg, sampler_name, scheduler = families.drawing(family, request.cfg, request.sampler_name, request.scheduler)
    prompt = checked_prompt(request.prompt, "class_prompt")
    text, codec = ComfyText(clip), ComfyCodec(vae)
    embedded = text.embedded_digest((prompt, request.negative))
    more = [f"embeddings {embedded}"] if embedded else []
    drawing = Drawing(
        prompt=prompt,
        negative=request.negative,
        base=base_digest(patcher_digest(model), text.fingerprint(), codec.fingerprint(), *more),
        size=(geometry.side, geometry.side),
        steps=request.steps,
        cfg=cfg,
        sampler_name=sampler_name,
        scheduler=scheduler,
        seed=request.seed,
    )
    sampled = sampled_patcher_digest(model), text.earlier_fingerprint(), codec.earlier_fingerprint()
    before = replace(drawing, base=base_digest(*sampled))
    # Earlier versions did not consider embedding files.
    is_ours = not embedded and claim(paths.folders().runs, before.base, drawing.base)
    images = ClassImages(paths.class_images_folder(), drawing, before if is_ours else None)
    numbers = range(request.first, request.count)
    missing = images.missing(numbers)
    if missing:
        # Import late: ComfyUI's samplers are not needed if all images exist.
        from ..model.sampling import ClassSampler

        _draw(images, missing, request, ClassSampler(model, text, vae), node)
    previews = [paths.ui_image(images.path(number)) for number in numbers]
    return ClassImageSet(images.dataset(numbers, geometry.resolution), len(missing), images.folder, previews)


def _draw(
    images: ClassImages, missing: list[int], request: ClassImageRequest, sampler: ClassSampler, node: str
) -> None:
    drawing = images.drawing
    log.info("Graft: drawing %d of %d class images for '%s'.", len(missing), request.count, drawing.prompt)
    sample = PictureRequest(
        drawing.prompt,
        drawing.size,
        drawing.steps,
        drawing.cfg,
        drawing.sampler_name,
        drawing.scheduler,
        drawing.seed,
        drawing.negative,
    )
    tick = gallery(node, request.count)
    done = request.count - len(missing)
    for start in range(0, len(missing), request.batch_size):
        numbers = missing[start : start + request.batch_size]
        tick(done)
        for number, picture in zip(numbers, sampler.draw(sample, numbers), strict=True):
            images.write(number, picture)
            done += 1
            tick(done, picture)
