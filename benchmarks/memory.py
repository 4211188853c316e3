"""Memory of full fine-tuning against its lower bound.

    python -m benchmarks.memory [--steps N]

The lower bound is the base, the trained weights, the state that the optimizer and the average keep for them, and the
memory of a forward and backward that drops each gradient at once: activations and the largest layer's gradient. The
last part is measured, the others are counted. Each case runs in its own process, with saves on the way, and ends with
the adapter as the node hands it on.

In shares, each of several processes holds its share of all but base and activations. The bound is the same with these
shares; the main process writes the saves, and gets the whole adapter afterwards, which is not counted.

Each case runs twice: with the system's allocator as it is, which keeps some freed memory to itself, and with an
allocator setting that returns all of it at once, which shows the memory of the tensors.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from .peak_memory import Peak
from .subprocess_run import OPTION, subprocess_run

MODEL = "SD1 middling"
BAR = 1.10
MEGABYTE = 1 << 20
FULL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "batch_size": 1}
# By name. The first is measured and not trained; the last are outside the bar, for comparison.
CASES = {
    "forward and backward": None,
    "AdamW, average": {"ema_decay": 0.999},
    "the same, resumed": {"ema_decay": 0.999},
    "AdamW": {},
    "Adafactor": {"optimizer": "Adafactor", "beta1": 0.0, "beta2": 0.0},
    "AdamW, clipped": {"max_grad_norm": 1.0},
}
# glibc's name for the size above which freed memory returns to the system at once.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "262144"}
OUTSIDE = ("AdamW, clipped",)
# Processes that share the first case's weights, and the case's name.
SHARES = {count: f"shares of {count}" for count in (2, 4)}
CASES |= dict.fromkeys(SHARES.values(), {"ema_decay": 0.999, "shard": "on"})


def _one(name: str, steps: int, folder: str) -> dict[str, int]:
    """Run one case in this process and return bytes by use; a resumed case adds two steps in the same folder."""
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    import torch

    torch.set_num_threads(1)
    settings = {**FULL, "max_grad_norm": 0.0, "steps": steps, "save_every": 2, "keep_last": 1, **(CASES[name] or {})}
    resumed = name.endswith("resumed")
    group = None
    if name in SHARES.values():
        from graft_pack.trainers.distributed.accelerate_group import AccelerateGroup

        group = AccelerateGroup(cpu=True)
        folder = f"{folder} {group.rank}"
    with tempfile.TemporaryDirectory() as scratch:
        # Warm up first, so that imports and one-time setup do not count.
        _train("SD1", settings, Path(scratch), False, group)
        peak = Peak()
        if CASES[name] is None:
            return {**_dropping(), "peak": peak()}
        settings["steps"] += 2 * resumed
        return {**_train(MODEL, settings, Path(folder), resumed, group), "peak": peak()}


def _train(model: str, settings: dict, folder: Path, resumed: bool, group) -> dict[str, int]:
    import torch
    from graft_pack.trainers.engine.oom_fallback import place_weights
    from graft_pack.trainers.memory.tracking import bytes_of

    from tests.support import models

    with torch.inference_mode():
        made = models.patcher(model)
    with models.in_training(made, model, side=32, examples=2, **settings) as training:
        if group is not None:
            host = replace(training.host, group=group)
            training = replace(training, host=host, plan=place_weights(training.plan, None, host))
            return _shares(models.train(training, folder, resumed), training)
        state = models.train(training, folder, resumed)
        tree = training.denoiser.module
        optimizer = [value for slots in state.optimizer.values() for value in slots.values() if torch.is_tensor(value)]
        found = {
            "base": bytes_of(tree.buffers()),
            "trained": bytes_of(state.trainables.values()),
            "optimizer": bytes_of(optimizer),
            "average": bytes_of(state.ema.values()),
        }
        state.optimizer = {}
        adapter = training.plan.export(state.ema or state.trainables, 0).adapter.taken()
        assert bytes_of(adapter.values()) == found["trained"]
    return found


def _shares(state, training) -> dict[str, int]:
    """Return the bytes of base and shares after a training in shares."""
    from graft_pack.trainers.memory.tracking import bytes_of

    slots = (value for kept in state.optimizer.values() for value in kept.values() if hasattr(value, "shape"))
    found = {"trained": state.trainables.values(), "optimizer": slots, "average": state.ema.values()}
    count = training.host.group.world_size
    found = {name: sum(one.numel() * one.element_size() for one in held) // count for name, held in found.items()}
    return {"base": bytes_of(training.denoiser.module.buffers()), **found}


def _in_shares(count: int, how: dict[str, str], steps: int, folder: str) -> dict[str, int]:
    """Run the processes of a case in shares; return the bytes of the one with the highest peak."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> dict[str, int]:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = how | {name: str(value) for name, value in places.items()}
        return subprocess_run("benchmarks.memory", environment, name=SHARES[count], steps=steps, folder=folder)

    with ThreadPoolExecutor(count) as pool:
        return max(pool.map(one, range(count)), key=lambda found: found["peak"])


