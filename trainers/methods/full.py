"""Full fine-tuning of all weights of the model or a selection of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ModelError, SettingsError
from ..families import is_trained
from ..formats.full_diff import FullDiff, difference_key
from ..formats.keys import BIAS, WHOLE
from ..lowrank import PART
from ..optimizers import Group
from .base import Method
from .targets import is_target, kind_of, matches, value_for

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..formats.adapter import Adapter
    from ..protocols import Denoiser, TextEncoder
    from ..recipe.recipe import Recipe

# Prefix of the buffer that keeps a parameter's frozen value beside the trained one. A buffer moves with its module.
_FROZEN = "frozen_"
_APPLY = "Apply it to the model with Graft Apply Adapter instead: it then counts as part of the base."


class FullFineTune(Method):
    """Training of a copy of W, and of norms, convolutions and biases. The export is W - W0.

    The frozen weights stay in memory, shared with the graph's model. The export subtracts them, and prior preservation
    predicts with them.
    """

    name = "all weights"
    ranked = False
    default_targets = "all weights"
    needs_base = True
    max_grad_norm = 0.0
    ema_decay = 0.999
    in_backward = True

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError if the recipe sets an option of adapters."""
        options = {
            "alpha": recipe.alpha != 0,
            "dropout": recipe.dropout != 0,
            "block_ranks": bool(recipe.block_ranks),
            "lora_plus_ratio": recipe.lora_plus_ratio != 1,
            "adapter_args": bool(recipe.adapter_args),
            "text_encoder_rank": recipe.text_encoder_rank != 0,
        }
        for name, refused in options.items():
            if refused:
                raise SettingsError(
                    f"{name} is set, but this node trains all weights, not an adapter: it would have no effect.",
                    f"Leave {name} unset in Graft Adapter Options. Choose the weights with targets, target_patterns "
                    "and block_learning_rates, where 0 excludes.",
                    name,
                )

    def usual_rate(self, family: Family) -> float:
        """Return the family's rate for full fine-tuning, far below an adapter's rate: an adapter starts from zero."""
        return family.full_learning_rate

    def names(self, owner: Denoiser | TextEncoder) -> tuple[Callable[[str], str], Callable[[str], str | None]]:
        """Return functions that give the model's own paths and the published ones.

        ComfyUI finds parameters that are no layer's weight only by the model's own paths.
        """
        return owner.own_name, owner.published_name

    def matching(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """List the modules with own parameters that the recipe's targets match."""
        return [path for path, layer in module.named_modules() if _is_meant(path, layer, family, recipe)]

    def targets(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """List the modules to train: those that `matching` returns, except those with a learning rate of 0.

        Raises:
            ModelError: no module matches, or the weights of one have a form that cannot be trained.
        """
        matched = self.matching(module, family, recipe)
        chosen = [path for path in matched if value_for(path, recipe.block_learning_rates, 1.0) > 0]
        if not chosen:
            raise ModelError(
                f"The model ({type(module).__name__}) has no weights of the kind '{recipe.targets}'.",
                "Choose other targets or rates. Graft cannot train all weights of quantized formats (GGUF, Nunchaku): "
                "load the original checkpoint.",
                "model",
            )
        for path in chosen:
            _check_plain(path, module.get_submodule(path))
        return sorted(chosen)

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Replace the frozen parameters by trainable copies, in float32, or in bfloat16 if the recipe sets it."""
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
        """Put the frozen parameters in the place of the trained ones within the block."""
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

    @contextmanager
    def base_apart(self, module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        """Keep the frozen weights out of the module in the block, so that they stay where they are; yield them."""
        rows = list(_frozen_of(module))
        for _, owner, leaf, _ in rows:
            del owner._buffers[_FROZEN + leaf]
        try:
            yield {_joined(path, leaf): frozen for path, _, leaf, frozen in rows}
        finally:
            for _, owner, leaf, frozen in rows:
                owner.register_buffer(_FROZEN + leaf, frozen, persistent=False)

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """Group the trainables by the learning rate of their block."""
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
        """Set the trainables to the frozen weights plus a file's differences and return the keys that were used.

        A weight that the file lacks keeps its value.

        Raises:
            ModelError: the file holds no full differences, or none for the weights that this run trains.
        """
        import torch

        made_by = adapter.made_by()
        if made_by not in (None, self.name):
            raise _unlike(f"has the type {made_by}, not whole weights", _APPLY)
        if not any(key.endswith((f".{WHOLE}", f".{BIAS}")) for key in adapter):
            raise _unlike("has no differences of whole weights, as Graft Fine-tune makes them", _APPLY)
        name_of, _ = names
        places = _places(module, name_of)
        keys = places.keys() & adapter.keys()
        if not keys:
            raise _unlike(f"has no keys such as {next(iter(places))}", "Use the targets it was trained with.")
        with torch.no_grad():
            for key in sorted(keys):
                name, frozen = places[key]
                if adapter[key].numel() != frozen.numel():
                    raise _unlike(f"has {key} in another size", "Choose an adapter for this model.")
                difference = adapter[key].to(frozen.device, torch.float32).view_as(frozen)
                trainables[name].copy_(frozen.float() + difference)
        return set(keys)

    def export(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        name_of: Callable[[str], str],
        module: nn.Module | None = None,
    ) -> FullDiff:
        """Return the differences from the frozen weights in `module`."""
        places = _places(module, name_of)
        return FullDiff({key: (tensors[name], frozen) for key, (name, frozen) in sorted(places.items())})


def _own(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the floating-point parameters of a module, without those of its submodules."""
    for leaf, parameter in layer._parameters.items():
        if parameter is not None and parameter.is_floating_point():
            yield leaf, parameter


def _is_meant(path: str, layer: nn.Module, family: Family, recipe: Recipe) -> bool:
    if not is_trained(path, family) or not any(True for _ in _own(layer)):
        return False
    if recipe.targets == FullFineTune.default_targets:
        return True
    if recipe.targets == "patterns":
        # Patterns also match norms and bare parameters, which have no kind because no adapter fits them.
        return matches(path, recipe.target_patterns)
    kind = kind_of(layer)
    return kind is not None and is_target(path, kind, family, recipe)


def _check_plain(path: str, layer: nn.Module) -> None:
    import torch

    for leaf, parameter in _own(layer):
        if type(parameter.data) is not torch.Tensor or leaf.startswith(PART):
            raise ModelError(
                f"{_joined(path, 'weight')} is quantized: Graft cannot train it.",
                "Load the original model, or train a LoRA.",
                "model",
            )


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _frozen_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Yield (path, module, parameter name, frozen values) of every trained parameter."""
    for path, owner in module.named_modules():
        for name, frozen in owner._buffers.items():
            if name.startswith(_FROZEN):
                yield path, owner, name[len(_FROZEN) :], frozen


def _places(module: nn.Module, name_of: Callable[[str], str]) -> dict[str, tuple[str, torch.Tensor]]:
    """Map ComfyUI's key to (name of the trainable, frozen values). Layers that share a weight have one key each."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    first: dict[int, str] = {}
    places = {}
    for path, owner, leaf, frozen in _frozen_of(module):
        name = _joined(path, leaf)
        trained = first.setdefault(id(owner._parameters[leaf]), name)
        places[difference_key(name, names, name_of)] = trained, frozen
    return places


def _unlike(how: str, cure: str) -> ModelError:
    return ModelError(f"The adapter to start from {how}.", cure, "start_from")
