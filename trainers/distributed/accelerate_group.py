"""Process group on one machine or several, through Hugging Face accelerate."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from ..errors import PeerLostError
from ..process_group import GradientReducer, Group

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup, Store

    from .fsdp import ShardedWeights
    from .gradient_reducer import BucketReducer
    from .trained_shards import TrainedShards

log = logging.getLogger(__name__)

# Timeout of collectives: the main process may be drawing previews or saving a large state meanwhile.
_WAIT = timedelta(hours=2)


def _store_of_attempt(rank: int, world_size: int) -> Store:
    """Return a part of the launcher's store that holds nothing of an earlier attempt.

    torchrun keeps one store over its restarts: a process that is early reads the address that another one had before
    the restart (pytorch issue 135712). The main process therefore chooses a new name, and sends it to each process
    under that process's own new name. torchrun's count of restarts will not do: each machine counts its own.
    """
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, world_size, is_master=False, timeout=_WAIT)
    name = uuid4().hex
    if rank:
        store.set(f"graft/new/{rank}", name)
        attempt = store.get(name).decode()
        store.set(f"{attempt}/{rank}", "")
        return PrefixStore(attempt, store)
    missing = set(range(1, world_size))
    while missing:
        for other in list(missing):
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"graft/new/{other}"]):
                store.set(store.get(f"graft/new/{other}").decode(), name)
        time.sleep(0.05)
    return PrefixStore(name, store)


class AccelerateGroup(Group):
    """Process group started by `accelerate launch`, `torchrun` or the graph and described by environment variables.

    Attributes:
        local_rank: index of this process among those on its machine.
        device: device of the tensors that it communicates.
        bucket_group: torch's group for gradients; None for the one that serves everything else too.
    """

    def __init__(self, cpu: bool):
        from accelerate import PartialState
        from accelerate.utils import InitProcessGroupKwargs

        options = InitProcessGroupKwargs(timeout=_WAIT).to_kwargs()
        if cpu and "LOCAL_RANK" in os.environ:
            options["backend"] = "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            options |= {"store": _store_of_attempt(rank, world_size), "rank": rank, "world_size": world_size}
        self._state = PartialState(cpu=cpu, **options)
        self.rank = self._state.process_index
        self.world_size = self._state.num_processes
        self.local_rank = self._state.local_process_index
        self.device = self._state.device
        self.bucket_group = None
        self._left = False
        self._shards: ShardedWeights | None = None
        self._reducer: BucketReducer | None = None

    def all_reduce(self, number: float = 0.0) -> float:
        """Wait for all processes and return the sum of their numbers; raise PeerLostError if one has aborted."""
        total, left = self.sum_numbers(number, 0.0)
        if left:
            self._left = True
            raise PeerLostError()
        return total

    def abort(self) -> None:
        """Tell the other processes that this one leaves. Do nothing if the group is already broken."""
        if self._left:
            return
        self._left = True
        if self.sharded:
            # The others may be waiting for shards of weights, where no message would reach them.
            self._break()
            return
        # If the others are gone too, keep the error that made this process leave.
        with suppress(PeerLostError):
            if self._reducer is not None:
                self._release(self._reducer)
            self.sum_numbers(0.0, 1.0)

    def _release(self, reducer: BucketReducer) -> None:
        """Send what the others wait for, or close the connection if this process has no memory for it."""
        try:
            reducer.release()
        except (RuntimeError, MemoryError):
            log.exception("Graft: cannot tell the other processes that this one ends.")
            self._break()
            raise PeerLostError() from None

    def _break(self) -> None:
        """Close the connection, so that the other processes fail wherever they wait.

        GPU backends notice only when this process exits; then the launcher ends the others.
        """
        if self.device.type == "cpu":
            self._state.destroy_process_group()

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all processes. Raise PeerLostError if a connection is broken."""
        if self.world_size == 1:
            # Some devices have no float64. A single process does not need them to.
            return list(numbers)
        import torch
        from accelerate.utils import reduce

        with self.connected():
            return reduce(torch.tensor(numbers, dtype=torch.float64, device=self.device), "sum").tolist()

    def gather(self, values: list[float], whole: int) -> list[float]:
        """Gather the values of all processes into a list of length `whole`, by summing zero-padded lists."""
        # accelerate's `gather` needs lists of one length, but these may differ by one. Its `gather_object` pickles.
        first = whole * self.rank // self.world_size
        mine = [0.0] * whole
        mine[first : first + len(values)] = values
        return self.sum_numbers(*mine)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Raise PeerLostError for torch's errors about a broken connection: another process is gone."""
        try:
            yield
        except RuntimeError as error:
            self._left = True
            # Release the processes that wait for this one now, before it saves its progress.
            self._break()
            if "out of memory" in str(error):
                raise
            raise PeerLostError() from error

    def reducer(self, parameters: Sequence[nn.Parameter], half: bool = False) -> GradientReducer:
        """Return a `BucketReducer`, which `abort` releases."""
        if self.world_size == 1:
            return GradientReducer()
        from .gradient_reducer import BucketReducer

        self._reducer = BucketReducer(parameters, self, half)
        return self._reducer

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors with the main process's values, in place."""
        if self.world_size == 1:
            return
        import torch
        from accelerate.utils import broadcast

        for tensor in tensors:
            with torch.no_grad(), self.connected():
                tensor.copy_(broadcast(tensor.detach().to(self.device).contiguous()))

    def broadcast_text(self, text: str) -> str:
        """Return the main process's text in every process."""
        self.all_reduce()
        if self.world_size == 1:
            return text
        import torch
        from accelerate.utils import broadcast

        data = list(text.encode())
        with self.connected():
            length = int(broadcast(torch.tensor([len(data)], device=self.device)))
            sent = torch.tensor(data if self.is_main else [0] * length, dtype=torch.uint8, device=self.device)
            return bytes(broadcast(sent).tolist()).decode()

    def shard(
        self,
        tree: nn.Module,
        keep: Iterable[torch.Tensor],
        needs_input_grad: bool,
        hybrid: bool,
        trained: dict[str, nn.Parameter] | None = None,
    ) -> TrainedShards | None:
        """Shard the weights of a tree with `ShardedWeights`. A single process keeps them whole."""
        if self.world_size == 1:
            return None
        from torch import distributed

        from .fsdp import ShardedWeights

        self.all_reduce()
        if trained:
            self.broadcast(trained.values())
        # Messages of one group keep their order, but gradients and shards of weights do not wait for each other.
        self.bucket_group = distributed.new_group(timeout=_WAIT)
        processes = self._processes_of_machine() if hybrid else None
        self._shards = shards = ShardedWeights(tree, keep, self, needs_input_grad, processes, trained)
        log.info(
            "Graft: sharded the %s weights of %d blocks (%.1f MB) over %d processes%s.",
            "frozen" if trained is None else "trained",
            shards.blocks,
            shards.divided / 1e6,
            shards.shares,
            f"; {shards.whole / 1e6:.1f} MB of them are whole in each" if shards.whole else "",
        )
        return shards.trained

    def _processes_of_machine(self) -> ProcessGroup:
        """Return torch's group of this machine's processes. Launchers number all processes machine by machine."""
        from torch import distributed

        machines: list[list[int]] = []
        for rank, place in enumerate(self.gather([float(self.local_rank)], self.world_size)):
            if not machines or place == 0:
                machines.append([])
            machines[-1].append(rank)
        # Every process has to take part in making every group.
        groups = [distributed.new_group(ranks, timeout=_WAIT) for ranks in machines]
        return next(group for group, ranks in zip(groups, machines, strict=True) if self.rank in ranks)

    @property
    def sharded(self) -> bool:
        """Return True if weights are sharded."""
        return self._shards is not None

    @property
    def lockstep(self) -> bool:
        """Return True if all processes must make the same forward passes at this moment."""
        return self._shards is not None and not self._shards.alone

    @contextmanager
    def main_process_only(self) -> Iterator[bool]:
        """Yield True in the main process and False in the others. Sharded groups serve their shards meanwhile."""
        if self._shards is None:
            yield self.is_main
            return
        with self._shards.main_process_only() as mine:
            yield mine

    def reset_after_failure(self) -> None:
        """Reset the sharded weights after an interrupted forward pass."""
        if self._shards is not None:
            self._shards.reset_after_failure()

    def broadcast_int(self, number: int) -> int:
        """Return the main process's number in every process. Raise PeerLostError if a process has left."""
        import torch
        from accelerate.utils import broadcast

        with self.connected():
            return int(broadcast(torch.tensor([number], device=self.device)))

    def gather_shares(self, whole: torch.Tensor, share: torch.Tensor, processes: ProcessGroup, asynchronous: bool):
        """All-gather `whole` from the shard of each of the processes. Return torch's handle if `asynchronous`.

        Raises:
            PeerLostError: a process has left.
        """
        from torch import distributed

        # Newer versions of torch renamed the function.
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        with self.connected():
            return gather(whole, share, group=processes, async_op=asynchronous)

    def scatter_sum(self, share: torch.Tensor, whole: torch.Tensor, processes: ProcessGroup, asynchronous: bool):
        """Sum `whole` over the processes and keep this one's share. Return and raise as `gather_shares`."""
        from torch import distributed

        scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
        with self.connected():
            return scatter(share, whole, group=processes, async_op=asynchronous)

    def close(self) -> None:
        """Destroy the process group."""
        self._state.destroy_process_group()