def _dropping() -> dict[str, int]:
    """Run forward and backward alone, dropping each gradient as soon as it exists."""
    import torch
    from graft_pack.trainers.memory.tracking import bytes_of

    from tests.support import models

    with torch.inference_mode():
        made = models.patcher(MODEL)
    with models.in_training(made, MODEL, side=32, examples=1, **FULL) as training:
        for parameter in training.plan.trainables.values():
            parameter.register_post_accumulate_grad_hook(_drop)
        training.losses().backward()
        largest = max(parameter.numel() * 4 for parameter in training.plan.trainables.values())
        base = bytes_of(training.denoiser.module.buffers())
        return {"base": base, "trained": bytes_of(training.plan.trainables.values()), "largest": largest}


def _drop(parameter) -> None:
    parameter.grad = None


PARTS = ("base", "trained", "optimizer", "average")


def table(found: dict[str, tuple[dict[str, int], dict[str, int]]]) -> str:
    """Return the cases as lines with their verdicts, with the default allocator and with all memory returned."""
    rows = dict(found)
    firsts = rows.pop("forward and backward")
    passing = [one["peak"] - one["base"] - one["trained"] for one in firsts]
    lines = [
        f"SD1 layout, {firsts[0]['base'] / 4e6:.1f} M parameters, fp32 on the CPU, batch 1 of 32x32; MB",
        f"activations and the largest layer's gradient ({firsts[0]['largest'] / MEGABYTE:.0f}): "
        f"{passing[0] / MEGABYTE:.0f}, all given back {passing[1] / MEGABYTE:.0f}",
        "",
        f"{'':18} {'base':>5} {'trained':>8} {'optimizer':>10} {'average':>8} {'limit':>6} {'peak':>6} {'ratio':>6}"
        f"  {'given back: limit':>17} {'peak':>6} {'ratio':>6}  bar {BAR:g}",
    ]
    for name, measured in rows.items():
        line = f"{name:18}" + "".join(
            f" {measured[0][part] / MEGABYTE:>{width}.0f}" for part, width in zip(PARTS, (5, 8, 10, 8), strict=True)
        )
        ratios = []
        for row, rest, width in zip(measured, passing, (6, 18), strict=True):
            limit = rest + sum(row[part] for part in PARTS)
            ratios.append(row["peak"] / limit)
            line += f" {limit / MEGABYTE:>{width}.0f} {row['peak'] / MEGABYTE:>6.0f} {ratios[-1]:>6.3f}"
        verdicts = ["held" if ratio <= BAR else "MISSED" for ratio in ratios]
        lines.append(f"{line}  {'for comparison' if name in OUTSIDE else ', '.join(verdicts)}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", choices=[*CASES], help="measure only this one beside the bare passes")
    parser.add_argument(OPTION, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_one(**json.loads(args.one))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in CASES if args.case is None else ("forward and backward", args.case):
            if not name.endswith("resumed"):
                folder = Path(scratch) / name
            ways = (("plain", {}), ("at once", AT_ONCE))
            counts = [count for count, case in SHARES.items() if case == name]
            found[name] = tuple(
                _in_shares(counts[0], how, args.steps, str(folder / way))
                if counts
                else subprocess_run("benchmarks.memory", how, name=name, steps=args.steps, folder=str(folder / way))
                for way, how in ways
            )
    print(table(found))


if __name__ == "__main__":
    main()
