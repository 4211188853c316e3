"""The interface that every training method implements, and the method that trains nothing in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..optimizers import Group

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..formats.adapter import Adapter
    from ..formats.peft_format import PeftAdapter
    from ..protocols import Denoiser, TextEncoder
    from ..recipe.recipe import Recipe


class Method:
    """A way to add trainable parameters to a frozen module. It has no state of its own.

    Attributes:
        name: the name in the widget and in the recipe.
        ranked: whether the method uses a rank.
        default_targets: the target layers if the user sets none.
        needs_base: whether an export needs the weights that the method was trained on.
        trains_model: whether the method changes the model. False if only an embedding is trained.
        max_grad_norm, ema_decay: defaults if the user sets none.
        in_backward: whether all gradients together would take much memory. If so, the optimizer updates each parameter
            as soon as its gradient is ready, wherever that gives the same result.
        is_linear: whether the difference is proportional to the strength at which an adapter is applied, and its layers
            can scale it, see `scaled`.
    """

    name: str
    ranked = True
    default_targets = "attention"
    needs_base = False
    trains_model = True
    max_grad_norm = 1.0
    ema_decay = 0.0
    in_backward = False
    is_linear = False

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError if the recipe sets an option that this method does not have."""

    def reads_base(self, recipe: Recipe) -> bool:
        """Return True if an export needs the weights that the method was trained on."""
        return self.needs_base

    def scale(self, rank: int, alpha: float) -> float | None:
        """Return the effective scale of the difference, or None if the method has no alpha."""
        return None

    def usual_rate(self, family: Family) -> float:
        """Return the default learning rate for AdamW."""
        return family.lora_learning_rate

    def names(self, owner: Denoiser | TextEncoder) -> tuple[Callable[[str], str], Callable[[str], str | None]]:
        """Return two functions that name a module path: in ComfyUI's files, and in the model as diffusers published it.

        Args:
            owner: the model that the module belongs to.
        """
        return owner.adapter_name, owner.published_name

    def matching(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """List the paths of the modules that the recipe's targets match, including those of rank 0."""
        return self.targets(module, family, recipe)

    def targets(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """List the paths of the modules to adapt, sorted."""
        raise NotImplementedError

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Add the trainables to a private module and return them by name, in a stable order.

        They are float32, whatever the module's dtype, unless the recipe sets another dtype.
        """
        raise NotImplementedError

    @contextmanager
    def switched_off(self, module: nn.Module) -> Iterator[None]:
        """Make the module that `inject` changed predict as the frozen base within the block, bit for bit.

        This version serves peft's layers: it sets their own switch. It does not call peft's `enable_adapters`, which
        also turns gradients off and on: parameters of a group that has ended would get gradients again.

        Raises:
            SettingsError: the module has no peft layers to switch off.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        if not layers:
            raise SettingsError(
                f"{self.name} cannot give the prediction of the frozen base during training.",
                "Use class images for prior preservation instead.",
                "prior",
            )
        before = [layer.disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, off in zip(layers, before, strict=True):
                layer._disable_adapters = off

    @contextmanager
    def scaled(self, module: nn.Module, factor: float) -> Iterator[None]:
        """Multiply the difference of the module that `inject` changed by a factor within the block.

        Use it only if `is_linear` is set. The backward must run within the block too: checkpointed blocks are
        recomputed there.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        before = [layer.scaling["default"] for layer in layers]
        try:
            for layer, scale in zip(layers, before, strict=True):
                self.set_scale(layer, scale * factor)
            yield
        finally:
            for layer, scale in zip(layers, before, strict=True):
                self.set_scale(layer, scale)

    def set_scale(self, layer: nn.Module, scale: float) -> None:
        """Set the scale of the difference that peft's layer adds."""
        layer.scaling["default"] = scale

    def constants(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that `inject` added but does not train. A resumed run needs the same bits."""
        return {}

    def read_later(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the frozen weights that an export reads, or none unless `needs_base` is set."""
        if not self.needs_base:
            return []
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        return [weight for layer in layers for weight in layer.get_base_layer().parameters()]

    def after_step(self, trainables: dict[str, nn.Parameter], module: nn.Module, recipe: Recipe) -> None:
        """Change the trainables after an optimizer step."""

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """Group the trainables by learning rate. By default they form one group."""
        return [Group(tuple(trainables), recipe.learning_rate)]

    def start(
        self,
        trainables: dict[str, nn.Parameter],
        module: nn.Module,
        adapter: Adapter,
        recipe: Recipe,
        names: tuple[Callable[[str], str], Callable[[str], str | None]],
    ) -> set[str]:
        """Copy an adapter file's values into the trainables and return the names of the tensors that were used.

        Args:
            names: functions that name a module in ComfyUI's files, and in the model as diffusers published it.

        Raises:
            ModelError: the file has another type, other ranks or other layers.
        """
        raise NotImplementedError

    def export(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        name_of: Callable[[str], str],
        module: nn.Module | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """Return the tensors of the adapter file, given the values of the trainables (named as by `inject`).

        Args:
            name_of: function from a module path to its name in the file.
            module: the module that the trainables belong to. Required if `needs_base` is set.
        """
        raise NotImplementedError

    def native(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        published_name: Callable[[str], str | None],
        module: nn.Module | None = None,
    ) -> PeftAdapter | None:
        """Return the export in peft's format for the formats that need it, or None if peft has no such format."""
        return None


# Options of adapters, with their values if the user sets none.
_OF_ADAPTERS = {
    "alpha": 0.0,
    "target_patterns": (),
    "targets": "attention",
    "dropout": 0.0,
    "block_ranks": (),
    "block_learning_rates": (),
    "lora_plus_ratio": 1.0,
    "adapter_args": (),
    "text_encoder": False,
    "start_from": "",
}


class NoMethod(Method):
    """No adapter: the model stays frozen while an embedding is trained."""

    name = "embedding"
    ranked = False
    trains_model = False

    def check(self, recipe):
        """Raise SettingsError if the recipe sets an option of adapters."""
        for field, unset in _OF_ADAPTERS.items():
            if getattr(recipe, field) != unset:
                raise SettingsError(
                    f"{field} is set, but this node trains no adapter: it would have no effect.",
                    "Remove Graft Adapter Options from this node's options.",
                    "options",
                )

    def targets(self, module, family, recipe):
        """Return no targets."""
        return []

    def inject(self, module, targets, recipe):
        """Add nothing."""
        return {}

    def groups(self, trainables, recipe):
        """Return no groups."""
        return []
