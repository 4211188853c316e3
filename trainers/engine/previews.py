"""Preview pictures, sampled with the trainables during training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from statistics import median_low
from typing import TYPE_CHECKING

import torch

from ..data.buckets import usual_bucket
from ..errors import in_one_line, is_out_of_memory
from ..families import family_of
from ..protocols import Conditioning, PictureRequest, PreviewSkipped
from ..recipe.parsing import read_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from ..protocols import Host
    from ..runs.run import Run
    from ..steps.plan import Plan

    # A clip is the list of its frames.
    Picture = Image.Image | list[Image.Image]

log = logging.getLogger(__name__)

# Strengths of the adapter in the previews of a slider.
_STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def preview(plan: Plan, run: Run, host: Host, step: int) -> None:
    """Sample and save the preview pictures of a step. Skip them if there is not enough memory."""
    recipe = plan.recipe
    if not recipe.preview_prompts:
        return
    with host.group.main_process_only() as mine:
        if mine:
            host.report_phase("previews")
            _preview(plan, run, host, step)
            host.report_phase("training")


def _preview(plan: Plan, run: Run, host: Host, step: int) -> None:
    try:
        pictures = _drawn(plan, host, step)
    except PreviewSkipped:
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = in_one_line(error)
        log.warning("Graft: memory ran out in the previews of step %d (%s). Graft skipped them.", step, message)
        run.log({"event": "memory", "step": step, "done": "skipped the previews", "said": message})
        return
    paths = run.save_samples(step, pictures, family_of(host.denoiser.family).frame_rate)
    run.log({"event": "sample", "step": step, "files": [os.path.basename(path) for path in paths]})
    firsts = [picture[0] if isinstance(picture, list) else picture for picture in pictures]
    host.report("sample", {"step": step, "paths": paths, "pictures": firsts})


def _requests(plan: Plan) -> list[PictureRequest]:
    recipe = plan.recipe
    usual, shown = _usual_bucket(plan), _image_conditionings(plan)
    frames = median_low([item.frames for item in plan.train if not item.prior] or [1])
    requests = []
    for index, prompt in enumerate(read_prompts(recipe.preview_prompts)):
        read = plan.previews[index] if plan.previews else None
        given = read() if read is not None else None
        beside = Conditioning({}, sources=given.sources) if given else shown[index % len(shown)] if shown else None
        requests.append(
            PictureRequest(
                prompt=prompt.text,
                negative=recipe.preview_negative if prompt.negative is None else prompt.negative,
                size=prompt.size(usual),
                steps=prompt.steps or recipe.preview_steps,
                cfg=recipe.preview_cfg if prompt.cfg is None else prompt.cfg,
                guidance=prompt.guidance,
                sampler_name=recipe.preview_sampler,
                scheduler=recipe.preview_scheduler,
                seed=(recipe.preview_seed + index) % 2**64 if prompt.seed is None else prompt.seed,
                beside=beside,
                encoded=given.encoded if given else None,
                frames=frames,
            )
        )
    return requests


def _drawn(plan: Plan, host: Host, step: int) -> list[Picture]:
    """Sample the pictures. After an out-of-memory error, move everything else off the device and try once more."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        draw = _drawing(plan, host, step)
        try:
            return draw()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        host.denoiser.make_room()
        host.group.reset_after_failure()
        return draw()


def _drawing(plan: Plan, host: Host, step: int) -> Callable[[], list[Picture]]:
    requests = _requests(plan)
    if host.preview_model is None:
        draw = partial(host.denoiser.preview, requests)
        return partial(_drawn_rows, plan, draw) if plan.recipe.slider_strength else draw

    def export() -> tuple[Mapping[str, torch.Tensor] | None, Mapping[str, torch.Tensor] | None]:
        products = plan.products(step)
        return products.adapter, products.embedding

    draw = partial(host.preview_model.draw, requests, export)
    return (lambda: _in_rows(draw(factor) for factor in _STRENGTHS)) if plan.recipe.slider_strength else draw


def _drawn_rows(plan: Plan, draw: Callable[[], list[Picture]]) -> list[Picture]:
    columns = []
    for strength in _STRENGTHS:
        with plan.scaled(strength) if strength else plan.switched_off():
            columns.append(draw())
    return _in_rows(columns)


def _in_rows(columns: Iterable[list[Picture]]) -> list[Picture]:
    return [
        [_row(frames) for frames in zip(*pictures, strict=True)] if isinstance(pictures[0], list) else _row(pictures)
        for pictures in zip(*columns, strict=True)
    ]


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    from PIL import Image

    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * width, height))
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * width, 0))
    return row


def _image_conditionings(plan: Plan) -> tuple[Conditioning, ...]:
    """Return conditionings for the previews of a model that takes an inpaint mask or a first frame; else none.

    They come from the first dataset items of the most common bucket, validation items first.
    """
    bucket = _usual_bucket(plan)
    conditionings = []
    for item in (*plan.validation, *plan.train):
        if item.bucket == bucket and not item.prior and len(conditionings) < len(plan.recipe.preview_prompts):
            conditioning = item.show(None).conditioning
            if conditioning.inpaint_mask is None and not plan.recipe.first_frame_probability:
                break
            conditionings.append(conditioning)
    return tuple(conditionings)


def _usual_bucket(plan: Plan) -> tuple[int, int]:
    return usual_bucket([item.bucket for item in plan.train if not item.prior])
