"""What the adapter types share: injection by peft, start values from the seed or a file, ranks, rates, files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, SettingsError
from ..formats.kohya import own, to_kohya
from ..formats.peft_format import PeftAdapter
from ..optimizers import Group
from ..rng import generator
from .base import Method
from .patterns import rank_of, value_for
from .targets import Layer, alpha_of, meant_layers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..formats.adapter import Adapter
    from ..recipe.recipe import Recipe

_NAME = re.compile(r"(?P<path>.+)\.(?P<stem>\w+)\.default(?P<end>\.weight)?")


def adapted_path(name: str) -> str:
    """The path of the module that a trainable belongs to."""
    return _NAME.fullmatch(name)["path"]


def uniform(shape: torch.Size, seed: int, name: str) -> torch.Tensor:
    """Start values as peft and kohya draw them: uniform within 1 / sqrt(inputs), [r, inputs, ...] float32."""
    import torch

    bound = (shape.numel() / shape[0]) ** -0.5
    return (torch.rand(shape, generator=generator("lora", seed, name)) * 2 - 1) * bound


def _switchable(layer: nn.Module, forward: Callable) -> Callable:
    """A forward of our own that minds peft's switch, by which differential prior preservation asks the frozen base."""

    def switched(x: torch.Tensor) -> torch.Tensor:
        return layer.base_layer(x) if layer.disable_adapters else forward(x)

    return switched


