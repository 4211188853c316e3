"""Frozen weights kept off the device, each block's brought there while it runs, and the next one's meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RunError
from .autograd import blocks_of
from .checkpointing import checkpoint_blocks
from .transfer import WeightTransfer, map_weights, transfer_to

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# On a Parameter whose numbers are kept off the device.
_MARK = "graft_offloaded"

# A tree and where it is computed.
Tree = tuple["nn.Module", torch.device]
# (module, name) of a weight.
_Row = tuple["nn.Module", str]
_Replaced = dict[int, tuple["nn.Parameter", "nn.Parameter"]]


def offload_trees(
    trees: Sequence[Tree],
    keep: Iterable[torch.Tensor],
    folder: str,
    pin: Callable[[torch.Tensor], bool],
    keep_attention: bool = False,
) -> tuple[int, int]:
    """Keeps the frozen weights of blocks off their device; they go one way, to it, since nothing changes them.

    From a GPU they go to the CPU's memory, from there to a file that the system maps and that is gone with the process.
    All else of the trees is put on the device. The blocks are checkpointed, or the backward would hold every block's
    copy until it comes by. Whatever was done to trees before is not done again.

    Args:
        trees: private ones.
        keep: what stays, frozen or not.
        folder: for the file.
        pin: locks the memory of a tensor on the CPU, so that a device can read it by itself; False where it does not.
        keep_attention: what `checkpoint_blocks` is told.

    Returns:
        Number of blocks, and bytes of their weights.
    """
    stay = {id(tensor) for tensor in keep}
    count = size = 0
    for device in dict.fromkeys(device for _, device in trees):
        here = [tree for tree, its in trees if its == device]
        held = {block: rows for tree in here for block, rows in _streamable(tree, stay).items() if rows}
        if held:
            count += len(held)
            size += _stream(held, device, folder, pin, keep_attention)
        for tree in here:
            place(tree, device)
    return count, size


def list_frozen(trees: Sequence[Tree], keep: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The weights that `offload_trees` would keep away."""
    stay = {id(tensor) for tensor in keep}
    rows = [row for tree, _ in trees for own in _streamable(tree, stay).values() for row in own]
    return [owner._parameters[name] for owner, name in rows]


def mark_offloaded(tree: nn.Module, device: torch.device) -> None:
    """Puts a tree whose weights are elsewhere on the device, but for those of its blocks, which are marked.

    `offload_trees` is to follow, when what is trained is in the tree.
    """
    for owner, name in (row for rows in _streamable(tree, set()).values() for row in rows):
        setattr(owner._parameters[name], _MARK, True)
    place(tree, device)


def onload(tree: nn.Module, device: torch.device) -> None:
    """Puts on the device what was held back of a tree and is still its own."""
    for parameter in tree.parameters():
        if is_offloaded(parameter):
            delattr(parameter, _MARK)
    place(tree, device)


def is_on_other_device(tree: nn.Module) -> bool:
    """Whether some weights of a tree are kept off the device."""
    return any(is_offloaded(parameter) for parameter in tree.parameters())


def bytes_here(tree: nn.Module) -> int:
    """Of the weights of a tree that are not kept off the device."""
    return sum(parameter.nbytes for parameter in tree.parameters() if not is_offloaded(parameter))


def is_offloaded(weight: torch.Tensor) -> bool:
    """Whether a weight is kept off the device."""
    return hasattr(weight, _MARK)


def place(tree: nn.Module, device: torch.device) -> None:
    """As `tree.to(device)`, but for what is kept off the device."""
    if not is_on_other_device(tree):
        tree.to(device)
        return
    replaced: _Replaced = {}
    for owner in tree.modules():
        for name, parameter in list(owner._parameters.items()):
            home = torch.device("cpu") if is_offloaded(parameter) else device
            if parameter is None or parameter.device == home:
                continue
            if type(parameter.data) is torch.Tensor:
                _move(owner, name, parameter.data.to(home), replaced)
            else:
                # Quantised weights, which are in no block's stream, know by themselves how they are moved.
                owner.to(home)
        for name, tensor in owner._buffers.items():
            if tensor is None or tensor.device == device:
                continue
            there = tensor.data.to(device)
            try:
                # The tensor itself stays where it can: it may be what a run keeps of a method's constants.
                tensor.data = there
            except RuntimeError:
                owner._buffers[name] = there


def _move(owner: nn.Module, name: str, there: torch.Tensor, replaced: _Replaced) -> None:
    """Gives a weight other numbers, in the same Parameter wherever the two devices allow it.

    Args:
        replaced: by identity, a Parameter and what took its place where they do not; modules may share one.

    Raises:
        RunError: it is a trained one, and they do not.
    """
    parameter = owner._parameters[name]
    try:
        parameter.data = there
    except RuntimeError as error:
        if parameter.requires_grad:
            raise RunError(
                f"What is trained cannot be moved from {parameter.device} to {there.device} ({error}).",
                "Leave offload of Graft Memory Options alone on this device.",
                "options",
            ) from error
        other = parameter, torch.nn.Parameter(there, requires_grad=False)
        owner._parameters[name] = replaced.setdefault(id(parameter), other)[1]
        if is_offloaded(parameter):
            setattr(owner._parameters[name], _MARK, True)


