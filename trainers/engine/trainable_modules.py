"""Module trees that a training method is applied to: the denoiser, and each text encoder that is trained too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ..errors import ModelError
from ..families import TEXT_ENCODER, Family, family_of
from ..formats.adapter import Adapter
from ..formats.diffusers_split import joined, with_splits
from ..formats.full_diff import FullDiff
from ..methods.patterns import check_used

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..formats.peft_format import PeftAdapter
    from ..methods import Method
    from ..optimizers import Group
    from ..protocols import Host
    from ..recipe.recipe import Recipe

Value = TypeVar("Value")

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
        found = {name: value for name, value in values.items() if name.startswith(start)}
        return {name[len(self.prefix) :]: value for name, value in found.items() if "/" not in name[len(self.prefix) :]}


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
    def training(self, offloaded: bool) -> Iterator[None]:
        """Build the denoiser's tree in the block, and the text encoder's if an embedding or its weights are trained.

        Args:
            offloaded: keep the weights of the denoiser's blocks off the device.
        """
        with ExitStack() as stack:
            stack.enter_context(self._host.denoiser.training(self._recipe.compute_dtype, offloaded))
            if self._recipe.live_text:
                stack.enter_context(self._host.text.training())
            yield

    def checkpoint(self) -> int:
        """Turn activation checkpointing on if the recipe or the denoiser's size asks for it.

        Returns:
            The number of the denoiser's checkpointed blocks.
        """
        from ..memory.autograd import blocks_of
        from ..memory.checkpointing import checkpoint_blocks

        recipe, denoiser = self._recipe, self._host.denoiser
        size = sum(parameter.numel() for parameter in denoiser.module.parameters())
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
        meant = [path for part, recipe in choosing for path in method.matching(part.tree(), part.family, recipe)]
        check_used(self._parts[0].recipe, meant)
        chosen = [method.targets(part.tree(), part.family, recipe) for part, recipe in choosing]
        found = {}
        for part, targets in zip(self._parts, chosen, strict=True):
            made = method.inject(part.tree(), targets, part.recipe)
            found.update({part.prefix + name: parameter for name, parameter in made.items()})
            self.layers += len(targets)
        return found

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
        found = {}
        for part in self._parts:
            made = self._method.constants(part.tree())
            found.update({part.prefix + name: tensor for name, tensor in made.items()})
        return found

    def read_later(self) -> list[nn.Parameter]:
        """Return the frozen weights that `export` reads."""
        return [weight for part in self._parts for weight in self._method.read_later(part.tree())]

    def groups(self, trainables: dict[str, nn.Parameter]) -> list[Group]:
        """Return the parameter groups: trainables that share a learning rate."""
        found = []
        for part in self._parts:
            for group in self._method.groups(part.select(trainables), part.recipe):
                found.append(replace(group, names=tuple(part.prefix + name for name in group.names)))
        return found

    def start(self, trainables: dict[str, nn.Parameter], adapter: Adapter) -> None:
        """Load an adapter file's values into the trainables.

        Raises:
            ModelError: the adapter has another type, other ranks or other layers.
        """
        adapter = self._on_own_layers(adapter)
        left = set(adapter)
        if adapter.native is not None:
            # Count only the tensors in peft's form. Those in the host's form repeat them.
            left = {f"{of} {name}" for of, held in adapter.native.by_component().items() for name in held.tensors}
        for part in self._parts:
            held = adapter if adapter.native is None else _adapter_of(adapter, part.component)
            used = self._method.start(part.select(trainables), part.tree(), held, part.recipe, part.names)
            left -= used if adapter.native is None else {f"{part.component} {name}" for name in used}
        if left:
            first = min(left).strip()
            raise ModelError(
                f"The adapter to start from has layers that this run does not train, such as {first}.",
                "Use the targets and the text_encoder setting it was trained with.",
                "start_from",
            )

    def _on_own_layers(self, adapter: Adapter) -> Adapter:
        """Convert an adapter for diffusers' split layers to the denoiser's own layers. Return any other unchanged."""
        if adapter.native is None or not adapter.native.is_split:
            return adapter
        paths = [path for path, _ in self._parts[0].tree().named_modules()]
        return Adapter(adapter, adapter.metadata, joined(adapter.native, paths, self._splits_of))

    def export(self, values: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the adapter file's tensors, made from the trainables' values."""
        made = [
            self._method.export(part.select(values), part.recipe, part.names[0], part.tree()) for part in self._parts
        ]
        if isinstance(made[0], FullDiff):
            return FullDiff.joined(made)
        return {name: tensor for one in made for name, tensor in one.items()}

    def native(self, values: dict[str, torch.Tensor]) -> PeftAdapter | None:
        """Return the adapter in peft's form; None if the method has no such form."""
        made = {
            part.component: self._method.native(part.select(values), part.recipe, part.names[1], part.tree())
            for part in self._parts
        }
        first = made.pop("")
        return None if first is None else replace(with_splits(first, self._splits_of), text=made)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Switch the trainables off in the block: the trees predict as the frozen base does, to the bit."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(self._method.switched_off(part.tree()))
            yield


def _adapter_of(adapter: Adapter, component: str) -> Adapter:
    """Return one tree's part of an adapter in peft's form.

    Raises:
        ModelError: the adapter has nothing for this tree.
    """
    native = adapter.native.by_component().get(component)
    if native is None:
        raise ModelError(
            "The adapter to start from has no layers for the text encoder.",
            "Set text_encoder to off, or choose another adapter.",
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