class PeftMethod(Method):
    """An adapter type of peft.

    Attributes:
        kinds: of layers for which its file is read rightly by the host.
        zeros, ones: trainables that start so; all others are drawn.
        raised: trainables whose learning rate LoRA+ raises; empty where there is no such thing.
        strength: the trainable that a scale can be worked into; empty where there is no scale.
        has_rank, has_dropout: whether ranks by block, alpha and dropout mean anything.
    """

    kinds: frozenset[str] = frozenset()
    zero_init: frozenset[str] = frozenset()
    one_init: frozenset[str] = frozenset()
    lora_plus_params: frozenset[str] = frozenset()
    has_rank = True
    has_dropout = False
    scale_param = ""

    # What a type says of itself.

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """peft's configuration, but for the targets.

        Args:
            layers: the frozen ones, by path.
            ranks: by path, those that differ from the recipe's.
        """
        raise NotImplementedError

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Called with peft's layer once its trainables have their start values."""

    def start_value(self, stem: str, layer: nn.Module, shape: torch.Size, seed: int, name: str) -> torch.Tensor:
        """A trainable's start, float32."""
        import torch

        if stem in self.zero_init:
            return torch.zeros(shape)
        if stem in self.one_init:
            return torch.ones(shape)
        return uniform(shape, seed, name)

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """A layer's tensors in the host's file, by what follows the layer's name."""
        raise NotImplementedError

    def peft_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """A layer's trainables as peft keeps them, by peft's name."""
        return layer.values

    def native_recipe(self, recipe: Recipe) -> Recipe:
        """The recipe whose configuration describes `native_layer`."""
        return recipe

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """(what `native_layer` gives, its scale) from a layer of a file, None where that does not determine it."""
        return None

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """The inverse of `native_layer`; may set what of the layer is constant."""
        return values

    # What all have in common.

    def check(self, recipe: Recipe) -> None:
        """Refuses options that this type does not have."""
        asked = {
            "dropout": recipe.dropout != 0 and not self.has_dropout,
            "alpha": recipe.alpha != recipe.rank and not self.has_rank,
            "block_ranks": bool(recipe.block_ranks) and not self.has_rank,
            "lora_plus_ratio": recipe.lora_plus_ratio != 1 and not self.lora_plus_params,
        }
        for name, refused in asked.items():
            if refused:
                raise SettingsError(
                    f"The adapter type {self.name} has no {name}.",
                    f"Leave {name} unset, or choose the type LoRA.",
                    name,
                )

    def scale(self, rank: int, alpha: float) -> float | None:
        """alpha / rank."""
        return alpha / rank if self.has_rank else None

    def matching(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """Adaptable layers that the recipe names."""
        return list(meant_layers(module, family, recipe))

    def targets(self, module: nn.Module, family: Family, recipe: Recipe) -> list[str]:
        """The layers that the recipe names, those of rank 0 left out.

        Raises:
            ModelError: there is none.
            SettingsError: one is of a kind on which this type is not offered.
        """
        kinds = {path: kind for path, kind in meant_layers(module, family, recipe).items() if rank_of(path, recipe) > 0}
        if not kinds:
            raise ModelError(
                f"No trainable layer of the kind '{recipe.targets}' was found in the model ({type(module).__name__}).",
                "Choose other targets. Quantised formats that hide their layers (GGUF, Nunchaku) cannot be trained; "
                "load the original.",
                "model",
            )
        for path, kind in kinds.items():
            if kind not in self.kinds:
                raise SettingsError(
                    f"The adapter type {self.name} is not offered on a {kind} such as {path}.",
                    f"Choose targets of the kinds {' and '.join(sorted(self.kinds))}, or the type LoRA with conv.",
                    "targets",
                )
        return sorted(kinds)

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """peft's layers at the targets; what is drawn is drawn from the recipe's seed."""
        import torch
        from peft import inject_adapter_in_model

        config = self._config(recipe, {path: module.get_submodule(path) for path in targets})
        exactly = "|".join(re.escape(path) for path in targets)
        config.target_modules = f"(?:{exactly})"
        # peft draws before it is told what, and warns of block sizes that it fits to the layer.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                inject_adapter_in_model(config, module)
            except NotImplementedError as error:
                # A type that starts from the base's weights, on quantised ones that count for no other library.
                raise ModelError(
                    f"{recipe.method} reads the base's weights, and this ComfyUI does not give peft the numbers of "
                    f"quantised ones ({error}).",
                    "Choose the type LoRA, or load the base in 16 or 32 bits.",
                    "options",
                ) from error
        wanted = set(targets)
        trainables = {}
        for name, parameter in module.named_parameters():
            match = _NAME.fullmatch(name)
            if match is None or match["path"] not in wanted:
                continue
            layer = module.get_submodule(match["path"])
            start = self.start_value(match["stem"], layer, parameter.shape, recipe.seed, name)
            # peft makes them in the base's dtype, which may be eight bits: drawn anew, in full.
            parameter.data = start.to(parameter.device)
            parameter.requires_grad_(True)
            trainables[name] = parameter
        for path in targets:
            layer = module.get_submodule(path)
            self.finish(layer, recipe)
            # peft makes them dropping; what is drawn, checked or validated before the first step must not.
            layer.eval()
            if "forward" in vars(layer):
                layer.forward = _switchable(layer, layer.forward)
        return dict(sorted(trainables.items()))

    def _config(self, recipe: Recipe, layers: dict[str, nn.Module]) -> Any:
        ranks = {path: rank_of(path, recipe) for path in layers}
        return self.config(recipe, layers, {path: rank for path, rank in ranks.items() if rank != recipe.rank})

    def groups(self, trainables: dict[str, nn.Parameter], recipe: Recipe) -> list[Group]:
        """By learning rate: that of the block, times LoRA+'s ratio for B (Hayou et al. 2024)."""
        rates: dict[float, list[str]] = {}
        for name in trainables:
            match = _NAME.fullmatch(name)
            rate = value_for(match["path"], recipe.block_learning_rates, recipe.learning_rate)
            if match["stem"] in self.lora_plus_params:
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
        """Gives the trainables an adapter file's values."""
        import torch

        values, used = self._start_values(trainables, module, adapter, recipe, names)
        with torch.no_grad():
            for name, parameter in trainables.items():
                if values[name].shape != parameter.shape:
                    raise _unlike(
                        f"has {_NAME.fullmatch(name)['path']} with {tuple(values[name].shape)} where this run has "
                        f"{tuple(parameter.shape)}",
                        "Set rank and block_ranks to those it was trained with.",
                    )
                parameter.copy_(values[name])
        return used

    def _start_values(self, trainables, module, adapter, recipe, names) -> tuple[dict[str, torch.Tensor], set[str]]:
        made_by = adapter.made_by()
        if made_by is not None and not self._is_alike(made_by):
            raise _unlike(f"is of the type {made_by}, this run of {self.name}", f"Choose the type {made_by}.")
        values = {}
        used = set()
        for path in sorted({adapted_path(name) for name in trainables}):
            place, found = self._held(path, adapter, names)
            used |= {f"{place}.{end}" for end in found}
            held, strength = self._values_held(place, found, adapter.native)
            rank = rank_of(path, recipe)
            scale = self.scale(rank, alpha_of(rank, recipe))
            if self.scale_param and strength != scale:
                held = {**held, self.scale_param: held[self.scale_param] * (strength / scale)}
            held = self.load_layer(held, module.get_submodule(path))
            values.update({name: held.get(stem) for name, stem in _stems(trainables, path)})
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise _unlike(f"lacks {missing[0]}", "Choose the targets it was trained with.")
        return values, used

    def _held(self, path: str, adapter: Adapter, names) -> tuple[str | None, dict[str, torch.Tensor]]:
        """A layer's name in an adapter, and what is there of it."""
        name_of, published_name = names
        if adapter.native is None:
            place, tensors = name_of(path), adapter
        else:
            place, tensors = published_name(path) if adapter.native.published else path, adapter.native.tensors
        start = f"{place}."
        found = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
        if not found:
            raise _unlike(f"has nothing for {path}", "Choose the targets it was trained with.")
        return place, found

    def _values_held(self, place, found, native) -> tuple[dict[str, torch.Tensor], float | None]:
        if native is not None:
            return {end.removesuffix(".weight"): tensor for end, tensor in found.items()}, native.scales.get(place)
        held = self.values_of_host(found)
        if held is None:
            raise _unlike(
                f"does not hold what {self.name} trains",
                "Start from the peft folder that Graft Save Adapter writes.",
            )
        return held

    def _is_alike(self, other: str) -> bool:
        """Whether another type's file is also one of this: the same but for the default targets."""
        from . import METHODS

        kind = type(METHODS.get(other))
        same = [
            getattr(kind, name, None) is getattr(type(self), name) for name in ("export_layer", "scale", "load_layer")
        ]
        return all(same)

    def layers(self, tensors: dict[str, torch.Tensor], recipe: Recipe, module: nn.Module | None) -> list[Layer]:
        """The trainables' values by layer, sorted by path."""
        values: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            match = _NAME.fullmatch(name)
            values.setdefault(match["path"], {})[match["stem"]] = own(tensor)
        made = []
        for path in sorted(values):
            rank = rank_of(path, recipe)
            alpha = alpha_of(rank, recipe)
            adapted = None if module is None else module.get_submodule(path)
            made.append(Layer(path, values[path], rank, alpha, self.scale(rank, alpha), adapted))
        return made

    def export(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        name_of: Callable[[str], str],
        module: nn.Module | None = None,
    ) -> dict[str, torch.Tensor]:
        """The host's tensors."""
        found = {layer.path: self.export_layer(layer) for layer in self.layers(tensors, recipe, module)}
        return to_kohya(found, name_of)

    def native(
        self,
        tensors: dict[str, torch.Tensor],
        recipe: Recipe,
        published_name: Callable[[str], str | None],
        module: nn.Module | None = None,
    ) -> PeftAdapter:
        """peft's tensors and configuration, in diffusers' names where it publishes the model with these layers."""
        layers = self.layers(tensors, recipe, module)
        places = {layer.path: published_name(layer.path) for layer in layers}
        published = all(place is not None for place in places.values())
        if not published:
            places = {path: path for path in places}
        ends = {_NAME.fullmatch(name)["stem"]: _NAME.fullmatch(name)["end"] or "" for name in tensors}
        found, scales = {}, {}
        for layer in layers:
            place = places[layer.path]
            for stem, tensor in self.peft_layer(layer).items():
                found[f"{place}.{stem}{ends[stem]}"] = own(tensor)
            if layer.scale is not None:
                scales[place] = layer.scale
        frozen = {layer.path: layer.adapted and layer.adapted.base_layer for layer in layers}
        config = self._config(self.native_recipe(recipe), frozen).to_dict()
        return PeftAdapter(self.name, _renamed(config, places), found, published, scales)


def _renamed(config: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """A configuration's own JSON-able values with layers named as published."""
    made = {name: sorted(value) if isinstance(value, (set, tuple)) else value for name, value in config.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        if made.get(name):
            made[name] = {places[path]: value for path, value in made[name].items()}
    if made.get("feedforward_modules"):
        made["feedforward_modules"] = sorted(places[path] for path in made["feedforward_modules"])
    made["target_modules"] = sorted(places.values())
    made["inference_mode"] = True
    return made


def _stems(trainables: dict[str, Any], path: str) -> list[tuple[str, str]]:
    """(name, peft's short name) of a layer's trainables."""
    matches = (_NAME.fullmatch(name) for name in trainables)
    return [(match.string, match["stem"]) for match in matches if match["path"] == path]


def _unlike(how: str, cure: str) -> ModelError:
    return ModelError(f"The adapter to start from {how}.", cure, "start_from")
