"""What every method of training offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..optimisers import Group

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..settings import Recipe


class Method:
    """A way to make a frozen tree trainable; has no state of its own."""

    name: str
    # Whether a rank means anything to it.
    ranked = True

    def targets(self, module: nn.Module, family: Family) -> list[str]:
        """Paths of the modules in a tree that are adapted, sorted."""
        raise NotImplementedError

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Adds the trainables to a private tree and returns them by name, float32, in a stable order."""
        raise NotImplementedError

    @contextmanager
    def switched_off(self, module: nn.Module) -> Iterator[None]:
        """Within it the tree that `inject` was given predicts as the frozen base, to the bit.

        Here for peft's layers, whose own switch is used. Not through peft's `enable_adapters`: that also stops the
        gradients, and those of a group that is over would start again with it.

        Raises:
            SettingsError: the method has nothing of that kind to switch off.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        if not layers:
            raise SettingsError(
                f"The frozen base cannot be asked while {self.name} is trained.",
                "Preserve the class by class images instead.",
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

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """Which trainables share a learning rate: all, unless a method says otherwise."""
        return [Group(tuple(trainables), recipe.learning_rate)]

    def export(
        self, tensors: dict[str, torch.Tensor], recipe: Recipe, name_of: Callable[[str], str]
    ) -> dict[str, torch.Tensor]:
        """The adapter file's tensors from the trainables' values (as `inject` names them)."""
        raise NotImplementedError
