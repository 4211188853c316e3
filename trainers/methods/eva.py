"""EVA: A starts at the main directions of its layer's inputs (Paischer et al. 2024, with rho = 1), by peft's PCA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# Rows of one input that count, evenly spaced. A picture of 1024 x 1024 has 4096.
_ROWS = 2048


class _Inputs:
    """The main directions of a layer's inputs, as a forward pre-hook."""

    def __init__(self, rank: int):
        self.rank = rank
        self.pca: Any = None

    def __call__(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        rows = args[0].detach().reshape(-1, args[0].shape[-1])
        rows = rows[:: max(1, len(rows) // _ROWS)].float()
        if self.rank > min(rows.shape):
            return
        if self.pca is None:
            self.pca = IncrementalPCA(self.rank, lowrank=2 * self.rank <= min(rows.shape), lowrank_seed=0)
        try:
            self.pca.partial_fit(rows)
        except TypeError:
            # It adds in float64, which Apple's devices do not have.
            self.pca.partial_fit(rows.cpu())


def start_at_inputs(modules: Iterable[nn.Module], forward: Callable[[], Any]) -> tuple[int, int]:
    """Set A of the linear LoRA layers in some modules. B stays zero, so the prediction stays the base's.

    A layer with fewer inputs than its rank keeps its random A.

    Args:
        forward: runs the modules on pictures of the dataset.

    Returns:
        The number of layers that were set, and that of all LoRA layers.
    """

    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "lora_A")]
    factors = [layer.lora_A["default"].weight for layer in layers]
    inputs = [_Inputs(len(factor)) for factor in factors]
    hooks = [
        layer.register_forward_pre_hook(seen)
        for layer, factor, seen in zip(layers, factors, inputs, strict=True)
        if factor.dim() == 2
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    for factor, seen in zip(factors, inputs, strict=True):
        if seen.pca is not None:
            factor.detach().copy_(seen.pca.components_)
    return sum(seen.pca is not None for seen in inputs), len(layers)
