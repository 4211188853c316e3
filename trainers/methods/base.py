"""What every method of training offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..optimisers import Group

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..settings import Recipe


class Method:
    """A way to make a frozen tree trainable; has no state of its own."""

    name: str

    def targets(self, module: nn.Module, family: Family) -> list[str]:
        """Paths of the modules in a tree that are adapted, sorted."""
        raise NotImplementedError

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Adds the trainables to a private tree and returns them by name, float32, in a stable order."""
        raise NotImplementedError

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """Which trainables share a learning rate: all, unless a method says otherwise."""
        return [Group(tuple(trainables), recipe.learning_rate)]

    def export(
        self, tensors: dict[str, torch.Tensor], recipe: Recipe, name_of: Callable[[str], str]
    ) -> dict[str, torch.Tensor]:
        """The adapter file's tensors from the trainables' values (as `inject` names them)."""
        raise NotImplementedError
