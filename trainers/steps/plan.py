"""Input of the training loop: dataset items, trainables, and functions that export or switch off the trainables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..distributed.group import rows_of
from ..methods import textual_inversion
from ..optimizers import Group
from ..preprocessing.items import DatasetItem, Sample
from ..preprocessing.sampler import batches_from

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .. import protocols
    from ..distributed.trained_shards import TrainedShards
    from ..formats.embedding import Embedding
    from ..preprocessing.prefetch import Batch
    from ..preprocessing.preview_sources import PreviewInput
    from ..recipe.recipe import Recipe
    from ..runs.folders import Products


@dataclass(frozen=True)
class BatchRows:
    """Some rows of a batch, and their place in the training.

    Attributes:
        step: index of the step.
        number: index of the batch among the step's accumulated batches.
        first: index of the first of these rows in the whole batch.
        batch_size: size of the whole batch over all processes; 0 if the rows are the whole batch.
        members: the rows.
    """

    step: int = 0
    number: int = 0
    first: int = 0
    batch_size: int = 0
    members: Batch = ()


@dataclass(frozen=True)
class Window:
    """The batches of one optimizer step, and the rows of them that this process computes.

    A batch is a list of members (index in `Plan.train`, number of the item's visit).

    Attributes:
        step: index of the step.
        batches: the accumulated batches, each (epoch, members).
        rows: this process's rows of each batch.
    """

    step: int
    batches: list[tuple[int, Batch]]
    rows: list[BatchRows]

    @classmethod
    def of(cls, step: int, batches: list[tuple[int, Batch]], group: protocols.Group) -> Window:
        """Return a window with the rows that fall to this process of the group."""
        parts = rows_of([len(members) for _, members in batches], group.rank, group.world_size)
        rows = [
            BatchRows(step, number, part.start, len(members), members[part])
            for number, ((_, members), part) in enumerate(zip(batches, parts, strict=True))
        ]
        return cls(step, batches, rows)

    @property
    def size(self) -> int:
        """Return the number of samples in all batches, over all processes."""
        return sum(len(members) for _, members in self.batches)

    @property
    def epoch(self) -> int:
        """Return the epoch of the last batch."""
        return self.batches[-1][0]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Input of the training loop.

    Attributes:
        train, validation: items to train on, and items for the validation loss.
        trainables: parameters by name, float32 unless the recipe says otherwise. They are already part of the
            denoiser's or the text encoder's tree.
        export: makes the adapter and the embedding from the trainables' values and the step.
        groups: parameter groups that cover all trainables; empty for one group with the recipe's learning rate.
        renormalize: called after every optimizer step with the schedule's factor on the learning rates. It pulls the
            vectors of an embedding back to the usual norm. A tensor of 0 leaves them as they are.
        switched_off: returns a context in which the denoiser predicts as the frozen base, without the trainables.
        scaled: returns a context in which the trainables' difference counts times a factor; only for linear methods.
        previews: see `Prepared.previews`.
        constants: tensors of the tree that are not trained, but that a resumed run must restore.
        after_step: called after every optimizer step that was not left out; applies the method's limits.
        in_backward: step the optimizer within the backward if the result is the same.
        shards: the trainables are shards of the model's weights; None if they are whole.
        prefetch: fetch the next batch while the device computes this one. Two threads then call `DatasetItem.show`.
    """

    recipe: Recipe
    train: Sequence[DatasetItem]
    trainables: dict[str, nn.Parameter]
    export: Callable[[dict[str, torch.Tensor], int], Products]
    validation: Sequence[DatasetItem] = ()
    groups: Sequence[Group] = ()
    renormalize: Callable[[float | torch.Tensor], None] = lambda factor: None
    switched_off: Callable[[], AbstractContextManager] = nullcontext
    scaled: Callable[[float], AbstractContextManager] = nullcontext
    previews: Sequence[Callable[[], PreviewInput] | None] = ()
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    after_step: Callable[[], None] = lambda: None
    in_backward: bool = False
    shards: TrainedShards | None = None
    prefetch: bool = True

    def all_groups(self) -> Sequence[Group]:
        """Return the parameter groups: `groups`, or one group of all trainables if `groups` is empty."""
        return self.groups or (Group(tuple(self.trainables), self.recipe.learning_rate),)

    def with_embedding(self, host: protocols.Host, start: Embedding | None = None) -> Plan:
        """Return the plan with the vectors of the recipe's embedding among its trainables, if it has one.

        Args:
            start: an embedding with their start values; None for those of the init text.
        """
        if not self.recipe.embedding_name:
            return self
        vectors = textual_inversion.start(host.text, self.recipe, start)
        return replace(
            self,
            trainables=self.trainables | vectors,
            groups=[*self.groups, textual_inversion.group(vectors, self.recipe)],
            renormalize=textual_inversion.renormalizing(vectors, host.text, self.recipe),
        )

    def batches(self, position: int) -> Iterator[tuple[int, Batch]]:
        """Yield (epoch, members) of each batch without end, after skipping `position` batches."""
        items = self.train
        buckets = [item.shape for item in items]
        repeats = [item.repeats for item in items]
        prior = [item.prior for item in items]
        return batches_from(position, buckets, repeats, self.recipe.batch_size, self.recipe.seed, prior)

    def picture_names(self, window: Window) -> list[str | None]:
        """Return the name of each sample's picture, over all processes; None for a class image."""
        items = (self.train[index] for _, members in window.batches for index, _ in members)
        return [None if item.prior else item.name for item in items]

    def products(self, step: int) -> Products:
        """Export the trainables as they are now."""
        return self.export(self.values(), step)

    def values(self) -> dict[str, torch.Tensor]:
        """Return the trainables' values, not copied; of shards those that `TrainedShards.whole` gathers."""
        if self.shards is not None:
            return self.shards.whole()
        return {name: parameter.detach() for name, parameter in self.trainables.items()}

    def samples(self, batch: Batch) -> list[Sample]:
        """Return the samples of a batch."""
        return [self.train[index].show(visit) for index, visit in batch]
