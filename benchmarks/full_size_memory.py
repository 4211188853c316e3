"""Peak memory of a training step on networks of their published size, counted without their weights and without a GPU.

    python -m benchmarks.full_size_memory [NAME ...] [--sides 512 768 1024] [--targets attention] [--quantized] [--docs]
    python -m benchmarks.full_size_memory --clips [33 81] [--docs]
    python -m benchmarks.full_size_memory --check

A step is the product's own: its LoRA layers, its checkpointing and offloading, its loss, clipping and AdamW. It runs on
ComfyUI's classes under FakeTensorMode, and a `TensorTracker` counts the storages that are alive. `--docs` writes the
tables of docs/memory.md. `--check` compares the count with the measured process on the 45 M layout in fp32.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from . import contestants
from .peak_memory import peak_of_work
from .real_networks import BLOCKS, CLIPS, LABELS, MIDDLING, NAMES, adapt, fake_tensors, family_name, inputs, network
from .subprocess_run import OPTION, subprocess_run

DOCS = Path(__file__).parents[1] / "docs" / "memory.md"
GIGABYTE = 1 << 30
CARDS = (8, 12, 16, 24)
# For what the count does not see: the CUDA context, workspaces, fragments of the allocator and the display.
RESERVE = 1.0
RANK = 16
# Measured and counted memory differ at most so much.
BAR = 0.10


@dataclass(frozen=True)
class Way:
    """Settings that change a step's memory.

    Attributes:
        checkpointing, keep_attention, offload: as in Graft Memory Options.
        stored: dtype of the base's weights if it is not the dtype that the network computes in.
        base_dtype: as in Graft Memory Options.
    """

    checkpointing: bool = False
    keep_attention: bool = False
    offload: bool = False
    stored: torch.dtype | None = None
    base_dtype: str = "as it is"


_FP8 = torch.float8_e4m3fn
# The fastest first.
WAYS = {
    "no option": Way(),
    "`recompute` all but attention": Way(checkpointing=True, keep_attention=True),
    "`checkpointing`": Way(checkpointing=True),
    "fp8 base, `checkpointing`": Way(checkpointing=True, stored=_FP8),
    "`offload`": Way(offload=True),
    "fp8 base, `offload`": Way(offload=True, stored=_FP8),
}
QUANTIZED = {
    "8 bits, `checkpointing`": Way(checkpointing=True, base_dtype="int8"),
    "8 bits, `offload`": Way(offload=True, base_dtype="int8"),
    "nf4, `checkpointing`": Way(checkpointing=True, base_dtype="nf4"),
    "nf4, `offload`": Way(offload=True, base_dtype="nf4"),
}


class _Copies:
    """A transfer that allocates its copies when it starts, as a GPU's does."""

    def start(self, homes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.empty_like(home) for home in homes]

    def finish(self, load: list[torch.Tensor]) -> list[torch.Tensor]:
        return load

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        pass


def _map_weights(weights: list[torch.Tensor], folder: str) -> tuple[list[torch.Tensor], _Copies]:
    return [weight.detach() for weight in weights], _Copies()


def _frozen(block: torch.nn.Module, kept: set[int]) -> list[tuple[torch.nn.Module, str]]:
    """List what the offloader's function of this name lists, which takes no fake tensor for a plain one."""
    rows = [(owner, name, weight) for owner in block.modules() for name, weight in owner._parameters.items()]
    return [
        (owner, name)
        for owner, name, weight in rows
        if weight is not None and not weight.requires_grad and id(weight) not in kept
    ]


