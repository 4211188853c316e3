"""Adapter files of the methods that use peft: the values to start from, and the export in peft's form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..formats.keys import ALPHA, BIAS, DORA, DOWN, UP, WHOLE, common_place, layer_keys, layouts, type_of
from ..formats.kohya import has_host_magnitudes, own
from ..formats.peft_config import starts_at_weight
from ..formats.peft_format import PeftAdapter
from . import differences
from .arguments import BESIDE, value_of
from .targets import Layer, alpha_of, parse_name, rank_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..formats.adapter import Adapter
    from ..recipe.recipe import Recipe
    from .peft_method import PeftMethod


APPLY = "Apply it with Graft Apply Adapter before the training node instead."
# Arguments of the type whose layers a file without their tensors does not have.
_ARGUMENTS = {"lora_mid": "use_tucker", "hada_t1": "use_tucker", "hada_t2": "use_tucker", "lokr_t2": "use_tucker"}
_ARGUMENTS |= {"dora_scale": "dora_wd", "lora_magnitude_vector": "dora_wd"}
# Names in a file's layer of the trainables beside an adapter.
_END_OF = {stem: BIAS if stem == BIAS else WHOLE for stem in differences.STEMS.values()}
_ARGUMENTS |= {stem: "train_bias" if end == BIAS else "train_norm" for stem, end in _END_OF.items()}
_RANKS = "Use the rank and block_ranks it was trained with. A LoRA fits into larger ones, too."


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
            raise mismatch(f"has the type {made_by}, but this run trains {method.name}", f"Choose the type {made_by}.")
        if adapter.native is None and any(name.startswith("base_model.model.") for name in adapter):
            raise mismatch(
                "has peft's names, but no configuration, which holds its alpha",
                "Put the adapter_config.json that belongs to it into the same folder.",
            )
        if adapter.native is not None and starts_at_weight(adapter.native.config):
            raise mismatch(
                f"starts at a part of the model's weights (init_lora_weights is "
                f"{adapter.native.config['init_lora_weights']!r})",
                "Turn it into a LoRA of twice its rank first, with Graft Resize Adapter and the model. Save that, and "
                "start from it.",
            )
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
                value = values[name]
                if value.shape[:1] != parameter.shape[:1] or value.numel() != parameter.numel():
                    raise _misshapen(name, value.shape, parameter.shape, self._recipe)
                # Files hold a linear layer and a 1x1 convolution in either form.
                parameter.copy_(value.view(parameter.shape))
        return used

    def _values(self, trainables: dict[str, Any], module: nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
        values: dict[str, torch.Tensor | None] = {}
        used = set()
        by_path: dict[str, list[str]] = {}
        for name in trainables:
            by_path.setdefault(parse_name(name).path, []).append(name)
        for path in sorted(by_path):
            stems = {name: parse_name(name).stem for name in by_path[path]}
            added = {stem: _END_OF[stem] for stem in stems.values() if stem in _END_OF}
            is_norm = len(added) == len(stems)
            place, tensors, keys = self._tensors_of(differences.place_of(path, added), is_norm)
            used |= keys
            adapted = module.get_submodule(path)
            layer = {end: tensor for end, tensor in tensors.items() if end not in added.values()}
            if not is_norm:
                layer = self._rescaled(path, *self._layer_values(path, place, layer, adapted))
                layer = self._method.load_layer(layer, adapted)
            layer.update({stem: tensors[end] for stem, end in added.items() if end in tensors})
            values.update({name: layer.get(stem) for name, stem in stems.items()})
            extra = layer.keys() - set(stems.values())
            if extra:
                raise mismatch(
                    f"has {min(extra)} for {path}, for which this run has {', '.join(sorted(stems.values()))}",
                    _RANKS,
                )
        missing = [name for name, value in values.items() if value is None]
        if missing:
            argument = _ARGUMENTS.get(parse_name(missing[0]).stem.split(".")[0])
            cure = f"Leave {argument} out of adapter_args" if argument else "Use the targets it was trained with"
            raise mismatch(f"lacks {missing[0]}", f"{cure}.")
        return values, used

    def _tensors_of(self, path: str, is_optional: bool) -> tuple[str | None, dict[str, torch.Tensor], set[str]]:
        """Return a layer's name in the file, its tensors by kohya's or peft's names, and their keys in the file."""
        published_name = self._names[1]
        native = self._adapter.native
        if native is None:
            keys = next((self._keys[place] for place in host_places(path, self._names) if place in self._keys), {})
            if not (keys or is_optional):
                raise self._lacking(path)
            return None, {end: self._adapter[key] for end, key in keys.items()}, set(keys.values())
        place = published_name(path) if native.published else path
        start = f"{place}."
        selected = {key[len(start) :]: value for key, value in native.tensors.items() if key.startswith(start)}
        if not (selected or is_optional):
            raise self._lacking(path)
        return place, selected, {start + end for end in selected}

    @functools.cached_property
    def _keys(self) -> dict[tuple[str, str], dict[str, str]]:
        """Keys of the file by (network, path with underscores) of their layer and by kohya's suffix."""
        return {common_place(name): keys for name, keys in layer_keys(self._adapter)[0].items()}

    def _lacking(self, path: str) -> ModelError:
        first = min(self._adapter, default="") if self._adapter.native is None else ""
        kinds = layouts(layer_keys(self._adapter)[0]) if first else {"peft's"}
        if first and not kinds:
            return mismatch(
                f"names its layers in a way that Graft does not know, such as {first[:200]}",
                "Choose another adapter, or apply this one with Graft Apply Adapter before the training node.",
            )
        return mismatch(f"has no tensors for {path}", "Use the targets it was trained with.")

    def _layer_values(
        self, path: str, place: str | None, tensors: dict[str, torch.Tensor], adapted: nn.Module
    ) -> tuple[dict[str, torch.Tensor], float | None]:
        native = self._adapter.native
        if "lora_B.bias" in tensors or {UP, BIAS} <= tensors.keys() <= {UP, DOWN, BIAS, ALPHA}:
            raise mismatch(
                f"changes the bias of {self._method.name} layers, which this run cannot train",
                APPLY,
            )
        if native is not None:
            values = {end.removesuffix(".weight"): tensor for end, tensor in tensors.items()}
            return self._method.values_of_peft(values, native.config, adapted), native.scales.get(place)
        if "oft_blocks" in tensors:
            raise mismatch(
                f"rotates the outputs of layers, as LyCORIS does, and {self._method.name} here rotates their inputs",
                APPLY,
            )
        is_readable = DORA not in tensors or not has_host_magnitudes(self._adapter)
        values = self._method.values_of_host(tensors) if is_readable else None
        if values is None or (DORA in values[0] and not hasattr(adapted, DORA)):
            raise self._unlike(path, tensors)
        return values

    def _unlike(self, path: str, tensors: dict[str, torch.Tensor]) -> ModelError:
        from . import METHODS

        own, kind = self._method.name, type_of(tensors)
        if self._adapter.made_by() == own:
            has_no_folder = own in ("LoHa", "LoKr") or any(value_of(self._recipe, name) for name in BESIDE)
            return mismatch(
                f"does not have the tensors that {own} trains",
                APPLY if has_no_folder else "Start from the peft folder that Graft Save Adapter writes.",
            )
        ends = ", ".join(sorted(tensors.keys() - {ALPHA}))
        fits_other = kind in METHODS and METHODS[kind].values_of_host(tensors) is not None
        choice = f"Choose the type {kind}. Or a" if fits_other else "A"
        return mismatch(
            f"has the tensors {ends} for {path}, which {own} does not train",
            f"{choice}pply it with Graft Apply Adapter before the training node, or turn it into a LoRA with Graft "
            "Resize Adapter and its model.",
        )

    def _rescaled(
        self, path: str, values: dict[str, torch.Tensor], file_scale: float | None
    ) -> dict[str, torch.Tensor]:
        """Return a layer's values with which the run's scale gives the same weight difference as the file's scale."""
        rank = rank_of(path, self._recipe)
        scale = self._method.scale(rank, alpha_of(rank, self._recipe))
        if None in (file_scale, scale) or file_scale == scale:
            return values
        return self._method.rescaled(values, file_scale / scale)


