"""Block offloading: copy each block's frozen weights to the device while it runs and prefetch the next block's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RunError
from .autograd import blocks_of
from .checkpointing import checkpoint_blocks
from .transfer import WeightTransfer, map_weights, transfer_to

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# Attribute that marks a Parameter whose data is offloaded.
_MARK = "graft_offloaded"

# A module tree and the device that computes it.
Tree = tuple["nn.Module", torch.device]
# (module, name) of a weight.
_Row = tuple["nn.Module", str]
_Pin = Callable[[torch.Tensor], bool]
_Replaced = dict[int, tuple["nn.Parameter", "nn.Parameter"]]


def offload_trees(
    trees: Sequence[Tree],
    keep: Iterable[torch.Tensor],
    folder: str,
    pin: _Pin,
    keep_attention: bool = False,
) -> tuple[int, int]:
    """Offload the frozen weights of blocks. Weights are never copied back, because nothing changes them.

    Weights of a GPU's trees go to CPU memory. Weights of the CPU's trees go to a memory-mapped file that disappears
    with the process. All other weights are placed on the device. The blocks are checkpointed; without this, autograd
    would hold the copies of all blocks until the backward. Blocks that are already offloaded stay as they are.

    Args:
        trees: private trees with their devices.
        keep: tensors that stay on the device, frozen or not.
        folder: folder for the mapped file.
        pin: locks a CPU tensor's memory, so that the device can read it directly; returns False if it cannot.
        keep_attention: passed to `checkpoint_blocks`.

    Returns:
        Number of newly offloaded blocks, and bytes of their weights.
    """
    kept = {id(tensor) for tensor in keep}
    count = size = 0
    for device in dict.fromkeys(device for _, device in trees):
        own = [tree for tree, tree_device in trees if tree_device == device]
        blocks = {block: rows for tree in own for block, rows in _offloadable(tree, kept).items() if rows}
        if blocks:
            count += len(blocks)
            size += _offload(blocks, device, folder, pin, keep_attention)
        for tree in own:
            place(tree, device)
    return count, size


def list_frozen(trees: Sequence[Tree], keep: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the weights that `offload_trees` would offload."""
    kept = {id(tensor) for tensor in keep}
    rows = [row for tree, _ in trees for block_rows in _offloadable(tree, kept).values() for row in block_rows]
    return [owner._parameters[name] for owner, name in rows]


def mark_offloaded(tree: nn.Module, device: torch.device) -> None:
    """Place a tree on the device, except for the weights of its blocks. Mark those as offloaded.

    Call `offload_trees` afterwards, when the tree contains the trained modules.
    """
    for owner, name in (row for rows in _offloadable(tree, set()).values() for row in rows):
        setattr(owner._parameters[name], _MARK, True)
    place(tree, device)


def onload(tree: nn.Module, device: torch.device) -> None:
    """Place on the device the weights that `mark_offloaded` left out and that the tree still holds."""
    for parameter in tree.parameters():
        if is_offloaded(parameter):
            delattr(parameter, _MARK)
    place(tree, device)


