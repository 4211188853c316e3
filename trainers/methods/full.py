"""All weights of the model, or a part of them: full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ModelError, SettingsError
from ..families import is_trained
from ..formats.full_diff import FullDiff, difference_key
from ..optimizers import Group
from .base import Method
from .patterns import matches, value_for
from .targets import is_target, kind_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..formats.adapter import Adapter
    from ..protocols import Denoiser, TextEncoder
    from ..recipe.recipe import Recipe

# Beside each trained parameter its frozen one is kept under its name with this in front: a buffer, so that it goes
# where the tree goes.
_FROZEN = "frozen_"


class FullFineTune(Method):
    """W itself, in a copy of its own; norms, convolutions and biases too. What is handed on is W - W0.

    The frozen weights stay where they are, shared with the graph's model: they are what the difference is from, and
    what is asked where a class is to be preserved.
    """

    name = "all weights"
    ranked = False
    default_targets = "all weights"
    needs_base = True
    max_grad_norm = 0.0
    ema_decay = 0.999
    in_backward = True

    def check(self, recipe: Recipe) -> None:
        """Refuses what says how an adapter is made."""
        asked = {
            "alpha": recipe.alpha != 0,
            "dropout": recipe.dropout != 0,
            "block_ranks": bool(recipe.block_ranks),
            "lora_plus_ratio": recipe.lora_plus_ratio != 1,
            "text_encoder_rank": recipe.text_encoder_rank != 0,
        }
        for name, refused in asked.items():
            if refused:
                raise SettingsError(
                    f"{name} is set, but all weights are trained and no adapter: it would have no effect.",
                    f"Leave {name} of Graft Adapter Options alone. What is trained is chosen by targets, "
                    "target_patterns and block_learning_rates, where 0 leaves out.",
                    name,
                )

    def usual_rate(self, family: Family) -> float:
        """Far below an adapter's, which starts from nothing."""
        return family.full_learning_rate

    def names(self, owner: Denoiser | TextEncoder) -> tuple[Callable[[str], str], Callable[[str], str | None]]:
        """The model's own paths: only by those does the host find parameters that are no layer's weight."""
        return owner.own_name, owner.published_name

    def matching(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """Modules with parameters of their own that the recipe names."""
        return [path for path, layer in module.named_modules() if _is_meant(path, layer, family, recipe)]

    def targets(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """The modules that hold parameters of their own and that the recipe names, those with a rate of 0 left out.

        Raises:
            ModelError: there is none, or its weights are kept in a form that cannot be moved.
        """
        meant = self.matching(module, family, recipe)
        chosen = [path for path in meant if value_for(path, recipe.block_learning_rates, 1.0) > 0]
        if not chosen:
            raise ModelError(
                f"No weights of the kind '{recipe.targets}' were found in the model ({type(module).__name__}).",
                "Choose other targets or rates. Quantised formats that hide their weights (GGUF, Nunchaku) cannot be "
                "trained; load the original.",
                "model",
            )
        for path in chosen:
            _check_plain(path, module.get_submodule(path))
        return sorted(chosen)

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Trainable copies in the place of the frozen parameters; float32, or bfloat16 where the recipe says so."""
        import torch

        dtype = torch.bfloat16 if recipe.weight_dtype == "bf16" else torch.float32
        wanted = set(targets)
        trainables: dict[str, nn.Parameter] = {}
        copies: dict[int, nn.Parameter] = {}
        for path, owner in module.named_modules():
            if path not in wanted:
                continue
            for leaf, frozen in list(_own(owner)):
                if id(frozen) not in copies:
                    copied = torch.nn.Parameter(frozen.detach().to(dtype, copy=True))
                    copies[id(frozen)] = copied
                    trainables[_joined(path, leaf)] = copied
                owner._parameters[leaf] = copies[id(frozen)]
                owner.register_buffer(_FROZEN + leaf, frozen.detach(), persistent=False)
        return dict(sorted(trainables.items()))

    @contextmanager
    def switched_off(self, module: nn.Module) -> Iterator[None]:
        """Puts the frozen parameters in the place of the trained ones for the block."""
        import torch

        held = []
        for _, owner, leaf, frozen in _frozen_of(module):
            held.append((owner, leaf, owner._parameters[leaf]))
            owner._parameters[leaf] = torch.nn.Parameter(frozen, requires_grad=False)
        try:
            yield
        finally:
            for owner, leaf, trained in held:
                owner._parameters[leaf] = trained

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """By the learning rate of the block."""
        rates: dict[float, list[str]] = {}
        for name in trainables:
            path = name.rpartition(".")[0]
            rate = value_for(path, recipe.block_learning_rates, recipe.learning_rate)
            rates.setdefault(rate, []).append(name)
        return [Group(tuple(names), rate) for rate, names in rates.items()]

    def start(
        self,
        trainables: dict[str, nn.Parameter],
        module: nn.Module,
        adapter: Adapter,
        recipe: Recipe,
        names: tuple[Callable[[str], str], Callable[[str], str | None]],
    ) -> set[str]:
        """The frozen weights and the difference in a file; a weight that it does not name starts as it is.

        Raises:
            ModelError: it is no whole difference, or one of weights that are not trained here.
        """
        import torch

        made_by = adapter.made_by()
        if made_by not in (None, self.name):
            raise _unlike(f"is of the type {made_by}, no difference of whole weights", "Apply it to the model instead.")
        name_of, _ = names
        places = _places(module, name_of)
        found = places.keys() & adapter.keys()
        if not found:
            raise _unlike(f"has nothing for {next(iter(places))} and its like", "Choose its targets.")
        with torch.no_grad():
            for key in sorted(found):
                name, frozen = places[key]
                if adapter[key].numel() != frozen.numel():
                    raise _unlike(f"has {key} in another size", "Choose one that was made for this model.")
                difference = adapter[key].to(frozen.device, torch.float32).view_as(frozen)
                trainables[name].copy_(frozen.float() + difference)
        return set(found)

    def export(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        name_of: Callable[[str], str],
        module: nn.Module | None = None,
    ) -> FullDiff:
        """The differences from the frozen weights in `module`."""
        places = _places(module, name_of)
        return FullDiff({key: (tensors[name], frozen) for key, (name, frozen) in sorted(places.items())})


def _own(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters of real numbers, without those of its parts."""
    for leaf, parameter in layer._parameters.items():
        if parameter is not None and parameter.is_floating_point():
            yield leaf, parameter


def _is_meant(path: str, layer: nn.Module, family: Family, recipe: Recipe) -> bool:
    if not is_trained(path, family) or not any(True for _ in _own(layer)):
        return False
    if recipe.targets == FullFineTune.default_targets:
        return True
    if recipe.targets == "patterns":
        # Norms and bare parameters as well, which are of no kind that an adapter could be put on.
        return matches(path, recipe.target_patterns)
    kind = kind_of(layer)
    return kind is not None and is_target(path, kind, family, recipe)


def _check_plain(path: str, layer: nn.Module) -> None:
    import torch

    for leaf, parameter in _own(layer):
        if type(parameter.data) is not torch.Tensor:
            raise ModelError(
                f"{_joined(path, leaf)} is quantised ({type(parameter.data).__name__}): it cannot be moved.",
                "Load the original model, or train a LoRA.",
                "model",
            )


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _frozen_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(path, module, parameter's own name, its frozen values) of all that is trained."""
    for path, owner in module.named_modules():
        for name, frozen in owner._buffers.items():
            if name.startswith(_FROZEN):
                yield path, owner, name[len(_FROZEN) :], frozen


def _places(module: nn.Module, name_of: Callable[[str], str]) -> dict[str, tuple[str, torch.Tensor]]:
    """By the host's key: (the trainable's name, its frozen values); two keys where layers share a weight."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    first: dict[int, str] = {}
    found = {}
    for path, owner, leaf, frozen in _frozen_of(module):
        name = _joined(path, leaf)
        trained = first.setdefault(id(owner._parameters[leaf]), name)
        found[difference_key(name, names, name_of)] = trained, frozen
    return found


def _unlike(how: str, cure: str) -> ModelError:
    return ModelError(f"The adapter to start from {how}.", cure, "start_from")
