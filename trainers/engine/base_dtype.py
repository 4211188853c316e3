"""Quantization of the denoiser's frozen weights before training, and what it changes in a prediction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..recipe.options import AS_IT_IS

if TYPE_CHECKING:
    import torch

    from ..preprocessing.items import DatasetItem
    from ..protocols import Host
    from ..recipe.recipe import Recipe

log = logging.getLogger(__name__)


def quantize_base(recipe: Recipe, host: Host, items: Sequence[DatasetItem], offloaded: bool) -> None:
    """Quantize the linear weights of the denoiser's blocks to the recipe's `base_dtype`; do nothing if that is unset.

    Call it before anything is added to the tree, with the blocks' weights off the device. Memory holds at most one
    layer in both forms.

    Args:
        items: the log states how much the prediction for the first one changes; empty to measure nothing.
        offloaded: keep the quantized weights off the device, too.
    """
    if recipe.base_dtype == AS_IT_IS:
        return
    from ..memory.offload import mark_offloaded, onload
    from ..memory.quantization import quantize_linears

    tree, device = host.denoiser.module, host.denoiser.device
    before, size = _predict(recipe, host, items), _bytes_of(tree)
    quantize_linears(tree, recipe.base_dtype, device)
    mark_offloaded(tree, device)
    after = _predict(recipe, host, items)
    log.info(
        "Graft: quantized the model's linear weights to %s: %.2f GB instead of %.2f GB%s.",
        recipe.base_dtype,
        _bytes_of(tree) / 1e9,
        size / 1e9,
        "" if before is None else f"; a prediction differs by {(after - before).norm() / before.norm():.2%}",
    )
    if not offloaded:
        onload(tree, device)


def _predict(recipe: Recipe, host: Host, items: Sequence[DatasetItem]) -> torch.Tensor | None:
    """Return the prediction for the first item; None without items, or if the caption needs a trained embedding."""
    if not items or recipe.embedding_name:
        return None
    from ..memory.offload import fetched
    from ..steps.step import predict_sample

    with fetched(host.denoiser.module, host.denoiser.device):
        return predict_sample(items[0].show(None), recipe, host)


def _bytes_of(tree: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in tree.parameters())
