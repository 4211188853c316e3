"""Preview pictures, sampled with the trainables during training."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from ..memory.oom import in_one_line, is_out_of_memory
from ..protocols import PreviewRequest, PreviewSkipped

if TYPE_CHECKING:
    from PIL import Image

    from ..protocols import Conditioning, Host
    from ..runs.run import Run
    from .plan import Plan

log = logging.getLogger(__name__)


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
    recipe = plan.recipe
    request = PreviewRequest(
        prompts=recipe.preview_prompts,
        size=_usual_bucket(plan),
        steps=recipe.preview_steps,
        cfg=recipe.preview_cfg,
        sampler_name=recipe.preview_sampler,
        scheduler=recipe.preview_scheduler,
        seed=recipe.preview_seed,
        beside=_beside(plan),
    )
    try:
        pictures = _drawn(host, request)
    except PreviewSkipped:
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = in_one_line(error)
        log.warning("Graft: memory ran out in the previews of step %d (%s). Graft skipped them.", step, said)
        run.log({"event": "memory", "step": step, "done": "skipped the previews", "said": said})
        return
    paths = run.save_samples(step, pictures)
    run.log({"event": "sample", "step": step, "files": [os.path.basename(path) for path in paths]})
    host.report("sample", {"step": step, "paths": paths, "pictures": pictures})


def _drawn(host: Host, request: PreviewRequest) -> list[Image.Image]:
    """Sample the pictures. After an out-of-memory error, move everything else off the device and try once more."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return host.denoiser.preview(request)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        host.denoiser.make_room()
        host.group.reset_after_failure()
        return host.denoiser.preview(request)


def _beside(plan: Plan) -> tuple[Conditioning, ...]:
    """Return conditionings for the previews of a model that takes a source image or an inpaint mask; else none.

    They come from the first dataset items of the most common bucket, validation items first.
    """
    bucket = _usual_bucket(plan)
    found = []
    for item in (*plan.validation, *plan.train):
        if item.bucket == bucket and not item.prior and len(found) < len(plan.recipe.preview_prompts):
            one = item.show(None).conditioning
            if one.source is None and one.inpaint_mask is None:
                break
            found.append(one)
    return tuple(found)


def _usual_bucket(plan: Plan) -> tuple[int, int]:
    buckets = [item.bucket for item in plan.train if not item.prior]
    return max(sorted(set(buckets)), key=buckets.count)
