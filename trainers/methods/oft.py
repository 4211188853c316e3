"""OFT: a rotation of each block of a layer's inputs (Qiu et al. 2023), with peft; what BOFT shares with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from .adapter_files import APPLY, mismatch
from .peft_method import PeftMethod
from .targets import LINEAR, POINT, Layer

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