class Training:
    """A network with a LoRA and AdamW after the first step, when the optimizer has its state.

    Make and use it under `counting`.

    Args:
        dtype: as of `real_networks.network`.
        way: settings of the base's weights; `change` applies the others.
    """

    def __init__(self, name: str, dtype: torch.dtype, way: Way, targets: str, rank: int):
        from graft_pack.trainers.memory.quantization import quantize_linears
        from graft_pack.trainers.optimizers.registry import OPTIMIZERS

        from tests.support import models

        self._name, self._dtype = name, dtype
        self._module = network(name, dtype, way.stored)
        if way.base_dtype != Way.base_dtype:
            quantize_linears(self._module, way.base_dtype, torch.device("cpu"))
        self._trained = list(adapt(self._module, name, targets, rank, dtype).values())
        self._optimizer = OPTIMIZERS["AdamW"].make([{"params": self._trained}], models.recipe("SD1", rank=rank))
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def change(self, way: Way) -> None:
        """Apply settings. Those of a later member of WAYS or QUANTIZED may follow those of an earlier one."""
        from graft_pack.trainers.memory.autograd import blocks_of
        from graft_pack.trainers.memory.checkpointing import checkpoint_blocks, forget_attention
        from graft_pack.trainers.memory.offload import offload_trees

        blocks = blocks_of(self._module)
        if way.checkpointing:
            checkpoint_blocks(blocks, way.keep_attention)
        if not way.keep_attention:
            forget_attention(blocks)
        if way.offload:
            offload_trees([(self._module, torch.device("cpu"))], self._trained, "", lambda weight: True)

    def peak(self, side: int, batch: int = 1) -> int:
        """Return the peak bytes of a step."""
        from graft_pack.trainers.memory.offload import is_offloaded
        from graft_pack.trainers.memory.tracking import TensorTracker

        weights = [*self._module.parameters(), *self._module.buffers()]
        offloaded = [weight for weight in weights if is_offloaded(weight)]
        state = [value for slots in self._optimizer.state.values() for value in slots.values()]
        held = [*(weight for weight in weights if not is_offloaded(weight)), *state]
        with TensorTracker(held, offloaded) as tracker:
            self._step(side, batch)
        return tracker.peak

    def _step(self, side: int, batch: int) -> None:
        from graft_pack.trainers.families import family_of
        from graft_pack.trainers.memory.autograd import OutOfPlace
        from graft_pack.trainers.objective.losses import example_losses

        args, keywords = inputs(self._name, side, self._dtype, batch)
        with OutOfPlace() if family_of(family_name(self._name)).adds_in_place else nullcontext():
            prediction = self._module(*args, **keywords, transformer_options={})
        example_losses(prediction, torch.empty(prediction.shape)).sum().backward()
        del prediction
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


@contextmanager
def counting(dtype: torch.dtype) -> Iterator[None]:
    """Compute with fake tensors, in 16 bits as on a GPU and in fp32 as on a CPU, and offload as on a GPU."""
    from graft_pack.trainers.memory.quantization import _pairs

    with ExitStack() as stack:
        # The table is a fake tensor too.
        stack.callback(_pairs.cache_clear)
        stack.enter_context(fake_tensors())
        for name, function in (("map_weights", _map_weights), ("_frozen", _frozen)):
            stack.enter_context(mock.patch(f"graft_pack.trainers.memory.offload.{name}", function))
        if dtype != torch.float32:
            stack.enter_context(mock.patch("graft_pack.trainers.lowrank.products.is_on_cpu", lambda tensor: False))
        yield


def peaks(name: str, sides: Sequence[int], targets: str, ways: dict[str, Way]) -> dict[tuple[str, int], int]:
    """Return the peak bytes of a step in bf16 by settings and side of the picture."""
    found = {}
    with counting(torch.bfloat16):
        bases = {(way.stored, way.base_dtype): way for way in ways.values()}
        for base, member in bases.items():
            training = Training(name, torch.bfloat16, member, targets, RANK)
            for label, way in ways.items():
                if (way.stored, way.base_dtype) == base:
                    training.change(way)
                    found.update({(label, side): training.peak(side) for side in sides})
    return found


def clip_peaks(name: str, frames: Sequence[int], targets: str, ways: dict[str, Way]) -> dict[tuple[str, int], int]:
    """Return what `peaks` does, from counts with three and four blocks: each further block adds the same."""
    few, more = (_peaks_with(blocks, name, frames, targets, ways) for blocks in (3, 4))
    return {key: few[key] + (BLOCKS[name] - 3) * (more[key] - few[key]) for key in few}


def _peaks_with(blocks: int, name: str, *given) -> dict[tuple[str, int], int]:
    with mock.patch.dict(BLOCKS, {name: blocks}):
        return peaks(name, *given)


def weights_of(name: str) -> int:
    """Return the bytes of a network's weights in 16 bits."""
    with fake_tensors():
        return sum(parameter.nbytes for parameter in network(name, torch.bfloat16).parameters())


# The tables of docs/memory.md

# Columns that identify a row.
_KEYS = 3


def count(name: str, sides: Sequence[int], targets: str, ways: dict[str, Way]) -> list[list[str]]:
    """Return a network's rows: its peaks in GB."""
    found = (clip_peaks if name in CLIPS else peaks)(name, sides, targets, ways)
    first = [LABELS.get(name, name), f"{weights_of(name) / GIGABYTE:.1f} GB"]
    return [[*first, str(side), *(f"{found[way, side] / GIGABYTE:.1f}" for way in ways)] for side in sides]