@contextmanager
def fetched(tree: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a tree compute without gradients while its blocks' weights are marked, in the block of code."""
    prefetcher = BlockPrefetcher(transfer_to(device))
    forwards = {}
    for block in blocks_of(tree) if device.type != "cpu" else ():
        rows = [
            (owner, name)
            for owner in block.modules()
            for name in owner._parameters
            if is_offloaded(owner._parameters[name])
        ]
        forwards[block] = vars(block).get("forward")
        block.forward = OffloadedForward(rows, prefetcher, block.forward)
    try:
        yield
    finally:
        for block, forward in forwards.items():
            del block.forward
            if forward is not None:
                block.forward = forward


def is_on_other_device(tree: nn.Module) -> bool:
    """Report whether some weights of a tree are offloaded."""
    return any(is_offloaded(parameter) for parameter in tree.parameters())


def bytes_here(tree: nn.Module) -> int:
    """Return the bytes of a tree's weights that are not offloaded."""
    return sum(parameter.nbytes for parameter in tree.parameters() if not is_offloaded(parameter))


def is_offloaded(weight: torch.Tensor) -> bool:
    """Report whether a weight is marked as offloaded."""
    return hasattr(weight, _MARK)


def place(tree: nn.Module, device: torch.device) -> None:
    """Do the same as `tree.to(device)`, but leave offloaded weights on the CPU."""
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
                # Such a tensor is more than its data, and implements its own move to a device.
                owner.to(home)
        for name, tensor in owner._buffers.items():
            if tensor is None or tensor.device == device:
                continue
            moved = tensor.data.to(device)
            try:
                # Keep the tensor object if possible: a run's state may refer to it as a constant of the method.
                tensor.data = moved
            except RuntimeError:
                owner._buffers[name] = moved


def _move(owner: nn.Module, name: str, data: torch.Tensor, replaced: _Replaced) -> None:
    """Replace a weight's data. Keep the same Parameter object if the old and the new device allow it.

    Args:
        replaced: old and new Parameter by the old one's id, for devices that do not allow it; modules may share one.

    Raises:
        RunError: the devices do not allow it and the weight is trained.
    """
    parameter = owner._parameters[name]
    try:
        parameter.data = data
    except RuntimeError as error:
        if parameter.requires_grad:
            raise RunError(
                f"Graft cannot move trained weights from {parameter.device} to {data.device} ({error}).",
                "Leave offload unset in Graft Memory Options on this device.",
                "options",
            ) from error
        pair = parameter, torch.nn.Parameter(data, requires_grad=False)
        owner._parameters[name] = replaced.setdefault(id(parameter), pair)[1]
        if is_offloaded(parameter):
            setattr(owner._parameters[name], _MARK, True)


def _offloadable(tree: nn.Module, kept: set[int]) -> dict[nn.Module, list[_Row]]:
    """Return the frozen weights of each block that is not offloaded yet, without those used outside the blocks.

    Args:
        kept: ids of tensors to leave out.
    """
    blocks = blocks_of(tree)
    inner = {id(owner) for block in blocks for owner in block.modules()}
    outer = [owner for owner in tree.modules() if id(owner) not in inner]
    shared = {id(weight) for owner in outer for weight in owner._parameters.values()}
    return {block: _frozen(block, kept | shared) for block in blocks if not _is_offloaded(block)}


def _frozen(block: nn.Module, kept: set[int]) -> list[_Row]:
    rows = []
    for owner in block.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or parameter.requires_grad or id(parameter) in kept:
                continue
            # Other tensors hold more than their data, so they stay.
            if type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor:
                rows.append((owner, name))
    return rows


def _is_offloaded(block: nn.Module) -> bool:
    return isinstance(getattr(block.forward, "forward", None), OffloadedForward)


def _offload(
    blocks: dict[nn.Module, list[_Row]], device: torch.device, folder: str, pin: _Pin, keep_attention: bool
) -> int:
    """Offload the weights of blocks and fetch them while the blocks run. Return the bytes of the weights."""
    # A weight that two blocks share is moved once and fetched with either block.
    weights = {id(weight): weight for rows in blocks.values() for weight in _weights(rows)}
    if device.type == "cpu":
        homes, transfer = map_weights(list(weights.values()), folder)
    else:
        homes, transfer = [weight.detach().to("cpu") for weight in weights.values()], transfer_to(device)
        for home in homes:
            pin(home)
    size = sum(home.nbytes for home in homes)
    new_data = dict(zip(weights, homes, strict=True))
    replaced: _Replaced = {}
    for owner, name in (row for rows in blocks.values() for row in rows):
        weight = owner._parameters[name]
        if id(weight) in new_data:
            _move(owner, name, new_data[id(weight)], replaced)
            setattr(owner._parameters[name], _MARK, True)
    checkpoint_blocks(list(blocks), keep_attention)
    prefetcher = BlockPrefetcher(transfer)
    for block, rows in blocks.items():
        # Inside the checkpointed forward, so that the recomputation fetches the weights too.
        block.forward.forward = OffloadedForward(rows, prefetcher, block.forward.forward)
    return size


def _weights(rows: list[_Row]) -> list[nn.Parameter]:
    return [owner._parameters[name] for owner, name in rows]


class BlockPrefetcher:
    """Fetcher of the running block's weights that prefetches the weights of the probable next block.

    It predicts the block that followed the last time the same two blocks ran in succession. The pair tells a forward
    from a backward, which runs the blocks in reverse. If the prediction was wrong, the caller waits for the copy.
    Besides the weights that the caller holds, at most one block's weights are on the device or in transfer.

    Args:
        transfer: copies weights to the device.
    """

    def __init__(self, transfer: WeightTransfer):
        self._transfer = transfer
        self._homes: list[list[torch.Tensor]] = []
        self._next: dict[tuple[int, int], int] = {}
        # Numbers of the last two blocks that ran.
        self._last_two = (-1, -1)
        # The block in transfer, and the block whose weights wait on the device, each with its number.
        self._incoming: tuple[int, Any] | None = None
        self._kept: tuple[int, list[torch.Tensor]] | None = None
        self._has_room = True

    def add(self, homes: list[torch.Tensor]) -> int:
        """Register a block's weights and return its number. The weights' location is read at each fetch."""
        self._homes.append(homes)
        return len(self._homes) - 1

    def enter(self, number: int) -> list[torch.Tensor]:
        """Return a block's weights on the device and start to prefetch the next block's."""
        # A training step may use weights that a preview fetched, so they must not be inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            weights = self._fetch(number)
            self._next[self._last_two] = number
            before = self._last_two[1]
            self._last_two = (before, number)
            expected = self._next.get(self._last_two)
            if before not in (-1, number, expected):
                self._transfer.leave(self._homes_of(before))
            if expected not in (None, number) and self._has_room:
                self._start(expected)
        return weights

    def leave(self, number: int, weights: list[torch.Tensor]) -> None:
        """Note that a block is done. Keep its weights if the same block is expected to run next."""
        if self._last_two[1] == number and self._next.get(self._last_two) == number and self._has_room:
            self._kept = (number, weights)

    def _homes_of(self, number: int) -> list[torch.Tensor]:
        return [home.detach() for home in self._homes[number]]

    def _fetch(self, number: int) -> list[torch.Tensor]:
        kept, self._kept = self._kept, None
        incoming, self._incoming = self._incoming, None
        if kept is not None and kept[0] == number:
            return kept[1]
        if incoming is not None and incoming[0] == number:
            return self._transfer.finish(incoming[1])
        if incoming is not None:
            self._transfer.leave(self._homes_of(incoming[0]))
        # Free these copies before the new ones are allocated.
        kept = incoming = None
        return self._transfer.finish(self._transfer.start(self._homes_of(number)))

    def _start(self, number: int) -> None:
        try:
            self._incoming = (number, self._transfer.start(self._homes_of(number)))
        except torch.OutOfMemoryError:
            # Continue without prefetching: the block that runs may still fit.
            log.info("Graft: no memory for prefetching the next block. From now on, each block waits for its weights.")
            self._has_room = False


class OffloadedForward:
    """A block's forward that puts the block's weights on the device while it runs.

    It assigns temporary Parameters instead of changing the data of the originals. Autograd saves the Parameter, not
    its data, so the backward would find no data if the original were emptied after the forward.
    """

    def __init__(self, rows: list[_Row], prefetcher: BlockPrefetcher, forward: Callable):
        self._rows = rows
        self._prefetcher = prefetcher
        self._homes = _weights(rows)
        self._number = prefetcher.add(self._homes)
        self.forward = forward

    def __call__(self, *args, **kwargs):
        weights = self._prefetcher.enter(self._number)
        try:
            for (owner, name), weight in zip(self._rows, weights, strict=True):
                owner._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
            return self.forward(*args, **kwargs)
        finally:
            for (owner, name), home in zip(self._rows, self._homes, strict=True):
                owner._parameters[name] = home
            self._prefetcher.leave(self._number, weights)
