"""Several processes, on one machine or many, by Hugging Face accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from .errors import Parted
from .group import Group

if TYPE_CHECKING:
    import torch

# Of one message of gradients: large enough to fill a network, small beside a model.
_BYTES = 64 * 1024 * 1024

# A process waits so long for the others: the leader may be drawing previews or writing a large state meanwhile.
_WAIT = timedelta(hours=2)


class Spread(Group):
    """The processes that `accelerate launch`, `torchrun` or the graph has started; environment variables name them.

    Attributes:
        local_rank: its number among those of its machine.
        device: of its messages.
    """

    def __init__(self, cpu: bool):
        from accelerate import PartialState
        from accelerate.utils import InitProcessGroupKwargs

        options = InitProcessGroupKwargs(timeout=_WAIT).to_kwargs()
        if cpu and "LOCAL_RANK" in os.environ:
            options["backend"] = "gloo"
        self._state = PartialState(cpu=cpu, **options)
        self.rank = self._state.process_index
        self.world = self._state.num_processes
        self.local_rank = self._state.local_process_index
        self.device = self._state.device
        self._left = False

    def meet(self, number: float = 0.0) -> float:
        """As Group says."""
        total, left = self._sum(number, 0.0)
        if left:
            self._left = True
            raise Parted()
        return total

    def part(self) -> None:
        """As Group says; nothing where the group is no more."""
        if self._left:
            return
        self._left = True
        # Nobody is there to be told then, and what this one leaves for is what counts.
        with suppress(Parted):
            self._sum(0.0, 1.0)

    def _sum(self, *numbers: float) -> list[float]:
        if self.world == 1:
            # Not every device that trains alone has numbers of this size.
            return list(numbers)
        import torch
        from accelerate.utils import reduce

        try:
            return reduce(torch.tensor(numbers, dtype=torch.float64, device=self.device), "sum").tolist()
        except RuntimeError as error:
            raise self._lost() from error

    def gather(self, values: list[float], whole: int) -> list[float]:
        """As Group says."""
        first = whole * self.rank // self.world
        mine = [0.0] * whole
        mine[first : first + len(values)] = values
        return self._sum(*mine)

    def _lost(self) -> Parted:
        """What a broken connection means: nobody can be told any more."""
        self._left = True
        return Parted()

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """As Group says, in messages of some megabytes."""
        if self.world == 1:
            return
        import torch
        from accelerate.utils import reduce

        try:
            present = torch.tensor([float(one.grad is not None) for one in parameters], device=self.device)
            present = reduce(present, "sum").tolist()
            wanted = [one for one, count in zip(parameters, present, strict=True) if count]
            for some in _messages(wanted):
                flat = torch.cat([_gradient(one).reshape(-1) for one in some])
                _spread_out(reduce(flat, "sum"), some)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            raise self._lost() from error

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """As Group says."""
        if self.world == 1:
            return
        import torch
        from accelerate.utils import broadcast

        for tensor in tensors:
            with torch.no_grad():
                tensor.copy_(broadcast(tensor.detach().to(self.device).contiguous()))

    def tell(self, text: str) -> str:
        """As Group says."""
        self.meet()
        if self.world == 1:
            return text
        import torch
        from accelerate.utils import broadcast

        data = list(text.encode())
        length = int(broadcast(torch.tensor([len(data)], device=self.device)))
        sent = torch.tensor(data if self.leads else [0] * length, dtype=torch.uint8, device=self.device)
        return bytes(broadcast(sent).tolist()).decode()

    def close(self) -> None:
        """Lets go of the connections."""
        self._state.destroy_process_group()


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    import torch

    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _messages(parameters: Sequence[torch.nn.Parameter]) -> Iterable[list[torch.nn.Parameter]]:
    """The parameters in the same order, as many at a time as one message holds, of one dtype and device each."""
    held: list[torch.nn.Parameter] = []
    size = 0
    for one in parameters:
        other = held and (one.dtype, one.device) != (held[0].dtype, held[0].device)
        if held and (other or size + one.nbytes > _BYTES):
            yield held
            held, size = [], 0
        held.append(one)
        size += one.nbytes
    if held:
        yield held


def _spread_out(flat: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
    parts = flat.split([one.numel() for one in parameters])
    for one, part in zip(parameters, parts, strict=True):
        if one.grad is None:
            one.grad = part.view_as(one).clone()
        else:
            one.grad.copy_(part.view_as(one))
