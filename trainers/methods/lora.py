"""LoRA: a low-rank difference on each adapted layer (Hu et al. 2021), with peft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..formats.keys import ALPHA, DOWN, UP
from ..formats.keys import MID as FILE_MID
from ..formats.kohya import lora_tensors, plain_factors
from ..optimizers import Group
from .arguments import BESIDE, STRUCTURE_DROPOUT, value_of
from .peft_method import PeftMethod
from .targets import CONV, LINEAR, POINT, Layer, alphas_of, parse_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


# Name of the Tucker core of a convolution in peft's layer.
MID = "lora_mid"


def parts_of(layer: nn.Module) -> tuple:
    """Return (frozen layer, A, B, dropout, scale) of peft's LoRA layer."""
    return (
        layer.base_layer,
        layer.lora_A["default"],
        layer.lora_B["default"],
        layer.lora_dropout["default"],
        layer.scaling["default"],
    )


def in_dtype_of(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Return what A or B makes of x, computed in the dtype of x."""
    from torch.nn.functional import linear

    weight = module.weight.to(x.dtype)
    return linear(x, weight) if weight.dim() == 2 else module._conv_forward(x, weight, None)


class LoRA(PeftMethod):
    """W + (alpha / rank) B A, with B zero at the start."""

    name = "LoRA"
    kinds = frozenset({LINEAR, POINT, CONV})
    zero_init = frozenset({"lora_B"})
    lora_plus_params = frozenset({"lora_B"})
    scale_param = "lora_B"
    has_dropout = True
    arguments = ("rank_dropout", "module_dropout", "scale_weight_norms", "use_tucker", "lora_fa", "eva", *BESIDE)
    is_linear = True
    variant: dict[str, Any] = {}

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Inject as every peft type does. Each forward of the module casts the trainables to the dtype of its input."""
        from ..lowrank.layers import StepWeights, low_rank_layers

        trainables = super().inject(module, targets, recipe)
        layers = list(low_rank_layers(module).values())
        if layers:
            module.register_forward_pre_hook(StepWeights(layers))
        return trainables

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoRA configuration, in this type's variant."""
        from peft import LoraConfig

        return LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            rank_pattern=ranks,
            alpha_pattern=alphas_of(ranks, recipe),
            lora_dropout=recipe.dropout,
            **self.variant,
        )

    def prepare(self, layer: nn.Module, recipe: Recipe) -> None:
        """Add the core of use_tucker."""
        if value_of(recipe, "use_tucker"):
            add_core(layer)

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer by one of fewer operations. The layer belongs to the private module."""
        if has_other_forward(layer, recipe):
            layer.forward = make_forward(layer, recipe)
            return
        from ..lowrank.layers import LowRankLayer

        layer.low_rank = LowRankLayer(*parts_of(layer))
        layer.forward = layer.low_rank

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """Group as all types do. With lora_fa, A is frozen from the first step (Zhang et al. 2023)."""
        groups = super().groups(trainables, recipe)
        if not value_of(recipe, "lora_fa"):
            return groups
        split = []
        for group in groups:
            frozen = tuple(name for name in group.names if parse_name(name).stem == "lora_A")
            others = tuple(name for name in group.names if name not in frozen)
            split += [replace(group, names=others)] * bool(others)
            split += [replace(group, names=frozen, until=0)] * bool(frozen)
        return split

    def after_step(self, trainables: dict[str, nn.Parameter], module: nn.Module, recipe: Recipe) -> None:
        """Limit the norm of each layer's difference with scale_weight_norms."""
        most = value_of(recipe, "scale_weight_norms")
        names = [parse_name(name) for name in trainables] if most else []
        for path in (name.path for name in names if name.stem == "lora_A"):
            limit_norm(module.get_submodule(path), most)

    def set_scale(self, layer: nn.Module, scale: float) -> None:
        """Set the scale for peft and for the forward that replaces peft's."""
        super().set_scale(layer, scale)
        if hasattr(layer, "low_rank"):
            layer.low_rank.scale = scale

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return kohya's tensors, with the alpha that gives this layer's scale as alpha / rank."""
        values = self.peft_layer(layer)
        return lora_tensors(values["lora_A"], values["lora_B"], layer.scale * layer.rank)

    def peft_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return the trainables, with a Tucker core as a part of A, because readers rebuild cores differently."""
        if MID not in layer.values:
            return layer.values
        down = plain_down(layer.values["lora_A"], layer.values[MID])
        return {"lora_A": down, "lora_B": layer.values["lora_B"]}

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return A and B, and the scale that the file's alpha gives them."""
        if not {UP, DOWN} <= tensors.keys() <= {UP, DOWN, FILE_MID, ALPHA}:
            return None
        down, up, scale = plain_factors(tensors)
        return {"lora_A": down, "lora_B": up}, scale

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """Fill up a smaller rank: with the start values of A, and with zeros of B."""
        import torch

        own_a, a, b = layer.lora_A["default"].weight, values["lora_A"], values["lora_B"]
        rank = len(a)
        if rank >= len(own_a) or a[0].numel() != own_a[0].numel():
            return values
        a = torch.cat([a.view(rank, *own_a.shape[1:]).to(own_a), own_a[rank:].detach()])
        more = b.new_zeros(len(b), len(own_a) - rank, *b.shape[2:])
        return {**values, "lora_A": a, "lora_B": torch.cat([b, more], dim=1)}