def _streamable(tree: nn.Module, stay: set[int]) -> dict[nn.Module, list[_Row]]:
    """The rows of each block that is not streamed yet: weights of its own that are not trained."""
    blocks = blocks_of(tree)
    inner = {id(owner) for block in blocks for owner in block.modules()}
    shared = {id(one) for owner in tree.modules() if id(owner) not in inner for one in owner._parameters.values()}
    return {block: _frozen(block, stay | shared) for block in blocks if not _is_streamed(block)}


def _frozen(block: nn.Module, stay: set[int]) -> list[_Row]:
    found = []
    for owner in block.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or parameter.requires_grad or id(parameter) in stay:
                continue
            # Quantised weights are more than their numbers.
            if type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor:
                found.append((owner, name))
    return found


def _is_streamed(block: nn.Module) -> bool:
    return isinstance(getattr(block.forward, "forward", None), OffloadedForward)


def _stream(held: dict[nn.Module, list[_Row]], device: torch.device, folder: str, pin, keep_attention: bool) -> int:
    """Has the weights of blocks come while the blocks run; bytes of the weights."""
    # Weights that two blocks share are moved once, and come with either.
    weights = {id(one): one for rows in held.values() for one in _weights(rows)}
    if device.type == "cpu":
        homes, carrier = map_weights(list(weights.values()), folder)
    else:
        homes, carrier = [weight.detach().to("cpu") for weight in weights.values()], transfer_to(device)
        for home in homes:
            pin(home)
    size = sum(home.nbytes for home in homes)
    new = dict(zip(weights, homes, strict=True))
    replaced: _Replaced = {}
    for owner, name in (row for rows in held.values() for row in rows):
        weight = owner._parameters[name]
        if id(weight) in new:
            _move(owner, name, new[id(weight)], replaced)
            setattr(owner._parameters[name], _MARK, True)
    checkpoint_blocks(list(held), keep_attention)
    conveyor = BlockPrefetcher(carrier)
    for block, rows in held.items():
        # Within what is run again in the backward.
        block.forward.forward = OffloadedForward(rows, conveyor, block.forward.forward)
    return size


def _weights(rows: list[_Row]) -> list[nn.Parameter]:
    return [owner._parameters[name] for owner, name in rows]


class BlockPrefetcher:
    """Brings the weights of blocks when they are asked for, and those of the block that is likely next ahead of it.

    Likely is what came next the last time that these two blocks came one after the other: so it knows the backward,
    where they come in reverse, from the forward. A block that nobody expected is waited for. Beside what whoever asks
    holds, never more than one block's weights are there or on their way.

    Args:
        carrier: to the device.
    """

    def __init__(self, carrier: WeightTransfer):
        self._carrier = carrier
        self._homes: list[list[torch.Tensor]] = []
        self._next: dict[tuple[int, int], int] = {}
        # The last two that came.
        self._path = (-1, -1)
        self._coming: tuple[int, Any] | None = None
        self._held: tuple[int, list[torch.Tensor]] | None = None
        self._ahead = True

    def add(self, homes: list[torch.Tensor]) -> int:
        """The number by which a block's weights are asked for; where they lie is asked at each time."""
        self._homes.append(homes)
        return len(self._homes) - 1

    def enter(self, number: int) -> list[torch.Tensor]:
        """A block's weights on the device."""
        # What comes during a preview may be wanted in a step.
        with torch.inference_mode(False), torch.no_grad():
            here = self._fetch(number)
            self._next[self._path] = number
            before = self._path[1]
            self._path = (before, number)
            expected = self._next.get(self._path)
            if before not in (-1, number, expected):
                self._carrier.leave(self._of(before))
            if expected not in (None, number) and self._ahead:
                self._start(expected)
        return here

    def leave(self, number: int, here: list[torch.Tensor]) -> None:
        """A block is done for now; its weights are kept where it is expected to be the next again."""
        if self._path[1] == number and self._next.get(self._path) == number and self._ahead:
            self._held = (number, here)

    def _of(self, number: int) -> list[torch.Tensor]:
        return [home.detach() for home in self._homes[number]]

    def _fetch(self, number: int) -> list[torch.Tensor]:
        held, self._held = self._held, None
        coming, self._coming = self._coming, None
        if held is not None and held[0] == number:
            return held[1]
        if coming is not None and coming[0] == number:
            return self._carrier.finish(coming[1])
        if coming is not None:
            self._carrier.leave(self._of(coming[0]))
        # Before others come in their place.
        held = coming = None
        return self._carrier.finish(self._carrier.start(self._of(number)))

    def _start(self, number: int) -> None:
        try:
            self._coming = (number, self._carrier.start(self._of(number)))
        except torch.OutOfMemoryError:
            # The block that runs may still have room.
            log.info("Graft: there is no room for a second block: each is waited for from now on.")
            self._ahead = False


class OffloadedForward:
    """A block's forward, with its weights on the device while it runs.

    Other Parameters take their places: autograd notes a Parameter, not its numbers, and would find those gone in the
    backward if they were taken out of the same one.
    """

    def __init__(self, rows: list[_Row], conveyor: BlockPrefetcher, forward: Callable):
        self._rows = rows
        self._conveyor = conveyor
        self._homes = _weights(rows)
        self._number = conveyor.add(self._homes)
        self.forward = forward

    def __call__(self, *args, **kwargs):
        here = self._conveyor.enter(self._number)
        try:
            for (owner, name), weight in zip(self._rows, here, strict=True):
                owner._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
            return self.forward(*args, **kwargs)
        finally:
            for (owner, name), home in zip(self._rows, self._homes, strict=True):
                owner._parameters[name] = home
            self._conveyor.leave(self._number, here)
