"""Real processes that train together over diffusers, with gloo between them and no ComfyUI.

    answers = ProcessGroup(2).run("train", folder=..., fields={...})

They are forked from a server that has imported the slow modules, so that a group starts in a moment.
"""

import math
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

# Importing these takes four times as long as a process's own work.
HEAVY = [
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.optimization",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_euler_discrete",
    "peft.tuners.lora",
    "torch.distributed",
    "transformers.optimization",
]
WORKER = "graft_process_group"


class ProcessGroup:
    """A group of processes; all of them run the same task and then end.

    Args:
        world: number of processes; or a list of them by machine, as launchers on several machines tell.
    """

    def __init__(self, world):
        self.machines = [world] if isinstance(world, int) else world
        self.world_size = sum(self.machines)
        self.exitcodes = []
        self._store = None

    def run(self, task, timeout=240, late=(), **arguments):
        """Run a task in every process and return each answer, None for a lost one; `exitcodes` tells how each ended.

        A second call restarts the processes as torchrun does, which keeps its store.

        Args:
            late: ranks that join some seconds after the others.
        """
        from torch.distributed import TCPStore

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(HEAVY)
        if self._store is None:
            self._store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        members = []
        places = [(place, size) for size in self.machines for place in range(size)]
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            given = {"rank": rank, "world": self.world_size, "port": self._store.port, "pipe": theirs}
            given |= {"local_rank": places[rank][0], "local_world": places[rank][1]}
            given |= {"task": task, "arguments": arguments, "late": rank in late}
            member = context.Process(target=runpy.run_path, args=(__file__, {"GIVEN": given}, WORKER), daemon=True)
            member.start()
            theirs.close()
            members.append((member, ours))
        try:
            # A process ends only when its answer is read, if that is long.
            answers = [_answer(pipe, timeout) for _, pipe in members]
            for member, _ in members:
                member.join(timeout)
            self.exitcodes = [member.exitcode for member, _ in members]
            assert None not in self.exitcodes, "a process hangs"
            return answers
        finally:
            for member, pipe in members:
                member.kill()
                pipe.close()


def _answer(pipe, timeout):
    try:
        return pipe.recv() if pipe.poll(timeout) else None
    except EOFError:
        return None


