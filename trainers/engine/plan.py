"""Input of the training loop: dataset items, trainables, and functions that export or switch off the trainables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..optimizers import Group
from ..preprocessing.items import DatasetItem, Sample
from ..preprocessing.sampler import batches_from

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe
    from ..runs.folders import Products


@dataclass(frozen=True)
class Plan:
    """Input of the training loop.

    Attributes:
        train, validation: items to train on, and items for the validation loss.
        trainables: parameters by name, float32 unless the recipe says otherwise. They are already part of the
            denoiser's or the text encoder's tree.
        export: makes the adapter and the embedding from the trainables' values and the step.
        groups: parameter groups that cover all trainables; empty for one group with the recipe's learning rate.
        renormalize: called after every optimizer step with the schedule's factor on the learning rates. It pulls the
            vectors of an embedding back to the usual norm.
        switched_off: returns a context in which the denoiser predicts as the frozen base, without the trainables.
        constants: tensors of the tree that are not trained, but that a resumed run must restore.
        in_backward: step the optimizer within the backward if the result is the same.
        prefetch: fetch the next batch while the device computes this one. Two threads then call `DatasetItem.show`.
    """

    recipe: Recipe
    train: Sequence[DatasetItem]
    validation: Sequence[DatasetItem]
    trainables: dict[str, nn.Parameter]
    export: Callable[[dict[str, torch.Tensor], int], Products]
    groups: Sequence[Group] = ()
    renormalize: Callable[[float], None] = lambda factor: None
    switched_off: Callable[[], AbstractContextManager] = nullcontext
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    in_backward: bool = False
    prefetch: bool = True

    def all_groups(self) -> Sequence[Group]:
        """Return the parameter groups: `groups`, or one group of all trainables if `groups` is empty."""
        return self.groups or (Group(tuple(self.trainables), self.recipe.learning_rate),)

    def batches(self, position: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield (epoch, batch) without end, after skipping `position` batches.

        Each member of a batch is (index in `train`, number of the item's visit).
        """
        items = self.train
        buckets = [item.bucket for item in items]
        repeats = [item.repeats for item in items]
        prior = [item.prior for item in items]
        return batches_from(position, buckets, repeats, self.recipe.batch_size, self.recipe.seed, prior)

    def samples(self, batch: list[tuple[int, int]]) -> list[Sample]:
        """Return the samples of a batch."""
        return [self.train[index].show(turn) for index, turn in batch]
