"""Base class of the adapter types: injection by peft, start values, ranks, learning rates and files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, SettingsError
from ..families import TEXT_ENCODER, is_trained
from ..formats.keys import BIAS
from ..formats.kohya import to_kohya
from ..optimizers import Group
from ..rng import generator
from . import differences
from .adapter_files import StartValues, list_layers, to_peft
from .arguments import BESIDE, check_arguments, value_of
from .base import Method
from .targets import Layer, meant_layers, parse_name, rank_of, value_for

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..formats.adapter import Adapter
    from ..formats.peft_format import PeftAdapter
    from ..protocols import Denoiser, TextEncoder
    from ..recipe.recipe import Recipe


def uniform(shape: torch.Size, seed: int, name: str) -> torch.Tensor:
    """Draw start values as peft and kohya do: uniform within 1 / sqrt(inputs), [r, inputs, ...] float32."""
    import torch

    bound = (shape.numel() / shape[0]) ** -0.5
    return (torch.rand(shape, generator=generator("lora", seed, name)) * 2 - 1) * bound


def _switchable(layer: nn.Module, forward: Callable) -> Callable:
    """Wrap a forward so that it obeys peft's switch. Differential prior preservation turns adapters off with it."""

    def switched(x: torch.Tensor) -> torch.Tensor:
        return layer.base_layer(x) if layer.disable_adapters else forward(x)

    return switched