def join(given):
    """Join the others inside a process, run the task, and send the answer."""
    names = {"RANK": given["rank"], "LOCAL_RANK": given["local_rank"], "WORLD_SIZE": given["world"]}
    names |= {"LOCAL_WORLD_SIZE": given["local_world"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": given["port"]}
    names |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    # Import only after the environment names the process's rank.
    import torch

    torch.set_num_threads(1)
    from graft_pack.trainers.distributed import gradient_reducer
    from graft_pack.trainers.distributed.accelerate_group import AccelerateGroup

    # The networks of tests are small, but have several buckets.
    gradient_reducer._FIRST_BYTES, gradient_reducer._BYTES = 1000, 4000
    if given["late"]:
        time.sleep(4)
    group = AccelerateGroup(cpu=True)
    given["pipe"].send(TASKS[given["task"]](group, **given["arguments"]))
    group.close()


def train(group, folder, fields, kind="LoRA", death=None, spare=False):
    """Run a whole training; return {"losses", "resumed_from", "moments"}, or the name of the error that ended it.

    Args:
        kind: of `kinds.FIELDS`, for the dataset and the text encoder.
        death: (rank, where, count): that process dies as by kill -9 when it comes to `where` for the count-th time;
            `where` is "part" (of a gradient), "bucket" (before it is sent), "sum" (before the sums are awaited),
            "summed", "gather" (of a shard), "report", "file" (before it is in place), or "any" of these: `moments`
            counts them all.
        spare: add the weights of `add_spare` to the network.
    """
    from graft_pack.trainers.distributed import gradient_reducer
    from graft_pack.trainers.errors import PeerLostError

    from tests.support import kinds
    from tests.support.diffusers_host import make_host, run_session

    def reached(place):
        for where in (place, "any"):
            counts[where] += 1
            if death == (group.rank, where, counts[where]):
                os.kill(os.getpid(), signal.SIGKILL)

    def replace_file(*paths):
        reached("file")
        in_place(*paths)

    def gather_shares(*given):
        reached("gather")
        return gathered(*given)

    counts = Counter()
    in_place, os.replace = os.replace, replace_file
    gathered, group.gather_shares = group.gather_shares, gather_shares
    whole = gradient_reducer.BucketReducer.finish
    sent = gradient_reducer.BucketReducer._send

    def finish(reducer):
        reached("sum")
        whole(reducer)
        reached("summed")

    def send(reducer, bucket):
        reached("bucket")
        sent(reducer, bucket)

    gradient_reducer.BucketReducer.finish = finish
    gradient_reducer.BucketReducer._send = send
    host = make_host(lambda event, payload: reached("report"), kinds.text_of(kind))
    host = replace(host, check_interrupt=lambda: reached("part"), group=group)
    if spare:
        add_spare(host.denoiser._unet)
    try:
        result = run_session(Path(folder), host=host, dataset=kinds.dataset_of(kind), **fields)
    except PeerLostError:
        return "PeerLostError"
    return {"losses": result.losses, "resumed_from": result.resumed_from, "moments": counts["any"]}


def add_spare(network):
    """Add to a block of a network a weight that nothing uses, and one whose elements all have the same gradient."""
    import torch
    from graft_pack.trainers.memory.autograd import blocks_of

    block = blocks_of(network)[0]
    block.unused, block.even = (torch.nn.Linear(8, 64, bias=False).requires_grad_(False) for _ in range(2))
    for linear in (block.unused, block.even):
        torch.nn.init.ones_(linear.weight)
    block.resnets[0].register_forward_hook(lambda module, args, output: output + block.even.weight.mean())


def train_kinds(group, folder, names, fields):
    """Run a whole training of each kind; return {kind: (losses, buckets sent before each last backward ended)}.

    Args:
        fields: replacements for the kind's own fields.
    """
    from graft_pack.trainers.distributed import gradient_reducer

    from tests.support import kinds
    from tests.support.diffusers_host import make_host, run_session

    def finish(reducer):
        overlapped.append(reducer.overlapped)
        whole(reducer)

    whole, found = gradient_reducer.BucketReducer.finish, {}
    gradient_reducer.BucketReducer.finish = finish
    for name in names:
        overlapped = []
        host = replace(make_host(text=kinds.text_of(name)), group=group)
        own = {**kinds.fields_of(name), **fields}
        losses = run_session(Path(folder) / name, host=host, dataset=kinds.dataset_of(name), **own).losses
        found[name] = losses, overlapped
    return found


def fail(group, folder, fields, rank, where="part", memory=0, after=0):
    """Run a training that fails in one process; return the error that ended each process, or its losses.

    Args:
        where: "part" (of a gradient), "validation" or "preview": in the middle of its first forward; or "bucket": in
            the backward, when it is sent. "nan": its losses are not numbers.
            "fp16": all processes compute in fp16.
        memory: number of out-of-memory errors there; 0 for one error of that process's own.
        after: number of times that it gets through there before.
    """
    import torch
    from graft_pack.trainers.distributed import gradient_reducer
    from graft_pack.trainers.engine import accumulation, loop
    from graft_pack.trainers.memory.autograd import blocks_of

    from tests.support.diffusers_host import make_host, run_session

    def trouble(done):
        def troubled(*args, **kwargs):
            if group.rank == rank:
                over.append(True)
            if group.rank == rank and after < len(over) <= after + max(1, memory):
                raise RuntimeError("out of memory") if memory else KeyError("of this process")
            return done(*args, **kwargs)

        return troubled

    over = []
    host = replace(make_host(), group=group)
    if where == "part":
        host = replace(host, check_interrupt=trouble(host.check_interrupt))
    if where == "bucket":
        gradient_reducer.BucketReducer._message = trouble(gradient_reducer.BucketReducer._message)
    if where == "preview":
        drawn = host.denoiser.preview

        def preview(request):
            assert not in_a_pass(host.denoiser.module), "what was given up before is not mended"
            hook = blocks_of(host.denoiser.module)[-1].register_forward_pre_hook(trouble(lambda *given: None))
            try:
                return drawn(request)
            finally:
                hook.remove()

        host.denoiser.preview = preview
    if where == "fp16":
        host.denoiser.compute_dtype = torch.float16
    if where == "nan" and group.rank == rank:
        terms = accumulation.loss_terms
        accumulation.loss_terms = lambda *given, watch=None: (losses * math.nan for losses in terms(*given, watch))
    if where == "validation":
        loop.fixed_losses = trouble(loop.fixed_losses)
    try:
        return run_session(Path(folder), host=host, **fields).losses
    except Exception as error:
        try:
            group.abort()
        except Exception as second:
            return f"{type(error).__name__}, then {type(second).__name__}"

        return type(error).__name__


def in_a_pass(tree):
    """Report whether FSDP2 believes that a sharded tree is in the middle of a forward."""
    return hasattr(tree, "_get_fsdp_state") and tree._get_fsdp_state()._state_ctx.iter_forward_root is not None


def gradients(group, fields, windows):
    """Return ((loss, gradient as a list) of all processes together per window, bytes of frozen weights, buckets).

    The bytes are those of the blocks before sharding, and those that this process holds after each forward and after
    each step; with all weights trained, those of the trained weights instead. The buckets of each window: (number,
    number of those sent before the last backward ended).
    """
    from graft_pack.trainers.engine import loop
    from graft_pack.trainers.engine.updater import ParameterUpdater
    from graft_pack.trainers.memory.autograd import blocks_of
    from graft_pack.trainers.memory.checkpointing import checkpoint_blocks
    from graft_pack.trainers.recipe.options import HYBRID, SHARDED
    from graft_pack.trainers.steps.plan import Window
    from graft_pack.trainers.steps.step import fetch_batch

    from tests.support import models
    from tests.support.diffusers_host import make_item, planned

    found, buckets = [], []
    with planned([make_item(index) for index in range(8)], **fields) as (plan, host):
        host = replace(host, group=group)
        blocks = blocks_of(host.denoiser.module)
        trains_all = plan.recipe.method == "all weights"
        sizes = [held_by(blocks, trains_all)]

        class Watched(ParameterUpdater):
            def backward(self, loss, is_last=False):
                sizes.append(held_by(blocks, trains_all))
                super().backward(loss, is_last)

        if plan.recipe.checkpointing == "on":
            checkpoint_blocks(blocks, plan.recipe.keeps_attention)
        if plan.recipe.shard in SHARDED:
            hybrid = plan.recipe.shard == HYBRID
            keep = () if trains_all else plan.trainables.values()
            trained = plan.trainables if trains_all else None
            shards = group.shard(host.denoiser.module, keep, False, hybrid, trained)
            plan = replace(plan, shards=shards)
        for step, batches in enumerate(windows):
            for parameter in plan.trainables.values():
                parameter.grad = None
            window = Window.of(step, batches, group)
            updater = Watched(plan, host)
            updater.begin(step)
            losses = loop.accumulate_gradients(plan, host, window, updater, partial(fetch_batch, plan, host))
            updater.sum_gradients()
            updater.close()
            if not trains_all:
                buckets.append((updater._reducer.buckets, updater._reducer.overlapped))
            loss = group.all_reduce(losses.mean)
            grads = [parameter.grad for parameter in plan.trainables.values()]
            if plan.shards is not None:
                plan.shards.publish(list(zip(plan.trainables, grads, strict=True)))
                grads = [plan.shards.gather(len(grads) + number) for number in range(len(grads))]
            found.append((loss, models.joined(grads).tolist()))
            sizes.append(held_by(blocks, trains_all))
    return found, sizes, buckets


SIZES = [(7, 3), (40,), (5, 50), (1,), (300,), (900,), (2, 2), (64, 3)]


def own_gradients(rank):
    """Return a process's gradient of each parameter of SIZES, of which nobody has the third, and rank 0 the fourth."""
    import torch

    source = torch.Generator().manual_seed(rank)
    grads = [torch.randn(size, generator=source) for size in SIZES]
    return [grad for number, grad in enumerate(grads) if number != 2 and (number != 3 or not rank)]


def reduce(group, half=False):
    """Return the sums of `own_gradients` as (list, strides), and of each of two steps (buckets, those overlapped).

    Each process has its gradients in two backwards, which come to the parameters in an order of its own.
    """
    import torch

    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in SIZES]
    parameters[0] = torch.nn.Parameter(torch.zeros(3, 7).t())
    reducer = group.reducer(parameters, half)
    counts = []
    for _ in range(2):
        held = [
            parameter for number, parameter in enumerate(parameters) if number != 2 and (number != 3 or not group.rank)
        ]
        pairs = list(zip(held, own_gradients(group.rank), strict=True))
        pairs = pairs[group.rank :] + pairs[: group.rank]
        reducer.begin()
        sum((parameter * grad / 2).sum() for parameter, grad in pairs).backward()
        with reducer.last_backward():
            sum((parameter * grad / 2).sum() for parameter, grad in pairs).backward()
        counts.append((reducer.buckets, reducer.overlapped))
        reducer.finish()
        found = [None if one.grad is None else (one.grad.tolist(), one.grad.stride()) for one in parameters]
        for parameter in parameters:
            parameter.grad = None
    return found, counts


def held_by(blocks, trained=False):
    """Return the bytes of storages of the blocks' frozen or trained weights in this process."""
    held = [one for block in blocks for one in block.parameters() if one.requires_grad == trained]
    storages = [getattr(one, "_local_tensor", one).untyped_storage() for one in held]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


TASKS = {"train": train, "train_kinds": train_kinds, "gradients": gradients, "fail": fail, "reduce": reduce}


if __name__ == WORKER:
    # This file runs by its path, so `tests` is not importable yet.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.support import pack, process_group

    pack.hide_root()
    pack.load_pack()
    process_group.join(globals()["GIVEN"])