class LoCon(LoRA):
    """LoRA whose default targets are all linear layers and convolutions."""

    name = "LoRA with conv"
    default_targets = "linear + conv"


class RsLoRA(LoRA):
    """LoRA with the scale alpha / sqrt(rank). Its file says alpha * sqrt(rank), because readers divide by the rank."""

    name = "rsLoRA"
    variant = {"use_rslora": True}

    def scale(self, rank: int, alpha: float) -> float:
        """Return alpha / sqrt(rank)."""
        return alpha / rank**0.5


def has_other_forward(layer: nn.Module, recipe: Recipe) -> bool:
    """Return True if a layer's forward differs from that of a plain LoRA during training."""
    return hasattr(layer, MID) or bool(value_of(recipe, "rank_dropout") or value_of(recipe, "module_dropout"))


def add_core(layer: nn.Module) -> None:
    """Add the Tucker core [r, r, kh, kw] of a convolution, whose A becomes [r, in, 1, 1]; leave other layers."""
    import torch
    from torch import nn

    down = layer.lora_A["default"].weight
    rank, inputs, *kernel = down.shape
    if kernel and kernel != [1, 1]:
        layer.lora_A["default"] = nn.Conv2d(inputs, rank, 1, bias=False, device=down.device)
        core = nn.Parameter(torch.empty(rank, rank, *kernel, device=down.device))
        setattr(layer, MID, nn.ParameterDict({"default": core}))


def plain_down(down: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Return the A [r, in, kh, kw] of the same difference without a core."""
    import torch

    return torch.einsum("rshw,si->rihw", core, down.flatten(1))


def make_forward(layer: nn.Module, recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the forward of a layer with a core or with dropped ranks."""
    from .dropout import structure_dropout

    base, down, up, drop, _ = parts_of(layer)
    dropout, core = structure_dropout(recipe), getattr(layer, MID, None)
    if dropout is not None:
        layer.add_module(STRUCTURE_DROPOUT, dropout)

    def forward(x: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import conv2d

        middle = drop(x)
        if core is None:
            middle = in_dtype_of(middle, down)
        else:
            middle = conv2d(middle, down.weight.to(x.dtype))
            middle = conv2d(middle, core["default"].to(x.dtype), None, base.stride, base.padding, base.dilation)
        middle = middle * layer.scaling["default"]
        if dropout is not None:
            middle = dropout.ranks(middle)
        # The frozen layer last: checkpointing then does not recompute it at a block's end.
        change = in_dtype_of(middle, up)
        out = base(x)
        return out + change.to(out.dtype)

    return forward


def limit_norm(layer: nn.Module, most: float) -> None:
    """Shrink A and B so that |s B A| is at most `most`, as `scale_weight_norms` of sd-scripts does."""
    import torch

    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        whole = plain_down(down, getattr(layer, MID)["default"]) if hasattr(layer, MID) else down
        # |B A|^2 from two [r, r] matrices.
        a, b = whole.flatten(1).float(), up.flatten(1).float()
        norm = ((a @ a.t()) * (b.t() @ b)).sum().clamp_min(0).sqrt() * abs(layer.scaling["default"])
        ratio = (most / norm).clamp(max=1.0)
        trained = [weight for weight in (down, up) if weight.requires_grad]
        for weight in trained:
            weight.mul_(ratio ** (1 / len(trained)))
