"""Module trees that a training method is applied to: the denoiser, and each text encoder that is trained too."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ModelError
from ..families import TEXT_ENCODER, Family, family_of
from ..formats.adapter import Adapter
from ..formats.convert import native_of
from ..formats.diffusers_split import joined, refuse_parts, with_splits
from ..formats.full_diff import FullDiff
from ..formats.keys import common_place, layer_keys
from ..formats.peft_format import place_of
from ..lowrank import PART
from ..methods.adapter_files import host_places
from ..methods.targets import check_used
from ..recipe.options import AS_IT_IS
from ..text import counted, join_first
from ..tools.foreign import GUESS, has_guessed_alpha
from ..tools.inspect import MOST_UNREAD
from .base_dtype import quantize_base

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..formats.peft_format import PeftAdapter
    from ..methods import Method
    from ..optimizers import Group
    from ..preprocessing.items import DatasetItem
    from ..protocols import Host
    from ..recipe.recipe import Recipe

Value = TypeVar("Value")

log = logging.getLogger(__name__)

_LISTED = 5
# The end of the name of a layer's parameter, which peft may have wrapped.
_WEIGHT = re.compile(rf"(\.base_layer)?\.(weight|bias|{PART}\d+)$")

# With checkpointing "auto", denoisers with more parameters are checkpointed.
_LARGE_MODEL = 1_500_000_000

# Prefix of the names of text encoder trainables. Names of denoiser trainables have no prefix.
PREFIX = "text/"


@dataclass(frozen=True)
class TrainableModule:
    """A module tree and its training settings.

    Attributes:
        component: the tree's name in diffusers' pipelines: `text_encoder`, `text_encoder_2`; empty for the denoiser.
        prefix: prefix of its trainables' names in the run.
        start: prefix of its layers' paths.
        recipe: the run's recipe with this tree's own rank, alpha and learning rate.
        tree: returns the module; None outside training.
        names: two functions from a layer's path to its name: in the host's files, and in the model as diffusers
            publishes it.
    """

    component: str
    prefix: str
    start: str
    family: Family
    recipe: Recipe
    tree: Callable[[], nn.Module | None]
    names: tuple[Callable[[str], str], Callable[[str], str | None]]

    def select(self, values: dict[str, Value]) -> dict[str, Value]:
        """Select this tree's entries from a run's values. Their keys lose the prefix, as the method expects."""
        start = self.prefix + self.start
        entries = {name: value for name, value in values.items() if name.startswith(start)}
        return {
            name[len(self.prefix) :]: value for name, value in entries.items() if "/" not in name[len(self.prefix) :]
        }


class TrainableModules:
    """A training method applied to all module trees of a run."""

    def __init__(self, method: Method, recipe: Recipe, host: Host):
        self._method = method
        self._recipe = recipe
        self._host = host
        self._parts = list(_parts_of(method, recipe, host))
        self._splits_of = host.denoiser.published_splits
        self.layers = 0

    @property
    def are_there(self) -> bool:
        """Report whether the trees exist, which they do only during training."""
        return any(part.tree() is not None for part in self._parts)

    @contextmanager
    def training(self, offloaded: bool, items: Sequence[DatasetItem] = ()) -> Iterator[None]:
        """Build the denoiser's tree in the block, and the text encoder's if an embedding or its weights are trained.

        Args:
            offloaded: keep the weights of the denoiser's blocks off the device.
            items: dataset items with which the quantization of the base is measured.
        """
        recipe, denoiser = self._recipe, self._host.denoiser
        with ExitStack() as stack:
            stack.enter_context(denoiser.training(recipe.compute_dtype, offloaded or recipe.base_dtype != AS_IT_IS))
            if recipe.live_text:
                stack.enter_context(self._host.text.training())
            quantize_base(recipe, self._host, items, offloaded)
            yield

    def compile(self) -> None:
        """Compile the denoiser's repeated blocks if the recipe asks for it. Call it before `checkpoint`."""
        from ..memory.compilation import compile_blocks

        denoiser = self._host.denoiser
        if self._recipe.compile == "on":
            compile_blocks(denoiser.module, denoiser.position_options)

    def checkpoint(self) -> int:
        """Turn activation checkpointing on if the recipe or the denoiser's size asks for it.

        Returns:
            The number of the denoiser's checkpointed blocks.
        """
        from ..lowrank.quantized import count_weights
        from ..memory.autograd import blocks_of
        from ..memory.checkpointing import checkpoint_blocks

        recipe, denoiser = self._recipe, self._host.denoiser
        size = count_weights(denoiser.module)
        if recipe.checkpointing != "on" and not (recipe.checkpointing == "auto" and size > _LARGE_MODEL):
            return 0
        blocks = blocks_of(denoiser.module)
        checkpoint_blocks(blocks, recipe.keeps_attention)
        if blocks and recipe.live_text:
            checkpoint_blocks(blocks_of(self._host.text.module), recipe.keeps_attention)
        return len(blocks)

    def inject(self) -> dict[str, nn.Parameter]:
        """Add the trainables to the trees. Call this during training only.

        Raises:
            ModelError: the targets match no layer of a tree.
            SettingsError: a pattern matches no layer in any tree, or the method does not support a matched layer.
        """
        method = self._method
        choosing = [(part, self._choice(part)) for part in self._parts]
        matched = [path for part, recipe in choosing for path in method.matching(part.tree(), part.family, recipe)]
        check_used(self._parts[0].recipe, matched)
        chosen = [method.targets(part.tree(), part.family, recipe) for part, recipe in choosing]
        trainables = {}
        for part, targets in zip(self._parts, chosen, strict=True):
            added = method.inject(part.tree(), targets, part.recipe)
            trainables.update({part.prefix + name: parameter for name, parameter in added.items()})
            self.layers += len(targets)
        return trainables

    def adopt(self, trainables: dict[str, nn.Parameter], layers: int) -> dict[str, nn.Parameter]:
        """Return the trainables that `inject` has added to the trees before, to this number of layers."""
        self.layers = layers
        return trainables

    def _choice(self, part: TrainableModule) -> Recipe:
        """Return the recipe that selects a tree's layers.

        If patterns match no layer of a text encoder, they are meant for the denoiser. The text encoder then gets the
        method's default targets.
        """
        recipe = part.recipe
        usual = replace(recipe, targets=self._method.default_targets, target_patterns=())
        named = recipe.targets != "patterns" or self._method.matching(part.tree(), part.family, recipe)
        return recipe if named or not part.component else usual

    def constants(self) -> dict[str, torch.Tensor]:
        """Return the tensors that `inject` added to the trees but that are not trained."""
        tensors = {}
        for part in self._parts:
            constants = self._method.constants(part.tree())
            tensors.update({part.prefix + name: tensor for name, tensor in constants.items()})
        return tensors

    def read_later(self) -> list[nn.Parameter]:
        """Return the frozen weights that `export` reads."""
        return [weight for part in self._parts for weight in self._method.read_later(part.tree())]

    def after_step(self, trainables: dict[str, nn.Parameter]) -> None:
        """Apply the method's limits after an optimizer step."""
        for part in self._parts:
            self._method.after_step(part.select(trainables), part.tree(), part.recipe)

    def groups(self, trainables: dict[str, nn.Parameter]) -> list[Group]:
        """Return the parameter groups: trainables that share a learning rate."""
        groups = []
        for part in self._parts:
            for group in self._method.groups(part.select(trainables), part.recipe):
                groups.append(replace(group, names=tuple(part.prefix + name for name in group.names)))
        return groups

    def start(self, trainables: dict[str, nn.Parameter], adapter: Adapter) -> None:
        """Load an adapter's values into the trainables.

        Raises:
            ModelError: the adapter has another type, other ranks or other layers. The error names the option or input
                that it comes from.
        """
        try:
            self._start(trainables, adapter)
        except ModelError as error:
            input = "start_from" if self._recipe.start_from else "adapter"
            raise ModelError(error.message, error.cure, input) from error

    def _start(self, trainables: dict[str, nn.Parameter], adapter: Adapter) -> None:
        adapter = self._on_own_layers(adapter)
        left = set(adapter)
        if adapter.native is not None:
            # Count only the tensors in peft's form. Those in the host's form repeat them.
            left = {f"{of} {name}" for of, held in adapter.native.by_component().items() for name in held.tensors}
            left |= {f" {name}" for name in layer_keys(adapter)[1]}
        total = len(left)
        self._warn_of_guess(adapter)
        for part in self._parts:
            held = adapter if adapter.native is None else _adapter_of(adapter, part.component)
            used = self._method.start(part.select(trainables), part.tree(), held, part.recipe, part.names)
            left -= used if adapter.native is None else {f"{part.component} {name}" for name in used}
        unread = self._unread(left, adapter.native is None)
        if left - unread:
            raise ModelError(
                f"The adapter to start from has layers that this run does not train, such as "
                f"{min(left - unread).strip()}.",
                "Use the targets, adapter_args and text_encoder setting it was trained with.",
                "start_from",
            )
        self._report_unread(sorted(unread), total)

    def _unread(self, left: set[str], is_for_host: bool) -> set[str]:
        """Return the keys of no layer of the trees, of those that a start left over.

        Args:
            is_for_host: whether the keys are the host's, or `<component> <name>` in peft's form.
        """
        paths = [(part, path) for part in self._parts for path in _weights_of(part)]
        if is_for_host:
            known = {place for part, path in paths for place in host_places(path, part.names)}
            layers, others = layer_keys(left)
            places = {key: common_place(name) for name, keys in layers.items() for key in keys.values()}
            places |= dict.fromkeys(others, ("", ""))
            # A full difference of a text encoder, which this run does not train.
            places |= {key: ("untrained", "") for key in left if key.startswith("text_encoders.")}
        else:
            known = {(part.component, name) for part, path in paths for name in (path, part.names[1](path))}
            places = {key: (key.partition(" ")[0], place_of(key.partition(" ")[2])) for key in left}
        trained = {network for network, _ in known} | {""}
        return {key for key, place in places.items() if place[0] in trained and place not in known}

    def _report_unread(self, unread: list[str], total: int) -> None:
        """Warn of keys without effect.

        Raises:
            ModelError: they are more than a tenth.
        """
        if not unread:
            return
        count = f"{counted(len(unread), 'key')} of {total}"
        if len(unread) > MOST_UNREAD * total:
            raise ModelError(
                f"The adapter to start from does not fit the model: {count} fit no layer, such as {unread[0].strip()}.",
                "Choose an adapter for this model. Graft Inspect Adapter lists its layers.",
                "start_from",
            )
        names = join_first([name.strip() for name in unread], _LISTED)
        text = f"{count} of the adapter to start from fit no layer and have no effect: {names}"
        self._warn({"kind": "unread", "count": len(unread), "total": total, "names": names, "text": text})

    def _warn_of_guess(self, adapter: Adapter) -> None:
        if has_guessed_alpha(adapter):
            self._warn({"kind": "alpha", "text": f"The adapter to start from: {GUESS}"})

    def _warn(self, warning: dict[str, Any]) -> None:
        log.warning("Graft: %s.", warning["text"])
        self._host.report("adapter warnings", {"warnings": [warning]})

    def _on_own_layers(self, adapter: Adapter) -> Adapter:
        """Convert an adapter for diffusers' split layers to the denoiser's own layers. Return any other unchanged.

        Raises:
            ModelError: the adapter has parts of a layer that cannot be joined.
        """
        if adapter.native is None and (native := native_of(adapter)) is not None:
            adapter = Adapter(adapter, adapter.metadata, native)
        tree = self._parts[0].tree()
        rows = {path: len(module.weight) for path, module in tree.named_modules() if self._splits_of(path)}
        if adapter.native is not None and adapter.native.is_split:
            return Adapter(adapter, adapter.metadata, joined(adapter.native, rows, self._splits_of))
        names = {path for _, path in map(common_place, layer_keys(adapter)[0])}
        for path in rows if adapter.native is None else ():
            parts = self._splits_of(path)
            if len(parts) > 1 and not names.isdisjoint(part.name.replace(".", "_") for part in parts):
                raise refuse_parts(path)
        return adapter

    def export(self, values: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the adapter file's tensors, made from the trainables' values."""
        exported = [
            self._method.export(part.select(values), part.recipe, part.names[0], part.tree()) for part in self._parts
        ]
        if isinstance(exported[0], FullDiff):
            return FullDiff.joined(exported)
        return {name: tensor for tensors in exported for name, tensor in tensors.items()}

    def native(self, values: dict[str, torch.Tensor]) -> PeftAdapter | None:
        """Return the adapter in peft's form; None if the method has no such form."""
        adapters = {
            part.component: self._method.native(part.select(values), part.recipe, part.names[1], part.tree())
            for part in self._parts
        }
        first = adapters.pop("")
        return None if first is None else replace(with_splits(first, self._splits_of), text=adapters)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Switch the trainables off in the block: the trees predict as the frozen base does, to the bit."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(self._method.switched_off(part.tree()))
            yield

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Multiply the trainables' difference by a factor in the block, see `Method.scaled`."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(self._method.scaled(part.tree(), factor))
            yield


def _weights_of(part: TrainableModule) -> set[str]:
    """Return the paths of a tree's layers, and of the denoiser's bare parameters."""
    names = [name for name, _ in part.tree().named_parameters() if _WEIGHT.search(name) or not part.component]
    return {_WEIGHT.sub("", name) for name in names}


def _adapter_of(adapter: Adapter, component: str) -> Adapter:
    """Return one tree's part of an adapter in peft's form.

    Raises:
        ModelError: the adapter has nothing for this tree.
    """
    native = adapter.native.by_component().get(component)
    if native is None:
        raise ModelError(
            f"The adapter to start from has no layers for the {'text encoder' if component else 'model'}.",
            "Set text_encoder to off, or choose another adapter." if component else "Choose another adapter.",
            "start_from",
        )
    return Adapter({}, adapter.metadata, native)


def _parts_of(method: Method, recipe: Recipe, host: Host) -> Iterator[TrainableModule]:
    denoiser, text = host.denoiser, host.text
    yield TrainableModule(
        "", "", "", family_of(denoiser.family), recipe, lambda: denoiser.module, method.names(denoiser)
    )
    if not recipe.text_encoder:
        return
    share = recipe.text_encoder_rank / recipe.rank if recipe.rank else 1.0
    own = replace(
        recipe,
        rank=recipe.text_encoder_rank,
        alpha=recipe.alpha * share,
        learning_rate=recipe.text_encoder_learning_rate,
    )
    for number, key in enumerate(text.encoders(), 1):
        component = "text_encoder" if number == 1 else f"text_encoder_{number}"
        tree = partial(_encoder, text, key)
        yield TrainableModule(component, PREFIX, f"{key}.", TEXT_ENCODER, own, tree, method.names(text))


def _encoder(text, key: str) -> nn.Module | None:
    """Return one text encoder, wrapped in a ModuleDict so that its paths start with its key."""
    from torch import nn

    return None if text.module is None else nn.ModuleDict({key: getattr(text.module, key)})
