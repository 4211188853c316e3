"""GLoRA: a low-rank difference, and one that is relative to the weight (Chavan et al. 2023), as LyCORIS has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..formats.keys import ALPHA
from .arguments import BESIDE
from .peft_method import PeftMethod
from .targets import CONV, LINEAR, POINT, Layer, alphas_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe

# Names in LyCORIS' file: a2 and b2 map inputs to the rank, a1 and b1 map the rank back.
_FILE = {"glora_a1": "a1.weight", "glora_a2": "a2.weight", "lora_B": "b1.weight", "lora_A": "b2.weight"}
_RANK_AXIS = {"glora_a1": 1, "glora_a2": 0, "lora_B": 1, "lora_A": 0}


def _is_ambiguous(values: dict[str, torch.Tensor], rank: int) -> bool:
    return rank == len(values["glora_a1"]) == len(values["lora_B"])


class GLoRA(PeftMethod):
    """W + (alpha / rank) (W a1 a2 + b1 b2), with a1 and b1 zero at the start. b1 and b2 are a LoRA of peft."""

    name = "GLoRA"
    kinds = frozenset({LINEAR, POINT, CONV})
    zero_init = frozenset({"glora_a1", "lora_B"})
    arguments = BESIDE
    is_linear = True

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoRA configuration."""
        from peft import LoraConfig

        return LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, rank_pattern=ranks, alpha_pattern=alphas_of(ranks, recipe)
        )

    def prepare(self, layer: nn.Module, recipe: Recipe) -> None:
        """Add a1 [in, r, ...] and a2 [r, in, ...]."""
        import torch
        from torch import nn

        down = layer.lora_A["default"].weight
        rank, inputs, *kernel = down.shape
        ones = [1] * len(kernel)
        for name, shape in (("glora_a1", (inputs, rank)), ("glora_a2", (rank, inputs))):
            value = nn.Parameter(torch.empty(*shape, *ones, device=down.device))
            setattr(layer, name, nn.ParameterDict({"default": value}))

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer by W (x + s a1 a2 x) + b + s b1 b2 x."""
        from torch.nn.functional import conv2d, linear

        from .lora import in_dtype_of, parts_of

        base, down, up, *_ = parts_of(layer)
        product = linear if down.weight.dim() == 2 else conv2d

        def forward(x: torch.Tensor) -> torch.Tensor:
            scale = layer.scaling["default"]
            inner = product(x, layer.glora_a2["default"].to(x.dtype)) * scale
            change = in_dtype_of(in_dtype_of(x, down) * scale, up)
            out = base(x + product(inner, layer.glora_a1["default"].to(x.dtype)))
            return out + change.to(out.dtype)

        layer.forward = forward

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LyCORIS's tensors, with alpha.

        Readers take a square layer whose rank is its width for one of LyCORIS 1. One more rank of zeros prevents that.
        """
        import torch
        from torch.nn.functional import pad

        values, alpha = layer.values, layer.alpha
        if _is_ambiguous(values, layer.rank):
            values = {stem: pad(v, (0,) * 2 * (v.dim() - 1 - _RANK_AXIS[stem]) + (0, 1)) for stem, v in values.items()}
            alpha *= (layer.rank + 1) / layer.rank
        return {**{_FILE[stem]: value for stem, value in values.items()}, ALPHA: torch.tensor(alpha)}

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return the factors with the scale in a1 and b1, or None for the layout of LyCORIS 1."""
        if not {*_FILE.values()} <= tensors.keys() <= {*_FILE.values(), ALPHA}:
            return None
        values = {stem: tensors[end].float() for stem, end in _FILE.items()}
        rank = len(values["glora_a2"])
        if any(values[stem].shape[1] != rank for stem in ("glora_a1", "lora_B")) or len(values["lora_A"]) != rank:
            return None
        scale = float(tensors[ALPHA]) / rank if ALPHA in tensors else 1.0
        less = {stem: value.narrow(_RANK_AXIS[stem], 0, rank - 1) for stem, value in values.items()}
        if _is_ambiguous(less, rank - 1) and not any(values[stem][:, -1].any() for stem in self.zero_init):
            values = less  # the rank of zeros that `export_layer` added
        return values, scale

    def rescaled(self, values: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
        """Return values with the factor in a1 and b1."""
        return {stem: value * factor if stem in self.zero_init else value for stem, value in values.items()}

    def native(self, tensors: Any, recipe: Recipe, published_name: Any, module: nn.Module | None = None) -> None:
        """Return None: peft's GLoRA has another formula."""