def tables(rows: Sequence[Sequence[str]], ways: dict[str, Way], clips: bool = False) -> str:
    """Return the peaks as Markdown; of WAYS also the fastest settings that fit into each card."""
    what = "frames" if clips else "pictures of"
    peaks = _table(("model", "weights", what, *ways), rows)
    if ways is not WAYS:
        return peaks
    fitting = [[*cells[:1], cells[2], *(_fastest(cells[_KEYS:], card) for card in CARDS)] for cells in rows]
    heads = ["model", what, *(f"{card} GB" for card in CARDS)]
    return f"{_table(heads, fitting)}\n\nPeaks in GB:\n\n{peaks}"


def _fastest(peaks: Sequence[str], card: int) -> str:
    return next((way for way, size in zip(WAYS, peaks, strict=True) if float(size) <= card - RESERVE), "-")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def put_into_docs(rows: Sequence[Sequence[str]], ways: dict[str, Way], clips: bool) -> None:
    """Replace these rows in docs/memory.md; those of other networks stay."""
    name = "clips" if clips else "counted" if ways is WAYS else "quantized"
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, rest = DOCS.read_text(encoding="utf-8").split(begin)
    known, tail = rest.split(end)
    lines = [line.strip("| ").split(" | ") for line in known.splitlines() if line.startswith("| ")]
    size = _KEYS + len(ways)
    merged = {tuple(cells[:_KEYS]): cells for cells in lines if len(cells) == size and cells[2].isdigit()}
    merged.update({tuple(cells[:_KEYS]): list(cells) for cells in rows})
    order = [LABELS.get(name, name) for name in (*NAMES, *CLIPS)]
    whole = sorted(merged.values(), key=lambda cells: (order.index(cells[0]), int(cells[2])))
    DOCS.write_text(f"{head}{begin}\n{tables(whole, ways, clips)}\n{end}{tail}", encoding="utf-8")


# The check against the measured process

# Targets, batch, side of the picture, settings.
CHECKS = (
    ("attention", 1, 256, "no option"),
    ("attention", 1, 512, "no option"),
    ("attention", 4, 256, "no option"),
    ("attention", 4, 256, "`recompute` all but attention"),
    ("linear + conv", 4, 256, "`checkpointing`"),
)


def check() -> str:
    """Return counted and measured peaks on the 45 M layout as Markdown."""
    from .memory import AT_ONCE

    heads = ("targets", "batch", "pictures of", "settings", "counted, MB", "measured, MB", "counted / measured")
    rows = []
    for case in CHECKS:
        counted = _counted(*case)
        measured = subprocess_run("benchmarks.full_size_memory", AT_ONCE, case=case)
        verdict = "" if abs(counted / measured - 1) <= BAR else ", missed"
        sizes = [f"{size / (1 << 20):.0f}" for size in (counted, measured)]
        rows.append([*map(str, case), *sizes, f"{counted / measured:.2f}{verdict}"])
    return _table(heads, rows)


def _counted(targets: str, batch: int, side: int, way: str) -> int:
    with counting(torch.float32):
        training = Training(MIDDLING, torch.float32, Way(), targets, contestants.RANK)
        training.change(WAYS[way])
        return training.peak(side, batch)


def _measured(targets: str, batch: int, side: int, way: str) -> int:
    torch.set_num_threads(1)
    fields = {"targets": targets, "recompute": "all but attention" if WAYS[way].keep_attention else "everything"}
    case = contestants.Case(MIDDLING, batch, WAYS[way].checkpointing, side // 8)
    return peak_of_work(case, functools.partial(contestants.ours, **fields))


def _use_pack() -> None:
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 768, 1024], help="of the picture, in pixels")
    parser.add_argument("--clips", type=int, nargs="*", help=f"frames of clips instead: of {', '.join(CLIPS)}")
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--quantized", action="store_true", help="with the base quantized instead")
    parser.add_argument("--docs", action="store_true", help="puts the rows into docs/memory.md")
    parser.add_argument("--check", action="store_true", help="compares with the measured process instead")
    parser.add_argument(OPTION, help=argparse.SUPPRESS)
    args = parser.parse_args()
    _use_pack()
    if args.one:
        print(json.dumps(_measured(*json.loads(args.one)["case"])))
        return
    if args.check:
        print(check())
        return
    ways = QUANTIZED if args.quantized else WAYS
    clips = args.clips is not None
    names, sizes = (CLIPS, args.clips or [33, 81]) if clips else (args.names, args.sides)
    rows = [row for name in names for row in count(name, sizes, args.targets, ways)]
    print(tables(rows, ways, clips))
    if args.docs:
        put_into_docs(rows, ways, clips)


if __name__ == "__main__":
    main()