def host_places(path: str, names: tuple[Callable[[str], str], Callable[[str], str | None]]) -> list[tuple[str, str]]:
    """Return all places of a layer in files with the host's names, as `common_place` returns them."""
    name_of, published_name = names
    network, own = common_place(name_of(path))
    published = published_name(path) or path
    return [(network, name) for name in dict.fromkeys((own, path.replace(".", "_"), published.replace(".", "_")))]


def _has_same_files(method: PeftMethod, other: str) -> bool:
    """Return True if a file of another type also fits this type: the two differ only in their default targets."""
    from . import METHODS

    kind = type(METHODS.get(other))
    hooks = ("export_layer", "scale", "load_layer")
    return all(getattr(kind, hook, None) is getattr(type(method), hook) for hook in hooks)


def mismatch(problem: str, cure: str) -> ModelError:
    """Return the error about an adapter that a run cannot start from."""
    return ModelError(f"The adapter to start from {problem}.", cure, "start_from")


def _misshapen(name: str, given: torch.Size, own: torch.Size, recipe: Recipe) -> ModelError:
    path = parse_name(name).path
    differing = [(size, other) for size, other in zip(given, own, strict=False) if size != other]
    if len(given) == len(own) and [other for _, other in differing] == [rank_of(path, recipe)]:
        rank = differing[0][0]
        return mismatch(
            f"has rank {rank} in {path}, but this run has rank {rank_of(path, recipe)}",
            f"Use the rank and block_ranks it was trained with: set rank to {rank}, or to 0, which takes the "
            "adapter's (for a text encoder: text_encoder_rank). Or change its rank with Graft Resize Adapter.",
        )
    return mismatch(
        f"has the shape {tuple(given)} for {path}, but this run has {tuple(own)}",
        "Use an adapter that was trained on this model, with the rank and block_ranks it was trained with.",
    )


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
    renamed = {name: sorted(value) if isinstance(value, (set, tuple)) else value for name, value in config.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        if renamed.get(name):
            renamed[name] = {places[path]: value for path, value in renamed[name].items()}
    if renamed.get("feedforward_modules"):
        renamed["feedforward_modules"] = sorted(places[path] for path in renamed["feedforward_modules"])
    renamed["target_modules"] = sorted(places.values())
    renamed["inference_mode"] = True
    return renamed
