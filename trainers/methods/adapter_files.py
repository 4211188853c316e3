"""Adapter files of the methods that use peft: the values to start from, and the export in peft's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..formats.kohya import own
from ..formats.peft_format import PeftAdapter
from .patterns import rank_of
from .targets import Layer, alpha_of, parse_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..formats.adapter import Adapter
    from ..recipe.recipe import Recipe
    from .peft_method import PeftMethod


class StartValues:
    """Values of an adapter file for the trainables of a run.

    Args:
        names: functions that name a layer in ComfyUI's files, and in the model as diffusers published it.

    Raises:
        ModelError: the file has another type.
    """

    def __init__(
        self,
        method: PeftMethod,
        adapter: Adapter,
        recipe: Recipe,
        names: tuple[Callable[[str], str], Callable[[str], str | None]],
    ):
        made_by = adapter.made_by()
        if made_by is not None and not _has_same_files(method, made_by):
            raise _mismatch(f"has the type {made_by}, but this run trains {method.name}", f"Choose the type {made_by}.")
        self._method = method
        self._adapter = adapter
        self._recipe = recipe
        self._names = names

    def copy_to(self, trainables: dict[str, nn.Parameter], module: nn.Module) -> set[str]:
        """Copy the values into the trainables and return the names of the tensors that were used.

        Raises:
            ModelError: the file has other ranks or other layers.
        """
        import torch

        values, used = self._values(trainables, module)
        with torch.no_grad():
            for name, parameter in trainables.items():
                if values[name].shape != parameter.shape:
                    raise _mismatch(
                        f"has the shape {tuple(values[name].shape)} for {parse_name(name).path}, but this run has "
                        f"{tuple(parameter.shape)}",
                        "Use the rank and block_ranks it was trained with.",
                    )
                parameter.copy_(values[name])
        return used

    def _values(self, trainables: dict[str, Any], module: nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
        """Return the value of each trainable, and the names of the file's tensors that they come from."""
        values: dict[str, torch.Tensor | None] = {}
        used = set()
        by_path: dict[str, list[str]] = {}
        for name in trainables:
            by_path.setdefault(parse_name(name).path, []).append(name)
        for path in sorted(by_path):
            place, tensors = self._tensors_of(path)
            used |= {f"{place}.{end}" for end in tensors}
            layer = self._rescaled(path, *self._layer_values(place, tensors))
            layer = self._method.load_layer(layer, module.get_submodule(path))
            values.update({name: layer.get(parse_name(name).stem) for name in by_path[path]})
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise _mismatch(f"lacks {missing[0]}", "Use the targets it was trained with.")
        return values, used

    def _tensors_of(self, path: str) -> tuple[str | None, dict[str, torch.Tensor]]:
        """Return a layer's name in the file and its tensors there."""
        name_of, published_name = self._names
        native = self._adapter.native
        if native is None:
            place, tensors = name_of(path), self._adapter
        else:
            place, tensors = published_name(path) if native.published else path, native.tensors
        start = f"{place}."
        selected = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
        if not selected:
            raise _mismatch(f"has no tensors for {path}", "Use the targets it was trained with.")
        return place, selected

    def _layer_values(
        self, place: str | None, tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], float | None]:
        """Return a layer's tensors by peft's names for them, and their scale."""
        native = self._adapter.native
        if native is not None:
            return {end.removesuffix(".weight"): tensor for end, tensor in tensors.items()}, native.scales.get(place)
        values = self._method.values_of_host(tensors)
        if values is None:
            raise _mismatch(
                f"does not have the tensors that {self._method.name} trains",
                "Start from the peft folder that Graft Save Adapter writes.",
            )
        return values

    def _rescaled(
        self, path: str, values: dict[str, torch.Tensor], file_scale: float | None
    ) -> dict[str, torch.Tensor]:
        """Return a layer's values with which the run's scale gives the same weight difference as the file's scale."""
        rank = rank_of(path, self._recipe)
        scale = self._method.scale(rank, alpha_of(rank, self._recipe))
        param = self._method.scale_param
        if not param or file_scale == scale:
            return values
        return {**values, param: values[param] * (file_scale / scale)}


def _has_same_files(method: PeftMethod, other: str) -> bool:
    """Return True if a file of another type also fits this type: the two differ only in their default targets."""
    from . import METHODS

    kind = type(METHODS.get(other))
    hooks = ("export_layer", "scale", "load_layer")
    return all(getattr(kind, hook, None) is getattr(type(method), hook) for hook in hooks)


def _mismatch(problem: str, cure: str) -> ModelError:
    return ModelError(f"The adapter to start from {problem}.", cure, "start_from")


def list_layers(
    method: PeftMethod, tensors: dict[str, torch.Tensor], recipe: Recipe, module: nn.Module | None
) -> list[Layer]:
    """Group the values of the trainables by layer, sorted by path."""
    values: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parsed = parse_name(name)
        values.setdefault(parsed.path, {})[parsed.stem] = own(tensor)
    layers = []
    for path in sorted(values):
        rank = rank_of(path, recipe)
        alpha = alpha_of(rank, recipe)
        adapted = None if module is None else module.get_submodule(path)
        layers.append(Layer(path, values[path], rank, alpha, method.scale(rank, alpha), adapted))
    return layers


def to_peft(
    method: PeftMethod, tensors: dict[str, torch.Tensor], layers: list[Layer], config: dict[str, Any], published_name
) -> PeftAdapter:
    """Return the values of the trainables in peft's form, with diffusers' names if it has the same layers.

    Args:
        tensors: values by the trainables' names.
        layers: the same values, as `list_layers` returns them.
        config: peft's configuration, with the run's own names of layers.
        published_name: returns the path of a layer in the model as diffusers publishes it; None if it has none there.
    """
    places = {layer.path: published_name(layer.path) for layer in layers}
    is_published = all(place is not None for place in places.values())
    if not is_published:
        places = {path: path for path in places}
    endings = {parse_name(name).stem: parse_name(name).ending for name in tensors}
    values, scales = {}, {}
    for layer in layers:
        place = places[layer.path]
        for stem, tensor in method.peft_layer(layer).items():
            values[f"{place}.{stem}{endings[stem]}"] = own(tensor)
        if layer.scale is not None:
            scales[place] = layer.scale
    return PeftAdapter(method.name, _renamed(config, places), values, is_published, scales)


def _renamed(config: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """Return a configuration's JSON-able values with the layers renamed."""
    renamed = {name: sorted(value) if isinstance(value, (set, tuple)) else value for name, value in config.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        if renamed.get(name):
            renamed[name] = {places[path]: value for path, value in renamed[name].items()}
    if renamed.get("feedforward_modules"):
        renamed["feedforward_modules"] = sorted(places[path] for path in renamed["feedforward_modules"])
    renamed["target_modules"] = sorted(places.values())
    renamed["inference_mode"] = True
    return renamed
