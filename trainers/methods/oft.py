"""OFT (Qiu et al. 2023) and BOFT (Liu et al. 2024): rotations of blocks of a layer's inputs, with peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from .adapter_files import APPLY, mismatch
from .peft_method import PeftMethod
from .targets import LINEAR, POINT, Layer, largest_divisor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


class Rotation(PeftMethod):
    """An orthogonal change of a weight. The recipe's rank is the size of the rotated blocks.

    peft rotates the inputs of a layer. ComfyUI's key for such adapters rotates outputs, so the export holds the full
    difference.
    """

    needs_base = True
    has_rank = False

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError if the block size is below 2: a block of one cannot rotate."""
        super().check(recipe)
        if recipe.rank < 2:
            raise SettingsError(
                f"{self.name} rotates blocks of `rank` inputs, but rank is {recipe.rank}.",
                "Set rank to 2 or more.",
                "rank",
            )

    def changed(self, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight [out, in] that peft's layer computes from its current trainables."""
        raise NotImplementedError

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return the full difference."""
        import torch

        weight = layer.weight()
        with torch.no_grad(), _holding(layer):
            flat = self.changed(layer.adapted, weight.flatten(1))
        return {"diff": flat.view_as(weight) - weight}


@contextmanager
def _holding(layer: Layer) -> Iterator[None]:
    """Put the exported values into peft's layer within the block. They may be an average of its trainables."""
    held = {}
    for name, parameter in layer.adapted.named_parameters():
        stem = name.split(".")[0]
        if stem in layer.values:
            held[name] = (parameter, parameter.data)
            # peft's layer has index tables on its device, so the values must be there as well.
            parameter.data = layer.values[stem].to(parameter.device)
    try:
        yield
    finally:
        for parameter, data in held.values():
            parameter.data = data


# Largest error of approximate rotations, relative to what they change.
_MOST_DRIFT = 1e-3


class OFT(Rotation):
    """W R, where R has Cayley's form and is the identity at the start."""

    name = "OFT"
    # On larger kernels, peft's OFT is not the identity at the start.
    kinds = frozenset({LINEAR, POINT})
    zero_init = frozenset({"oft_R"})

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's OFT configuration with exact orthogonality.

        peft's series approximation (Cayley-Neumann) calls `R.add_()` without using its result. Under `OutOfPlace` that
        addition has no effect.
        """
        from peft import OFTConfig

        return OFTConfig(r=0, oft_block_size=recipe.rank, use_cayley_neumann=False)

    def values_of_peft(
        self, values: dict[str, torch.Tensor], config: dict[str, Any], layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Return the rotation of each block, also of an adapter that limits its rotations or shares one of them.

        Raises:
            ModelError: the adapter approximates its rotations, and this run's exact ones differ.
        """
        rotation, angles = layer.oft_R["default"], values.get("oft_R")
        count, size = rotation.weight.shape
        if angles is None or angles.shape[-1:] != (size,):
            return values
        if config.get("coft"):
            angles = rotation._project_batch(angles, eps=config["eps"])
        if config.get("use_cayley_neumann"):
            terms = config.get("num_cayley_neumann_terms", 5)
            approximate = rotation._cayley_batch(angles, rotation.block_size, True, terms)
            # peft's series rotates the other way than its exact form.
            angles = -angles
            exact = rotation._cayley_batch(angles, rotation.block_size, False)
            drift = approximate - exact
            if drift.norm() > _MOST_DRIFT * (exact - exact.new_ones(rotation.block_size).diag()).norm():
                raise mismatch(
                    f"approximates its rotations by a series of {terms} terms (use_cayley_neumann), and the exact ones "
                    "of this run differ",
                    APPLY,
                )
        return {"oft_R": angles.expand(count, size) if len(angles) == 1 else angles}

    def changed(self, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as peft merges it."""
        return (layer.get_delta_weight("default").cpu() @ weight.t()).t()


def _forward(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward that computes s W R x + b.

    peft subtracts the bias from the output and adds it again, which rounds the output even where s is one.
    """
    base = layer.base_layer

    def forward(x: torch.Tensor) -> torch.Tensor:
        rotation, scale = layer.get_delta_weight("default")
        scale = scale.flatten()
        out = base(x @ rotation.to(x.dtype))
        changed = out * scale
        if base.bias is not None:
            changed = changed + (1 - scale) * base.bias
        return changed.to(out.dtype)

    return forward


class BOFT(Rotation):
    """s W R, the identity at the start.

    It has one butterfly factor, as peft computes it without its CUDA extension. A run must not depend on whether the
    extension is installed.
    """

    name = "BOFT"
    # On 3x3 convolutions peft builds matrices of (9 C)^2 numbers.
    kinds = frozenset({LINEAR})
    zero_init = frozenset({"boft_R"})
    one_init = frozenset({"boft_s"})

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Inject as every peft type does, but compile no extension."""
        with without_compile():
            return super().inject(module, targets, recipe)

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's BOFT configuration, with the largest block up to the rank that divides all widths."""
        from peft import BOFTConfig

        widths = {layer.in_features for layer in layers.values()}
        size = largest_divisor(recipe.rank, *widths)
        if size < 2:
            raise SettingsError(
                f"BOFT needs a block of 2 to {recipe.rank} inputs that divides the widths of all layers "
                f"({', '.join(map(str, sorted(widths)))}), and there is none.",
                "Set another rank, choose fewer targets, or use the type OFT.",
                "rank",
            )
        return BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=1)

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer. The layer belongs to the private module."""
        layer.forward = _forward(layer)

    def changed(self, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as peft merges it."""
        rotation, scale = layer.get_delta_weight("default")
        return (rotation.cpu() @ weight.t()).t() * scale.cpu()


@contextmanager
def without_compile() -> Iterator[None]:
    """Keep peft from building a CUDA extension, which computes the same with one butterfly factor."""
    from peft.tuners.boft import layer

    kept = layer.get_fbd_cuda
    layer.get_fbd_cuda = lambda: None
    try:
        yield
    finally:
        layer.get_fbd_cuda = kept