class PeftMethod(Method):
    """An adapter type of peft.

    Attributes:
        kinds: the kinds of layers for which ComfyUI reads the adapter's file correctly.
        zero_init, one_init: trainables that start at zero or one. All others start at random.
        lora_plus_params: trainables with LoRA+'s higher learning rate. Empty if the type has none.
        has_rank: whether the type uses alpha and ranks by block.
        has_dropout: whether the type uses dropout.
        scale_param: the trainable that can absorb a scale. Empty if the type has no scale.
        arguments: names of the type's arguments, of those in `arguments`.
    """

    kinds: frozenset[str] = frozenset()
    zero_init: frozenset[str] = frozenset()
    one_init: frozenset[str] = frozenset()
    lora_plus_params: frozenset[str] = frozenset()
    has_rank = True
    has_dropout = False
    scale_param = ""
    arguments: tuple[str, ...] = ()

    # Overridden by each adapter type.

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's configuration, without the targets.

        Args:
            layers: the frozen layers, by path.
            ranks: by path, the ranks that differ from the recipe's.
        """
        raise NotImplementedError

    def prepare(self, layer: nn.Module, recipe: Recipe) -> None:
        """Add trainables to peft's layer, each in a `ParameterDict` or `ModuleDict` under "default"."""

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Change peft's layer after its trainables have their start values."""

    def start_value(self, stem: str, layer: nn.Module, shape: torch.Size, seed: int, name: str) -> torch.Tensor:
        """Return the start value of a trainable, float32."""
        import torch

        if stem in self.zero_init or stem in differences.STEMS.values():
            return torch.zeros(shape)
        if stem in self.one_init:
            return torch.ones(shape)
        return uniform(shape, seed, name)

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return a layer's tensors in ComfyUI's file, by the part of the key after the layer's name."""
        raise NotImplementedError

    def peft_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return a layer's trainables by peft's name for them."""
        return layer.values

    def native_recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe whose configuration describes the tensors of `peft_layer`."""
        return recipe

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return (tensors of `peft_layer`, their scale) from a file's layer, or None if the file does not fix them."""
        return None

    def values_of_peft(
        self, values: dict[str, torch.Tensor], config: dict[str, Any], layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of `peft_layer` from those of a layer in another adapter of peft.

        Args:
            config: peft's configuration of that adapter.
            layer: peft's layer in this run.

        Raises:
            ModelError: this run computes something else from them.
        """
        return values

    def rescaled(self, values: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
        """Return the tensors of `peft_layer` with a factor on their difference; unchanged if the type has no scale."""
        param = self.scale_param
        return {**values, param: values[param] * factor} if param else values

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """Convert the tensors of `peft_layer` back into trainables. May also set the layer's constants."""
        return values

    # Shared by all adapter types.

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError if the recipe sets an option that this type does not have."""
        refused = {
            "dropout": recipe.dropout != 0 and not self.has_dropout,
            "alpha": recipe.alpha != recipe.rank and not self.has_rank,
            "block_ranks": bool(recipe.block_ranks) and not self.has_rank,
            "lora_plus_ratio": recipe.lora_plus_ratio != 1 and not self.lora_plus_params,
        }
        for name, is_refused in refused.items():
            if is_refused:
                raise SettingsError(
                    f"The adapter type {self.name} has no {name}.",
                    f"Leave {name} unset, or choose the type LoRA.",
                    name,
                )
        check_arguments(recipe, self.arguments)

    def scale(self, rank: int, alpha: float) -> float | None:
        """Return alpha / rank, or None if the type has no rank."""
        return alpha / rank if self.has_rank else None

    def names(self, owner: Denoiser | TextEncoder) -> tuple[Callable[[str], str], Callable[[str], str | None]]:
        """Return functions that name a module in ComfyUI's files and as published. Bare parameters have one name."""

        def name_of(path: str) -> str:
            return owner.own_name(path) if path.endswith(f".{differences.BARE}") else owner.adapter_name(path)

        return name_of, owner.published_name

    def matching(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """List the adaptable layers that the recipe's targets match."""
        return list(meant_layers(module, family, recipe))

    def targets(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """List the layers to adapt: those that the recipe's targets match, except those of rank 0; and norms.

        Raises:
            ModelError: no layer matches.
            SettingsError: this type does not support the kind of a layer, or there is no norm or bias to train.
        """
        kinds = {path: kind for path, kind in meant_layers(module, family, recipe).items() if rank_of(path, recipe) > 0}
        if not kinds:
            raise ModelError(
                f"The model ({type(module).__name__}) has no trainable layer of the kind '{recipe.targets}'.",
                "Choose other targets. Graft cannot train quantized formats that hide their layers (Nunchaku): "
                "load the original checkpoint.",
                "model",
            )
        for path, kind in kinds.items():
            if kind not in self.kinds:
                raise SettingsError(
                    f"The adapter type {self.name} does not support a {kind} such as {path}.",
                    f"Choose targets of the kinds {' and '.join(sorted(self.kinds))}, or the type LoRA with conv.",
                    "targets",
                )
        # LyCORIS trains no norms of text encoders: they lie outside the modules that it targets.
        is_text = family is TEXT_ENCODER
        wants_norms = value_of(recipe, "train_norm") and not is_text
        norms = differences.list_norms(module, kinds) if wants_norms else []
        norms = [path for path in norms if is_trained(path, family) and rank_of(path, recipe) > 0]
        biases = [path for path in kinds if module.get_submodule(path).bias is not None]
        for name, paths in (("train_norm", norms), ("train_bias", biases)):
            if value_of(recipe, name) and not (paths or is_text):
                raise SettingsError(
                    f"{name} is set, but the model has no {name[6:]} in or beside the layers to adapt.",
                    f"Leave {name} out of adapter_args, or choose other targets.",
                    "adapter_args",
                )
        return sorted([*kinds, *norms])

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Put peft's layers at the targets, drawn from the recipe's seed, and differences at norms and biases."""
        norms = [path for path in targets if differences.is_norm(module.get_submodule(path))]
        adapted = [path for path in targets if path not in norms]
        self._add_layers(module, adapted, recipe)
        for path in adapted:
            layer = module.get_submodule(path)
            self.prepare(layer, recipe)
            bias = layer.get_base_layer().bias if value_of(recipe, "train_bias") else None
            if bias is not None:
                differences.add(layer, {"bias": bias})
        for path in norms:
            differences.add_to_norm(path, module.get_submodule(path))
        trainables = self._start_trainables(module, set(targets), recipe.seed)
        for path in adapted:
            layer = module.get_submodule(path)
            self.finish(layer, recipe)
            if hasattr(layer, BIAS):
                layer.forward = differences.with_bias(layer, layer.forward)
            # peft leaves dropout on. Previews, checks and validation before the first step must not drop anything.
            layer.eval()
            if "forward" in vars(layer):
                layer.forward = _switchable(layer, layer.forward)
        return dict(sorted(trainables.items()))

    def _add_layers(self, module: nn.Module, targets: list[str], recipe: Recipe) -> None:
        import torch
        from peft import inject_adapter_in_model

        config = self._config(recipe, {path: module.get_submodule(path) for path in targets})
        alternatives = "|".join(re.escape(path) for path in targets)
        config.target_modules = f"(?:{alternatives})"
        # peft draws random values at construction, and warns about block sizes that it adapts to the layer.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                inject_adapter_in_model(config, module)
            except NotImplementedError as error:
                # The type reads the base's weights, and torch does not compute with plain fp8.
                raise ModelError(
                    f"{recipe.method} reads the base's weights, and PyTorch cannot compute with their dtype ({error}).",
                    "Choose the type LoRA, set base_dtype in Graft Memory Options, or load the base in 16 or 32 bits.",
                    "options",
                ) from error

    def _start_trainables(self, module: nn.Module, targets: set[str], seed: int) -> dict[str, nn.Parameter]:
        trainables = {}
        for name, parameter in module.named_parameters():
            parsed = parse_name(name)
            if parsed is None or parsed.path not in targets:
                continue
            layer = module.get_submodule(parsed.path)
            start = self.start_value(parsed.stem, layer, parameter.shape, seed, name)
            # peft creates them in the base's dtype, which may have eight bits. Replace them by float32 values.
            parameter.data = start.to(parameter.device)
            parameter.requires_grad_(True)
            trainables[name] = parameter
        return trainables

    def _config(self, recipe: Recipe, layers: dict[str, nn.Module]) -> Any:
        ranks = {path: rank_of(path, recipe) for path in layers}
        return self.config(recipe, layers, {path: rank for path, rank in ranks.items() if rank != recipe.rank})

    @contextmanager
    def switched_off(self, module: nn.Module) -> Iterator[None]:
        """Make the module predict as the frozen base within the block, with its norms."""
        with super().switched_off(module), differences.scaled(module, 0.0):
            yield

    @contextmanager
    def scaled(self, module: nn.Module, factor: float) -> Iterator[None]:
        """Multiply the difference of the module by a factor within the block, with those of norms and biases."""
        with super().scaled(module, factor), differences.scaled(module, factor):
            yield

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """Group by learning rate: the block's rate, times LoRA+'s ratio for B (Hayou et al. 2024)."""
        rates: dict[float, list[str]] = {}
        for name in trainables:
            parsed = parse_name(name)
            rate = value_for(parsed.path, recipe.block_learning_rates, recipe.learning_rate)
            if parsed.stem in self.lora_plus_params:
                rate *= recipe.lora_plus_ratio
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
        """Copy an adapter file's values into the trainables and return the names of the tensors that were used."""
        return StartValues(self, adapter, recipe, names).copy_to(trainables, module)

    def export(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        name_of: Callable[[str], str],
        module: nn.Module | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of ComfyUI's file."""
        held = {}
        for layer in list_layers(self, tensors, recipe, module):
            added = {stem: layer.values.pop(stem) for stem in differences.STEMS.values() if stem in layer.values}
            if layer.values:
                held[layer.path] = {**self.export_layer(layer), **added}
            else:
                ends = {"b_norm" if stem == BIAS else "w_norm": tensor for stem, tensor in added.items()}
                held[differences.place_of(layer.path, added)] = ends
        return to_kohya(held, name_of)

    def native(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        published_name: Callable[[str], str | None],
        module: nn.Module | None = None,
    ) -> PeftAdapter | None:
        """Return peft's tensors and configuration, with diffusers' names if it has the same layers.

        None beside norms, for which peft has no form. That of biases is made from ComfyUI's.
        """
        if any(value_of(recipe, name) for name in BESIDE):
            return None
        layers = list_layers(self, tensors, recipe, module)
        frozen = {layer.path: layer.adapted and layer.adapted.base_layer for layer in layers}
        config = self._config(self.native_recipe(recipe), frozen).to_dict()
        return to_peft(self, tensors, layers, config, published_name)
