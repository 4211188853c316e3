"""What the loop works on: items that can be shown again and again, trainables, and what becomes of them."""

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
    from ..runs.run import Products


@dataclass(frozen=True)
class Plan:
    """What the loop works on.

    Attributes:
        trainables: by name, float32 unless the recipe says otherwise, already part of the denoiser's or the text
            encoder's tree.
        export: from the trainables' values and the step to what is handed on.
        groups: of the trainables, all of them; empty for one group with the recipe's learning rate.
        settle: called with the step's factor on the learning rates after every optimiser step, to keep trainables
            where they must be.
        frozen: gives a context in which the denoiser predicts as the base did before it was given trainables.
        constants: tensors of the tree that are not trained and that a resumed run must find again.
        in_backward: whether trainables are moved as soon as their gradients are there, where that comes to the same.
        prefetch: whether the next batch is fetched while this one is computed; items are then shown by two threads.
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
        """The groups, or the one that stands for none."""
        return self.groups or (Group(tuple(self.trainables), self.recipe.learning_rate),)

    def batches(self, position: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(epoch, batch) without end, starting after so many batches; a member is (place in `train`, its turn)."""
        items = self.train
        buckets = [item.bucket for item in items]
        repeats = [item.repeats for item in items]
        prior = [item.prior for item in items]
        return batches_from(position, buckets, repeats, self.recipe.batch_size, self.recipe.seed, prior)

    def samples(self, batch: list[tuple[int, int]]) -> list[Sample]:
        """The showings of a batch."""
        return [self.train[index].show(turn) for index, turn in batch]
