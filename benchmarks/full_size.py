"""Count the work of a training step on networks of their published size, without their weights and without a GPU.

    python -m benchmarks.full_size [NAME ...] [--side 1024] [--rank 16] [--targets attention "linear + conv"]
        [--dtypes bf16 fp16]

The networks are ComfyUI's own classes, built under FakeTensorMode: operations get shapes and dtypes, but no numbers.
The table gives a step's work over that of the bare network, whose backward computes gradients of activations only:

    launches   operations that start a kernel on a GPU; views start none
    bytes      read and written by these operations
    flops      of products and attention, as torch counts them
    roofline   sum over the operations of max(flops / peak, bytes / bandwidth, launch time), by GPU
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .real_networks import LABELS, NAMES, adapt, fake_tensors, inputs, network

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Networks whose activations exceed a usual GPU's memory: their blocks are checkpointed.
CHECKPOINTED = frozenset({"SD3", "Flux", "Lumina 2", "Qwen-Image"})

# Peak FLOP/s in 16 bits, bytes/s of memory, seconds of a launch.
GPUS = {"H100": (800e12, 3.35e12, 4e-6), "4090": (150e12, 1.0e12, 4e-6), "3060": (50e12, 0.36e12, 5e-6)}

# Operations that start no kernel: they change shapes or allocate.
VIEWS = frozenset(
    [
        *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "device", "expand", "flatten"),
        *("empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided"),
        "permute",
        *("reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind"),
        *("unflatten", "unsqueeze", "view"),
    ]
)

# torch counts no flops of these operations in place.
_OUT_OF_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}

# Deferred tensors are computed below autograd, which otherwise replaces these operations by those that torch counts.
_COMPOSED = (torch.ops.aten.linear.default, torch.ops.aten.matmul.default)


@dataclass
class Work(TorchDispatchMode):
    """Counts of all operations within the block.

    Attributes:
        names: launches by operation.
        moved: bytes by operation.
        seconds: roofline by GPU.
    """

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    names: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GPUS, 0.0))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        from graft_pack.trainers.lowrank.deferred import Deferred
        from torch.utils._pytree import tree_leaves
        from torch.utils.flop_counter import flop_registry

        if Deferred in types:
            # The operations that compute it come first.
            return NotImplemented
        kwargs = kwargs or {}
        if operation in _COMPOSED:
            with self:
                return operation.decompose(*args, **kwargs)
        result = operation(*args, **kwargs)
        name = operation._schema.name.split("::")[1]
        if name in VIEWS or name == "_local_scalar_dense":
            return result
        tensors = [value for value in tree_leaves((args, kwargs, result)) if torch.is_tensor(value)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        count = flop_registry.get(_OUT_OF_PLACE.get(operation._overloadpacket, operation._overloadpacket))
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        self.launches += 1
        self.bytes += moved
        self.flops += flops
        self.names[name] += 1
        self.moved[name] += moved
        for gpu, (peak, bandwidth, launch) in GPUS.items():
            self.seconds[gpu] += max(flops / peak, moved / bandwidth, launch)
        return result


def count(module: torch.nn.Module, name: str, side: int, dtype: torch.dtype, bare: bool) -> Work:
    """Count a forward and backward. The bare network gets gradients of its activations, from the input on."""
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.memory.autograd import OutOfPlace

    args, keywords = inputs(name, side, dtype)
    if bare:
        args[0].requires_grad_(True)
    with Work() as work:
        with OutOfPlace() if family_of(name).adds_in_place else nullcontext():
            output = module(*args, **keywords, transformer_options={})
        output.float().square().mean().backward()
    return work


def with_update(work: Work, module: torch.nn.Module) -> Work:
    """Return a count with the rest of a GPU's step added: clipping, AdamW, EMA. A foreach call counts as one launch."""
    from graft_pack.trainers.optimizers import OPTIMIZERS
    from graft_pack.trainers.optimizers.ema import MovingAverage

    from tests.support import models

    parameters = [one for one in module.parameters() if one.requires_grad]
    optimizer = OPTIMIZERS["AdamW"].make([{"params": parameters}], models.recipe("SD1"))
    average = MovingAverage(0.99)
    average.start(parameters)
    optimizer.step()  # creates the moments
    whole = replace(work, names=work.names.copy(), moved=work.moved.copy(), seconds=dict(work.seconds))
    # On a CPU, torch clips one gradient after the other.
    with mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda tensors, device: True), whole:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        average.step(parameters, optimizer.found_inf)
    return whole


def rows(name: str, side: int, rank: int, targets: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Work]]:
    """Yield (label, work) of the bare network and of a LoRA on each kind of target."""
    from graft_pack.nodes.host.model.compat import differentiable_rope, training_flag
    from graft_pack.trainers.lowrank.layers import low_rank_layers
    from graft_pack.trainers.memory.autograd import blocks_of
    from graft_pack.trainers.memory.checkpointing import checkpoint_blocks

    on_gpu = mock.patch("graft_pack.trainers.lowrank.products.is_on_cpu", lambda tensor: False)
    with fake_tensors(), on_gpu, training_flag(True), differentiable_rope():
        for kind in ["", *targets]:
            module = network(name, dtype)
            label = "bare"
            if kind:
                adapt(module, name, kind, rank, dtype)
                label = f"{kind} ({len(low_rank_layers(module))} layers)"
            if name in CHECKPOINTED:
                checkpoint_blocks(blocks_of(module))
            work = count(module, name, side, dtype, bare=not kind)
            yield label, work
            if kind:
                whole = with_update(work, module)
                yield f"{label}, whole step (+{whole.launches - work.launches} launches)", whole


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--side", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="*", default=["attention", "linear + conv"])
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--operations", action="store_true", help="also list the operations that move most bytes")
    options = parser.parse_args()

    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    print(f"| model | targets | launches | bytes | flops | {' | '.join(GPUS)} |")
    print("|---" * (5 + len(GPUS)) + "|")
    for name in options.names:
        for dtype in options.dtypes:
            bare = None
            title = f"{LABELS.get(name, name)} {options.side}, {dtype}" + ", checkpointed" * (name in CHECKPOINTED)
            for label, work in rows(name, options.side, options.rank, options.targets, DTYPES[dtype]):
                bare = bare or work
                print(f"| {title} | {label} | {' | '.join(_figures(work, bare))} |", flush=True)
                if options.operations:
                    print(f"<!-- {work.bytes / bare.bytes:.4f} {work.moved.most_common(14)} -->", flush=True)


def _figures(work: Work, bare: Work) -> list[str]:
    """Return the work of the bare network as it is, and any other over it."""
    if work is bare:
        figures = [f"{work.launches:,}", f"{work.bytes / 1e9:.1f} GB", f"{work.flops / 1e12:.1f} T"]
        return figures + [f"{seconds * 1e3:.0f} ms" for seconds in work.seconds.values()]
    pairs = [(work.launches, bare.launches), (work.bytes, bare.bytes), (work.flops, bare.flops)]
    pairs += [(work.seconds[gpu], bare.seconds[gpu]) for gpu in GPUS]
    return [f"{mine / theirs:.2f}" for mine, theirs in pairs]


if __name__ == "__main__":
    main()
