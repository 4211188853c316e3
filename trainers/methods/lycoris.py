"""LyCORIS' types that peft computes as a whole difference.

LoHa is an elementwise product of two low-rank differences (Hyeon-Woo et al. 2022). LoKr is a Kronecker product, its
larger factor of low rank (Yeh et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..formats.keys import DORA
from .arguments import BESIDE, STRUCTURE_DROPOUT, value_of
from .dora import decomposed, host_magnitude, row_squares
from .peft_method import PeftMethod
from .targets import CONV, LINEAR, POINT, Layer, alphas_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..formats.peft_format import PeftAdapter
    from ..recipe.recipe import Recipe


def _forward(layer: nn.Module, delta: Callable[[nn.Module], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward that multiplies by the difference of the weight in the dtype of the input.

    peft casts the input to the dtype of the trainables instead, and so computes and keeps activations in float32.
    """
    from torch.nn.functional import conv2d, linear

    base, dropout, magnitude = layer.base_layer, getattr(layer, STRUCTURE_DROPOUT, None), getattr(layer, DORA, None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        difference = delta(layer)
        if dropout is not None:
            difference = dropout.rows(difference)
        out = base(x)
        given = difference.to(x.dtype)
        if given.dim() == 2:
            change = linear(x, given)
        else:
            change = conv2d(x, given, None, base.stride, base.padding, base.dilation)
        if magnitude is None:
            return out + change.to(out.dtype)
        weight = base.weight.detach().to(difference.dtype)
        squares = (weight + difference).flatten(1).square().sum(1)
        return decomposed(base, out, change, magnitude["default"], squares)

    return forward


class LycorisMethod(PeftMethod):
    """A type of LyCORIS. With dora_wd it trains m (W + D) / |W + D| by row (Liu et al. 2024)."""

    kinds = frozenset({LINEAR, POINT, CONV})
    arguments = ("dora_wd", "use_tucker", "rank_dropout", "module_dropout", *BESIDE)
    is_linear = True

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError also for a slider with dora_wd, whose effect is not proportional to the strength."""
        super().check(recipe)
        if recipe.slider_strength and value_of(recipe, "dora_wd"):
            raise SettingsError(
                "dora_wd is set, but its effect is not proportional to the strength, so a slider cannot use it.",
                "Leave dora_wd out of adapter_args.",
                "adapter_args",
            )

    def reads_base(self, recipe: Recipe) -> bool:
        """Return True if an export needs the frozen weights: for magnitudes."""
        return self.needs_base or bool(value_of(recipe, "dora_wd"))

    def read_later(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the frozen weights that an export reads."""
        layers = [layer for layer in module.modules() if hasattr(layer, DORA)]
        return super().read_later(module) or [weight for layer in layers for weight in layer.base_layer.parameters()]

    def prepare(self, layer: nn.Module, recipe: Recipe) -> None:
        """Add the magnitudes of dora_wd."""
        from torch import nn

        if value_of(recipe, "dora_wd"):
            squares = row_squares(layer)
            shape = [-1, *[1] * (layer.base_layer.weight.dim() - 1)]
            setattr(layer, DORA, nn.ParameterDict({"default": nn.Parameter(squares.sqrt().view(shape))}))

    def start_value(self, stem: str, layer: nn.Module, shape: torch.Size, seed: int, name: str) -> torch.Tensor:
        """Start magnitudes at the norms of the rows."""
        if stem == DORA:
            return row_squares(layer).sqrt().view(shape)
        return super().start_value(stem, layer, shape, seed, name)

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer. The layer belongs to the private module."""
        from .dropout import structure_dropout

        dropout = structure_dropout(recipe)
        if dropout is not None:
            layer.add_module(STRUCTURE_DROPOUT, dropout)
        layer.forward = _forward(layer, self.delta)

    def delta(self, layer: nn.Module) -> torch.Tensor:
        """Return the difference of peft's layer for training, [out, in, ...]."""
        return layer.get_delta_weight("default")

    def difference(self, layer: Layer) -> torch.Tensor:
        """Return the difference of a layer's weight, [out, in, ...]."""
        raise NotImplementedError

    def host_magnitudes(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return the magnitudes for ComfyUI's formula, or nothing without dora_wd."""
        if DORA not in layer.values:
            return {}
        return {DORA: host_magnitude(layer, layer.values[DORA], self.difference(layer))}

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return the factors, the magnitudes of rows, and the scale of the difference."""
        factors = self.factors_of_host({end: tensor for end, tensor in tensors.items() if end != DORA})
        magnitude = tensors.get(DORA)
        if factors is None or magnitude is None:
            return factors
        return {**factors[0], DORA: magnitude.float()}, factors[1]

    def factors_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return the factors and their scale, or None if the file does not fix them."""
        raise NotImplementedError

    def native(
        self, tensors: dict[str, torch.Tensor], recipe: Recipe, published_name: Any, module: nn.Module | None = None
    ) -> PeftAdapter | None:
        """Return peft's form, or None with dora_wd, which peft has for LoRA alone."""
        return None if value_of(recipe, "dora_wd") else super().native(tensors, recipe, published_name, module)


_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


class LoHa(LycorisMethod):
    """W + (alpha / rank) (w1_a w1_b) * (w2_a w2_b), with w2_b zero at the start."""

    name = "LoHa"
    scale_param = "hada_w2_b"
    zero_init = frozenset({"hada_w2_b"})

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoHa configuration. Without use_tucker, convolutions become flat matrices."""
        from peft import LoHaConfig

        return LoHaConfig(
            r=recipe.rank,
            alpha=recipe.alpha,
            rank_pattern=ranks,
            alpha_pattern=alphas_of(ranks, recipe),
            use_effective_conv2d=value_of(recipe, "use_tucker", False),
        )

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LyCORIS's tensors, with alpha. Tucker cores become a part of flat factors."""
        import torch

        factors = {name: tensor.contiguous() for name, tensor in _flat_factors(layer.values).items()}
        return {**factors, "alpha": torch.tensor(layer.alpha), **self.host_magnitudes(layer)}

    def delta(self, layer: nn.Module) -> torch.Tensor:
        """Return the difference. With cores it is not peft's, whose gradients of hada_w1_a and hada_w2_a are wrong."""
        if "default" not in layer.hada_t1:
            return super().delta(layer)
        factors = {name: getattr(layer, name)["default"] for name in (*_FACTORS, *_CORES)}
        w1_a, w1_b, w2_a, w2_b = _flat_factors(factors).values()
        return (layer.scaling["default"] * (w1_a @ w1_b) * (w2_a @ w2_b)).view(layer.base_layer.weight.shape)

    def difference(self, layer: Layer) -> torch.Tensor:
        """Return the difference of a layer's weight, [out, in * kh * kw]."""
        w1_a, w1_b, w2_a, w2_b = (_flat_factors(layer.values)[name].double() for name in _FACTORS)
        return layer.scale * (w1_a @ w1_b) * (w2_a @ w2_b)

    def factors_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return the factors and the scale that the file's alpha gives them."""
        if not {*_FACTORS} <= tensors.keys() <= {*_FACTORS, *_CORES, "alpha"}:
            return None
        values = _flat_factors({name: tensor.float() for name, tensor in tensors.items() if name != "alpha"})
        strength = float(tensors["alpha"]) / values["hada_w1_b"].shape[0] if "alpha" in tensors else 1.0
        return values, strength

    def values_of_peft(
        self, values: dict[str, torch.Tensor], config: dict[str, Any], layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Return the factors, flat ones also of an adapter with `use_effective_conv2d`, unless this run has cores."""
        return values if "default" in layer.hada_t1 else _flat_factors(values)


def _flat_factors(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return flat factors of the same rank: a Tucker core [r, r, kh, kw] becomes a part of the second factor."""
    import torch

    flat = {name: values[name] for name in _FACTORS if name in values}
    for core, first, second in zip(_CORES, _FACTORS[::2], _FACTORS[1::2], strict=True):
        if core in values:
            flat[first] = values[first].t()
            flat[second] = torch.einsum("mn...,ni->mi...", values[core], values[second]).flatten(1)
    return flat


# Bits of a rank with which peft decomposes no factor. Configurations have no larger one.
_WHOLE = 20
# Largest part of a factor beyond the run's rank that is only rounding.
_ROUNDING = 1e-5


class LoKr(LycorisMethod):
    """W + (alpha / rank) w1 (x) w2, with w1 zero at the start."""

    name = "LoKr"
    scale_param = "lokr_w1"
    zero_init = frozenset({"lokr_w1", "lokr_w1_a"})
    arguments = ("factor", "full_matrix", "decompose_both", *LycorisMethod.arguments)
    needs_base = True

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoKr configuration."""
        from peft import LoKrConfig

        # A power of two keeps the scale's bits.
        largest = max([recipe.rank, *ranks.values()])
        times = 1 << (_WHOLE - largest.bit_length()) if value_of(recipe, "full_matrix") else 1
        return LoKrConfig(
            r=times * recipe.rank,
            alpha=times * recipe.alpha,
            rank_pattern={path: times * rank for path, rank in ranks.items()},
            alpha_pattern={path: times * alpha for path, alpha in alphas_of(ranks, recipe).items()},
            use_effective_conv2d=value_of(recipe, "use_tucker", False),
            decompose_both=value_of(recipe, "decompose_both", False),
            decompose_factor=value_of(recipe, "factor", -1),
        )

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LyCORIS's tensors, with the scale in the first factor: readers ignore alpha beside two whole factors.

        alpha is the rank, which is a scale of one. LyCORIS cannot load a layer without it.

        The second factor of a convolution is written whole, [out, in, kh, kw], because readers rebuild its
        decompositions differently.
        """
        import torch

        tensors = {name: tensor for name, tensor in layer.values.items() if name != DORA}
        first = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
        tensors[first] = tensors[first] * layer.scale
        kernel = layer.adapted.base_layer.weight.shape[2:]
        if kernel:
            tensors = _whole_factors(tensors)
        if kernel and "lokr_w2" not in tensors:
            a, b = tensors.pop("lokr_w2_a"), tensors.pop("lokr_w2_b")
            tensors["lokr_w2"] = (a @ b).view(a.shape[0], -1, *kernel)
        return {**tensors, "alpha": torch.tensor(float(layer.rank)), **self.host_magnitudes(layer)}

    def difference(self, layer: Layer) -> torch.Tensor:
        """Return the difference of a layer's weight, [out, in, ...]."""
        import torch

        factors = _whole_factors({name: tensor.double() for name, tensor in layer.values.items()})
        second = factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_a"] @ factors["lokr_w2_b"]
        shape, first = layer.adapted.base_layer.weight.shape, factors["lokr_w1"]
        # A convolution's second factor is [out, in * kh * kw].
        second = second.view(len(second), -1, *shape[2:])
        first = first.view(*first.shape, *[1] * (second.dim() - 2))
        return layer.scale * torch.kron(first, second).reshape(shape)

    def factors_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return two factors and their scale: alpha / rank, or 1 without a decomposition."""
        kinds = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
        if not all(any(kind <= tensors.keys() for kind in pair) for pair in kinds):
            return None
        if not tensors.keys() <= {"alpha", "lokr_t2"}.union(*kinds[0], *kinds[1]):
            return None
        ranked = next((tensors[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors), None)
        scale = float(tensors["alpha"]) / len(ranked) if "alpha" in tensors and ranked is not None else 1.0
        return _whole_factors({name: tensor.float() for name, tensor in tensors.items() if name != "alpha"}), scale

    def values_of_peft(
        self, values: dict[str, torch.Tensor], config: dict[str, Any], layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Return two whole factors, unless this run has the second one's core."""
        first = _whole_factors({name: values[name] for name in values if "w1" in name})
        if "default" in layer.lokr_t2 and "lokr_t2" in values:
            return {**{name: values[name] for name in values if "w2" in name or "t2" in name}, **first}
        return _whole_factors(values)

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """Factor a whole factor if this run trains it as a product and its rank allows that without loss."""
        values = dict(values)
        for name in ("lokr_w1", "lokr_w2"):
            if name in values and "default" in getattr(layer, f"{name}_a"):
                pair = _factored(values[name].flatten(1), layer.r["default"])
                if pair is not None:
                    del values[name]
                    values[f"{name}_a"], values[f"{name}_b"] = pair
        return values


def _factored(whole: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return two factors of a matrix, [out, r] and [r, in], or None if its rank is larger."""
    import torch

    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    if s[rank:].norm() > _ROUNDING * s.norm():
        return None
    # A smaller matrix has fewer singular values than the run's rank.
    root = s[:rank].sqrt()
    left, right = u.new_zeros(len(u), rank), v.new_zeros(rank, v.shape[1])
    left[:, : len(root)], right[: len(root)] = u[:, :rank] * root, root[:, None] * v[:rank]
    return left, right


def _whole_factors(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the whole first factor, and the whole second factor if it has a Tucker core [r, r, kh, kw]."""
    import torch

    plain = dict(values)
    if "lokr_w1_a" in plain:
        plain["lokr_w1"] = plain.pop("lokr_w1_a") @ plain.pop("lokr_w1_b")
    if "lokr_t2" in plain:
        core, left, right = (plain.pop(name) for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        plain["lokr_w2"] = torch.einsum("mn...,mo,ni->oi...", core, left, right)
    return plain
