"""Time and memory cost of the memory options: `python -m benchmarks.offload`.

Covers checkpointing with and without kept attention, and offload of frozen blocks. On a CPU, offloaded blocks go to a
file. The graph's own MODEL stays in memory beside it, as on a computer with a GPU, so the process shrinks by
activations alone. The share of the blocks' weights that was in memory at once shows what a GPU would save. Steps are
compared by interleaved processor time, as in the other tables. Each peak is that of its own process.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import contestants, peak_memory
from .contestants import Case
from .interleaved import Turn, rounds
from .subprocess_run import OPTION, subprocess_run

MODEL = "SD1 middling"
# The last is as large as SD1's own pictures of 512 x 512.
CASES = (Case(MODEL, 1, side=32), Case(MODEL, 4, side=32), Case(MODEL, 1, side=64))
WARM_UP = 2
# By name, `checkpointing` of `Case` and fields of the recipe.
KINDS = {
    "in place": (False, {}),
    "attention kept": (True, {"recompute": "all but attention"}),
    "checkpointed": (True, {}),
    "offloaded": (False, {"offload": "on"}),
}
_OWN = 1  # of (seconds, seconds of processor time)


_apart = functools.partial(subprocess_run, "benchmarks.offload")


def table(count: int) -> str:
    """Measure so many rounds and return the rows."""
    first, *others = KINDS
    heads = ["batch", "latents", *(f"step over {first}: {kind}" for kind in others), "offloaded over checkpointed"]
    heads += [*(f"peak, {kind}, MB" for kind in KINDS), "blocks' weights in memory at once, MB"]
    lines = [
        f"`offload` on against off, and checkpointing with attention kept and without, {MODEL}, LoRA of rank 8 on",
        "attention, fp32 on one thread of the CPU, where blocks go to a file: medians and quartiles of",
        f"{count} rounds of processor time.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for case in CASES:
        of = {"batch": case.batch, "side": case.side}
        steps = _apart(what="steps", count=count, **of)
        peaks = {kind: _apart(what="peak", kind=kind, **of) for kind in KINDS}
        cells = [str(case.batch), f"{case.side} x {case.side}", *(_ratio(steps, kind, first) for kind in others)]
        cells += [_ratio(steps, "offloaded", "checkpointed")]
        cells += [f"{peaks[kind]['peak'] / 1e6:.0f}" for kind in KINDS]
        last = peaks["offloaded"]
        cells.append(f"{last['at once'] / 1e6:.0f} of {last['all'] / 1e6:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(steps: dict[str, list], kind: str, over: str) -> str:
    pairs = zip(steps[kind], steps[over], strict=True)
    low, middle, high = statistics.quantiles([mine[_OWN] / other[_OWN] for mine, other in pairs], n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _one(what: str, batch: int, side: int, **more) -> dict:
    import torch

    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    torch.set_num_threads(1)
    return {"steps": _steps, "peak": _peak}[what](Case(MODEL, batch, side=side), **more)


def _work(kind: str) -> Callable[[Case, Callable[[], None]], None]:
    def work(case: Case, stand: Callable[[], None]) -> None:
        checkpointing, fields = KINDS[kind]
        contestants.ours(replace(case, checkpointing=checkpointing), stand, **fields)

    return work


def _steps(case: Case, count: int) -> dict[str, list]:
    turns = {kind: Turn(functools.partial(_work(kind), case), 1) for kind in KINDS}
    return rounds(turns, count, WARM_UP)


def _peak(case: Case, kind: str) -> dict[str, int]:
    with _watching() as found:
        peak = peak_memory.peak_of_work(case, _work(kind))
    return {"peak": peak, **found}


@contextmanager
def _watching() -> Iterator[dict[str, int]]:
    """Yield the largest part of a mapped file that was in memory as a block ended, and the file's size, in bytes."""
    from graft_pack.trainers.memory.offload import BlockPrefetcher

    found = {"at once": 0, "all": 0}
    real = BlockPrefetcher.leave

    def leave(self, number, here):
        size, there = _mapped_now()
        found.update({"at once": max(found["at once"], there), "all": max(found["all"], size)})
        real(self, number, here)

    BlockPrefetcher.leave = leave
    try:
        yield found
    finally:
        BlockPrefetcher.leave = real


def _mapped_now() -> tuple[int, int]:
    """Return (size, bytes in memory) of mapped files that are already deleted."""
    size = there = 0
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith("(deleted)")
        elif ours and line.startswith("Size:"):
            size += int(line.split()[1]) * 1024
        elif ours and line.startswith("Rss:"):
            there += int(line.split()[1]) * 1024
    return size, there


if __name__ == "__main__":
    if sys.argv[1:2] == [OPTION]:
        print(json.dumps(_one(**json.loads(sys.argv[2]))))
    else:
        print(table(int((sys.argv[1:] or ["7"])[0])))
