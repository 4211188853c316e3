"""What every method of training offers."""

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
    """A way to make a frozen tree trainable; has no state of its own.

    Attributes:
        name: as the widget and the recipe have it.
        default_targets: which layers, where the user does not say.
        needs_base: whether a file of it can only be made beside the weights it was trained on.
        ranked: whether a rank means anything to it.
        trains_model: whether it moves anything of the model at all.
        max_grad_norm, ema_decay: where the user does not say.
        in_backward: whether the gradients of its trainables, held together, would weigh: each is then moved as soon as
            its gradient is there, wherever that comes to the same.
        network: what kohya's `ss_network_module` and `ss_network_args` say of it.
    """

    name: str
    ranked = True
    default_targets = "attention"
    needs_base = False
    trains_model = True
    max_grad_norm = 1.0
    ema_decay = 0.0
    in_backward = False
    network: tuple[str, dict[str, str]] = ("networks.lora", {})

    def check(self, recipe: Recipe) -> None:
        """Raises SettingsError when the recipe asks for what this method does not have."""

    def scale(self, rank: int, alpha: float) -> float | None:
        """The effective scale of the difference; None where there is no alpha."""
        return None

    def usual_rate(self, family: Family) -> float:
        """The learning rate for AdamW where the user gives none."""
        return family.lora_learning_rate

    def names(self, owner: Denoiser | TextEncoder) -> tuple[Callable[[str], str], Callable[[str], str | None]]:
        """A module path's name in the host's files, and in the model as it is published.

        Args:
            owner: of the tree.
        """
        return owner.adapter_name, owner.published_name

    def matching(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """Paths of the modules in a tree that the recipe's targets take in, those of rank 0 too."""
        return self.targets(module, family, recipe)

    def targets(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """Paths of the modules in a tree that are adapted, sorted."""
        raise NotImplementedError

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Adds the trainables to a private tree and returns them by name, in a stable order.

        Float32, whatever the tree is kept in, unless the recipe says otherwise.
        """
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

    def constants(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """What `inject` put into the tree that is not trained and that a run must find again to the bit."""
        return {}

    def read_later(self, module: nn.Module) -> list[nn.Parameter]:
        """The frozen weights that a file of it is made of, where `needs_base` says so."""
        if not self.needs_base:
            return []
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        return [weight for layer in layers for weight in layer.get_base_layer().parameters()]

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """Which trainables share a learning rate: all, unless a method says otherwise."""
        return [Group(tuple(trainables), recipe.learning_rate)]

    def start(
        self,
        trainables: dict[str, nn.Parameter],
        module: nn.Module,
        adapter: Adapter,
        recipe: Recipe,
        names: tuple[Callable[[str], str], Callable[[str], str | None]],
    ) -> set[str]:
        """Gives the trainables the values of an adapter file; the names of the file's tensors that were taken.

        Args:
            names: of a module in the host's files, and in the model as diffusers published it.

        Raises:
            ModelError: it is of another type, other ranks or other layers.
        """
        raise NotImplementedError

    def export(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        name_of: Callable[[str], str],
        module: nn.Module | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """The adapter file's tensors from the trainables' values (as `inject` names them).

        Args:
            name_of: a module path's name in the file.
            module: the tree they belong to; needed where `needs_base` says so.
        """
        raise NotImplementedError

    def native(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        published_name: Callable[[str], str | None],
        module: nn.Module | None = None,
    ) -> PeftAdapter | None:
        """The same as peft has it, for the formats that want it so; None where there is no such form."""
        return None
