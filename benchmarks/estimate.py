"""Compare a run's estimate before the first step with the steps that follow.

    python -m benchmarks.estimate [--steps N]

Memory is the process's peak resident memory minus its memory before the model was made. Time is the median wall time
of the steps. Each case runs in its own process. Other programs on the machine change the time between the estimate
and the steps, so the median of several tries counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from .peak_memory import Peak
from .subprocess_run import OPTION, subprocess_run

MODEL = "SD1 middling"
BAR = 0.15
MEGABYTE = 1 << 20
WARM_UP = 2
FULL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "max_grad_norm": 0.0}
LORA = {"rank": 8, "alpha": 8.0, "targets": "attention"}
CASES = {
    "LoRA on attention": {**LORA, "batch_size": 1},
    "batch 4": {**LORA, "batch_size": 4},
    "batch 4, checkpointed": {**LORA, "batch_size": 4, "checkpointing": True},
    "batch 4 in parts of 2": {**LORA, "batch_size": 4, "micro_batch": 2},
    "linear + conv": {**LORA, "batch_size": 1, "targets": "linear + conv"},
    "all weights, AdamW": {**FULL, "batch_size": 1},
}


class _Enough(Exception):
    """The exception that ends a training."""


def _one(name: str, steps: int) -> dict[str, float]:
    """Run one case in this process and return its estimated and measured bytes and seconds."""
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    import torch

    torch.set_num_threads(1)
    # Warm up first, so that imports and one-time setup do not count.
    _train("SD1", name, steps)
    peak = Peak()
    told, took = _train(MODEL, name, steps)
    return {"memory": told["memory"], "seconds": told["seconds"], "peak": peak(), "took": statistics.median(took)}


def _train(model: str, name: str, steps: int) -> tuple[dict, list[float]]:
    from tests.support import models

    told: dict = {}
    took: list[float] = []

    def report(event, payload):
        if event == "estimate":
            told.update(payload)
        if event == "step":
            took.append(payload["seconds"])
            if len(took) == WARM_UP + steps:
                raise _Enough

    fields = {"steps": 1000, "save_every": 1000, "keep_last": 1, **CASES[name]}
    with models.in_training(models.patcher(model), model, report=report, examples=4, **fields) as training:
        try:
            with tempfile.TemporaryDirectory() as folder:
                models.train(training, Path(folder))
        except _Enough:
            pass
    return told, took[WARM_UP:]


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Return the cases as lines of Markdown."""
    lines = [
        f"What a run says before its first step, over what its steps then take ({MODEL}, fp32, one thread; bar: within "
        f"{BAR:.0%}).",
        "",
        "| case | memory said, MB | taken | said / taken | time of a step said, ms | taken | said / taken |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        memory = _middle(rows, "memory", "peak")
        seconds = _middle(rows, "seconds", "took")
        lines.append(
            f"| {name} | {memory['memory'] / MEGABYTE:.0f} | {memory['peak'] / MEGABYTE:.0f} "
            f"| {memory['memory'] / memory['peak']:.2f} "
            f"| {1000 * seconds['seconds']:.0f} | {1000 * seconds['took']:.0f} "
            f"| {seconds['seconds'] / seconds['took']:.2f} |"
        )
    return "\n".join(lines)


def _middle(rows: list[dict[str, float]], said: str, taken: str) -> dict[str, float]:
    return sorted(rows, key=lambda row: row[said] / row[taken])[len(rows) // 2]


def run(steps: int = 5, tries: int = 3) -> str:
    """Measure all cases and return the table."""
    found = {
        name: [subprocess_run("benchmarks.estimate", name=name, steps=steps) for _ in range(tries)] for name in CASES
    }
    return table(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(OPTION, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_one(**json.loads(args.one))))
        return
    print(run(args.steps))


if __name__ == "__main__":
    main()
