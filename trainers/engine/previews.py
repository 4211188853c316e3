"""Preview pictures, sampled with the trainables during training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..data.buckets import usual_bucket
from ..memory.oom import in_one_line, is_out_of_memory
from ..protocols import Conditioning, PictureRequest, PreviewSkipped
from ..recipe.prompts import read_prompts

if TYPE_CHECKING:
    from PIL import Image

    from ..protocols import Host
    from ..runs.run import Run
    from ..steps.plan import Plan

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
    paths = run.save_samples(step, pictures)
    run.log({"event": "sample", "step": step, "files": [os.path.basename(path) for path in paths]})
    host.report("sample", {"step": step, "paths": paths, "pictures": pictures})


def _requests(plan: Plan) -> list[PictureRequest]:
    """Return a request for each prompt: its own settings, and those of the recipe for the others."""
    recipe = plan.recipe
    usual, masks = _usual_bucket(plan), _inpaint_masks(plan)
    requests = []
    for index, prompt in enumerate(read_prompts(recipe.preview_prompts)):
        read = plan.previews[index] if plan.previews else None
        given = read() if read is not None else None
        beside = Conditioning({}, sources=given.sources) if given else masks[index % len(masks)] if masks else None
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
            )
        )
    return requests


def _drawn(plan: Plan, host: Host, step: int) -> list[Image.Image]:
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


def _drawing(plan: Plan, host: Host, step: int) -> Callable[[], list[Image.Image]]:
    """Return the function that samples the pictures, on the trained model or on the preview model."""
    requests = _requests(plan)
    if host.preview_model is None:
        draw = partial(host.denoiser.preview, requests)
        return partial(_drawn_rows, plan, draw) if plan.recipe.slider_strength else draw

    def export() -> tuple[Mapping[str, torch.Tensor] | None, Mapping[str, torch.Tensor] | None]:
        products = plan.products(step)
        return products.adapter, products.embedding

    draw = partial(host.preview_model.draw, requests, export)
    return (lambda: _in_rows(draw(factor) for factor in _STRENGTHS)) if plan.recipe.slider_strength else draw


def _drawn_rows(plan: Plan, draw: Callable[[], list[Image.Image]]) -> list[Image.Image]:
    """Draw each picture of a slider at several strengths on the trained model, in a row."""
    columns = []
    for strength in _STRENGTHS:
        with plan.scaled(strength) if strength else plan.switched_off():
            columns.append(draw())
    return _in_rows(columns)


def _in_rows(columns: Iterable[list[Image.Image]]) -> list[Image.Image]:
    """Join the pictures of the columns, row by row."""
    from PIL import Image

    rows = []
    for pictures in zip(*columns, strict=True):
        width, height = pictures[0].size
        row = Image.new("RGB", (len(pictures) * width, height))
        for place, picture in enumerate(pictures):
            row.paste(picture, (place * width, 0))
        rows.append(row)
    return rows


def _inpaint_masks(plan: Plan) -> tuple[Conditioning, ...]:
    """Return conditionings for the previews of a model that takes an inpaint mask; else none.

    They come from the first dataset items of the most common bucket, validation items first.
    """
    bucket = _usual_bucket(plan)
    conditionings = []
    for item in (*plan.validation, *plan.train):
        if item.bucket == bucket and not item.prior and len(conditionings) < len(plan.recipe.preview_prompts):
            conditioning = item.show(None).conditioning
            if conditioning.inpaint_mask is None:
                break
            conditionings.append(conditioning)
    return tuple(conditionings)


def _usual_bucket(plan: Plan) -> tuple[int, int]:
    return usual_bucket([item.bucket for item in plan.train if not item.prior])
