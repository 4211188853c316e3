"""Frozen weights kept off the device, each block's brought there while the block runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .autograd import checkpoint_blocks
from .errors import RunError
from .formats.files import bytes_of

if TYPE_CHECKING:
    from torch import nn

# On a Parameter whose numbers are kept off the device.
_MARK = "graft_offloaded"
# Numbers of a mapped weight begin at multiples of this, as fast kernels want them.
_ALIGNMENT = 64


def offload_blocks(blocks: list[nn.Module], device: torch.device, keep: Iterable[torch.Tensor], folder: str) -> int:
    """Moves the frozen weights of blocks off the device; they go one way, to the device, since nothing changes them.

    From a GPU they go to the CPU's memory, from there to a file that the system maps and that is gone with the process.
    The blocks are checkpointed, or the backward would hold every block's copy until it comes by.

    Args:
        blocks: of a private tree, as `blocks_of` gives them.
        keep: what stays, frozen or not.
        folder: for the file.

    Returns:
        Bytes that were moved.

    Raises:
        RunError: the file cannot be written.
    """
    stay = {id(tensor) for tensor in keep}
    held = {block: list(_frozen(block, stay)) for block in blocks}
    # Weights that two blocks share are moved once.
    moving = list({id(weight): weight for weight in list_frozen(blocks, keep)}.values())
    away = _mapped(moving, folder) if device.type == "cpu" else _to_cpu(moving)
    for parameter, weight in zip(moving, away, strict=True):
        # The tensor itself stays: a run's state may know it.
        parameter.data = weight
        setattr(parameter, _MARK, True)
    checkpoint_blocks(blocks)
    for block, rows in held.items():
        if rows:
            # Within what is run again in the backward.
            block.forward.forward = _Streamed(rows, device, block.forward.forward)
    return sum(parameter.nbytes for parameter in moving)


def list_frozen(blocks: list[nn.Module], keep: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The weights that `offload_blocks` would move."""
    stay = {id(tensor) for tensor in keep}
    return [owner._parameters[name] for block in blocks for owner, name in _frozen(block, stay)]


def is_away(weight: torch.Tensor) -> bool:
    """Whether `offload_blocks` has moved it."""
    return hasattr(weight, _MARK)


def place(tree: nn.Module, device: torch.device) -> None:
    """As `tree.to(device)`, but for what is kept off the device."""
    if not any(hasattr(parameter, _MARK) for parameter in tree.parameters()):
        tree.to(device)
        return
    for parameter in tree.parameters():
        home = torch.device("cpu") if hasattr(parameter, _MARK) else device
        if parameter.device != home:
            parameter.data = parameter.data.to(home)
    for owner in tree.modules():
        for name, tensor in owner._buffers.items():
            if tensor is not None:
                owner._buffers[name] = tensor.to(device)


def _frozen(block: nn.Module, stay: set[int]) -> Iterator[tuple[nn.Module, str]]:
    """(module, name) of each weight of a block that is not trained and not away yet."""
    for owner in block.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or parameter.requires_grad or id(parameter) in stay or hasattr(parameter, _MARK):
                continue
            # Quantised weights are more than their numbers.
            if type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor:
                yield owner, name


class _Streamed:
    """A block's forward, with its weights on the device while it runs.

    Other Parameters take their places: autograd notes a Parameter, not its numbers, and would find those gone in the
    backward if they were taken out of the same one.
    """

    def __init__(self, rows: list[tuple[nn.Module, str]], device: torch.device, forward: Callable):
        self._rows = rows
        self._device = device
        self.forward = forward

    def __call__(self, *args, **kwargs):
        with self._here():
            return self.forward(*args, **kwargs)

    @contextmanager
    def _here(self) -> Iterator[None]:
        homes = [owner._parameters[name] for owner, name in self._rows]
        try:
            for (owner, name), home in zip(self._rows, homes, strict=True):
                here = home.detach().to(self._device, non_blocking=True)
                owner._parameters[name] = torch.nn.Parameter(here, requires_grad=False)
            yield
        finally:
            for (owner, name), home in zip(self._rows, homes, strict=True):
                owner._parameters[name] = home


def _to_cpu(weights: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    for weight in weights:
        yield weight.detach().to("cpu")


def _mapped(weights: list[torch.Tensor], folder: str) -> Iterator[torch.Tensor]:
    """The weights' numbers in one file without a name, which the system may drop from memory whenever it has to.

    Raises:
        RunError: the file cannot be written.
    """
    import numpy

    starts = []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for weight in weights:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                starts.append(file.tell())
                file.write(bytes_of(weight))
            file.flush()
            # Changes stay in memory: should a weight be written to, the file is not.
            room = numpy.memmap(file, dtype=numpy.uint8, mode="c") if file.tell() else numpy.empty(0, numpy.uint8)
    except OSError as error:
        raise RunError(
            f"The frozen weights cannot be put into a file in '{folder}' ({error}).", "Free space on that disk."
        ) from error
    for start, weight in zip(starts, weights, strict=True):
        yield torch.from_numpy(room[start : start + weight.nbytes]).view(weight.dtype).view(weight.shape)
