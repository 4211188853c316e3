"""Compare our training step with the bare model, core's Train LoRA node and diffusers' script.

    python -m benchmarks.step [--rounds N] [--threads N] [--model NAME] [--batch N] [--picture FILE] [--docs]

The limit is a lower bound for any trainer of activations: forward and backward of the bare model, with a gradient for
the latent and for no parameter or text. Each case runs in its own process, and all contestants take turns in it. The
tables compare the process's own processor time, because on a shared machine it says more than wall time; with one
thread it equals the wall time of an idle machine. Memory is measured separately, each contestant in its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from dataclasses import asdict
from pathlib import Path

from tests.support.host import find_comfyui, read_version

from . import contestants, estimate, offload, report, start_up
from .contestants import Case
from .interleaved import Turn, rounds
from .peak_memory import peak_of
from .subprocess_run import OPTION, subprocess_run

MIDDLING = "SD1 middling"
TINY = ("SD1", "SDXL", "Flux as in diffusers", "SD3")
WARM_UP = 2
CASES = [Case(model, batch, on) for model in (*TINY, MIDDLING) for batch in (1, 4) for on in (False, True)]
# Twice the side, and more pictures, to show the growth of the cost.
GROWTH = (Case(MIDDLING, 1, side=16), Case(MIDDLING, 4, side=16), Case(MIDDLING, 1))
MEMORY = ("limit", "attention", "linear + conv", "core", "core, bypass", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns that count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", action="append", help="one of the models alone; more than once for several")
    parser.add_argument("--batch", type=int, help="one of the batches alone")
    parser.add_argument("--picture", type=Path, help="a PNG of the table")
    parser.add_argument(
        "--docs", action="store_true", help="puts the tables into docs/benchmarks.md, in place of these cases'"
    )
    parser.add_argument(OPTION, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_one(**json.loads(args.one))))
        return
    cases = [case for case in CASES if case.model in (args.model or [case.model])]
    cases = [case for case in cases if case.batch == (args.batch or case.batch)]
    host = ".".join(map(str, read_version(find_comfyui())))
    found = {}
    for case in cases:
        found[case] = _apart("steps", case, rounds=args.rounds, threads=args.threads)
        print(report.line(case, found[case], host), flush=True)
    told = [report.steps(found, args.threads, args.rounds, host)]
    largest = Case(MIDDLING, 1)
    if largest in found:
        grown = {case: _apart("growth", case, rounds=args.rounds, threads=1) for case in GROWTH}
        told.append(report.growth(grown, host))
        names = [name for name in MEMORY if name in found[largest]]
        told.append(report.memory({name: _apart("memory", largest, name=name) for name in names}, host))
        told.append(offload.table(args.rounds))
        told.append(estimate.run())
    if not args.model:
        told.append(start_up.measure(args.rounds))
    text = "\n\n".join(told)
    print("\n" + text)
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        report.draw(found, args.picture)
    if args.docs:
        report.put_into_docs(text)


def _apart(kind: str, case: Case, **more) -> dict:
    """Return the result of `_one`, run in its own process."""
    return subprocess_run("benchmarks.step", kind=kind, case=asdict(case), **more)


def _one(kind: str, case: dict, **more) -> dict:
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    return {"steps": _steps, "memory": _memory, "growth": _growth}[kind](Case(**case), **more)


def _steps(case: Case, rounds: int, threads: int) -> dict[str, list]:
    names = [name for name in contestants.ALL if name != "core, bypass" or contestants.has_bypass()]
    return _in_turns({name: functools.partial(contestants.ALL[name], case) for name in names}, rounds, threads)


def _in_turns(works: dict, count: int, threads: int) -> dict[str, list]:
    import torch

    torch.set_num_threads(threads)
    turns = {name: Turn(work, threads) for name, work in works.items()}
    return rounds(_able(turns), count, WARM_UP)


def _able(turns: dict[str, Turn]) -> dict[str, Turn]:
    """Return the contestants that make a first step.

    On some hosts core's node has no gradient for Flux unless it checkpoints.
    """
    found = {}
    for name, turn in turns.items():
        try:
            turn.next()
        except RuntimeError as error:
            if not name.startswith("core") or "inplace operation" not in str(error):
                raise
            continue
        found[name] = turn
    return found


def _growth(case: Case, rounds: int, threads: int) -> dict:
    """Return the floating-point operations of the bare limit, and the times of limit and step."""
    from torch.utils.flop_counter import FlopCounterMode

    works = {name: functools.partial(contestants.ALL[name], case) for name in ("limit", "attention")}
    found = _in_turns(works, rounds, threads)
    counter = FlopCounterMode(display=False)

    class Enough(Exception):
        pass

    def stand():
        raise Enough

    with contextlib.suppress(Enough), counter:
        contestants.limit(case, stand)
    return {**found, "operations": counter.get_total_flops()}


def _memory(case: Case, name: str) -> dict[str, float]:
    return peak_of(case, name)


if __name__ == "__main__":
    main()
