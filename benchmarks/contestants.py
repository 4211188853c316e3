"""Contestants of the benchmark, each on its own MODEL: the bare model, our step, core's Train LoRA node, diffusers.

Each has the signature of `interleaved.Turn`'s `work`.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

RANK = 8
LEARNING_RATE = 1e-4
# More steps than any run makes; the benchmark decides when to stop.
MANY = 10**6
# Attention's layers, as diffusers' training scripts name them.
ATTENTION = r".*(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
# Models that add to activations in place. Such an addition has no gradient without our rule.
IN_PLACE = ("Flux as in diffusers", "SD3")
_SIGMA = 0.7


@dataclass(frozen=True)
class Case:
    """The model, batch and options that a benchmark trains with.

    Attributes:
        model: key in `models.SIZES`.
        batch: samples per step.
        checkpointing: True to checkpoint the activations of each block.
        side: side of the latents; 0 for the model's own.
        rank: rank of the adapters.
    """

    model: str
    batch: int
    checkpointing: bool = False
    side: int = 0
    rank: int = RANK

    def patcher(self):
        """Return a new MODEL with ordinary weights, as core's node needs them on a CPU."""
        from tests.support import models

        made = models.patcher(self.model)
        # A loader sets this too: core's node of later hosts loads the weights again.
        made.cached_patcher_init = (lambda disable_dynamic=False: models.patcher(self.model), ())
        return made

    def latents(self):
        """Return latents [B, C, ...] from a seed."""
        import torch

        from tests.support import models

        shape = models.SIZES[self.model].latent
        if self.side:
            shape = (*shape[:-2], self.side, self.side)
        return torch.randn(self.batch, *shape, generator=torch.Generator().manual_seed(0))

    def conditionings(self):
        """Return one conditioning per sample."""
        from tests.support import models

        return [models.conditioning(self.model, seed) for seed in range(self.batch)]


def forward(case: Case, stand: Callable[[], None]) -> None:
    """Run the bare model without gradients."""
    import torch

    with _bare(case) as network, torch.no_grad():
        latents = case.latents()
        while True:
            network(latents)
            stand()


def limit(case: Case, stand: Callable[[], None]) -> None:
    """Run any trainer's lower bound: forward, and backward to the latent alone, without weight gradients or text."""
    with _bare(case) as network:
        _forward_and_backward(network, case, stand)


@contextmanager
def _bare(case: Case) -> Iterator[Callable]:
    """Yield the host's network as a function of the latents alone, with all other inputs computed beforehand."""
    import torch
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.trainers.memory.autograd import OutOfPlace, blocks_of
    from graft_pack.trainers.memory.checkpointing import checkpoint_blocks

    from tests.support import models

    denoiser = ComfyDenoiser(case.patcher(), None, models.SmallVae())
    with denoiser.training("auto"):
        network = denoiser.module
        if case.checkpointing:
            checkpoint_blocks(blocks_of(network))
        with models.inputs_of(network) as calls, torch.no_grad():
            denoiser.predict(case.latents(), torch.full((case.batch,), _SIGMA), case.conditionings())
        (_, *args), kwargs = calls[0]
        mode = OutOfPlace if case.model in IN_PLACE else nullcontext

        def call(latents):
            with mode():
                return network(latents, *args, **kwargs)

        yield call


def _forward_and_backward(network: Callable, case: Case, stand: Callable[[], None]) -> None:
    latents = case.latents().requires_grad_()
    while True:
        network(latents).square().mean().backward()
        latents.grad = None
        stand()


def ours(case: Case, stand: Callable[[], None], targets: str = "attention", **more) -> None:
    """Run the engine's whole loop: data, noise, prediction, loss, backward, clipping, AdamW, log.

    Args:
        more: fields of the recipe.
    """
    from tests.support import models

    def report(event, payload):
        if event == "step":
            stand()

    fields = {"steps": MANY, "batch_size": case.batch, "rank": case.rank, "alpha": float(case.rank), "save_every": MANY}
    fields |= {"learning_rate": LEARNING_RATE, "targets": targets, **more}
    made = models.in_training(
        case.patcher(), case.model, case.checkpointing, 0.0, case.batch, case.side, report, **fields
    )
    with made as training, tempfile.TemporaryDirectory() as folder:
        models.train(training, Path(folder))


def core(case: Case, stand: Callable[[], None], bypass: bool = False) -> None:
    """Run ComfyUI's own node in fp32; it trains every layer with weights and offers no choice of them."""
    from comfy_extras import nodes_train

    from tests.support import models

    values = {
        "model": case.patcher(),
        "batch_size": case.batch,
        "grad_accumulation_steps": 1,
        "steps": MANY,
        "learning_rate": LEARNING_RATE,
        "rank": case.rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": case.checkpointing,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": bypass,
    }
    takes = inspect.signature(nodes_train.TrainLoraNode.execute).parameters
    given = {name: [value] for name, value in values.items() if name in takes}
    given["algorithm"] = [next(iter(nodes_train.adapter_maps))]
    # At least two: the node of some hosts fails on a single latent.
    shown = max(2, case.batch)
    rows = case.latents().split(1)
    given["latents"] = [{"samples": rows[place % case.batch].clone()} for place in range(shown)]
    given["positive"] = [[_as_core(models.conditioning(case.model, seed))] for seed in range(shown)]

    class Bar:
        def __init__(self, total):
            pass

        def update(self, count):
            stand()

    nodes_train.ProgressBar = Bar
    nodes_train.TrainLoraNode.execute(**given)


def has_bypass() -> bool:
    """Report whether the host's node can train without patching the weights."""
    from comfy_extras import nodes_train

    return "bypass_mode" in inspect.signature(nodes_train.TrainLoraNode.execute).parameters


def _as_core(one) -> list:
    """Return a Conditioning in the form of CLIPTextEncode's output."""
    tensors = dict(one.tensors)
    return [tensors.pop("cross_attn"), tensors]


def diffusers_limit(case: Case, stand: Callable[[], None]) -> None:
    """Run the same limit for diffusers' own network."""
    network, call = _published(case)
    _forward_and_backward(call, case, stand)


def diffusers_step(case: Case, stand: Callable[[], None]) -> None:
    """Run a step as diffusers' LoRA scripts do: peft on attention, accelerate, AdamW, a schedule, clipping."""
    import torch
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig

    network, call = _published(case)
    config = LoraConfig(r=case.rank, lora_alpha=case.rank, init_lora_weights="gaussian", target_modules=ATTENTION)
    network.add_adapter(config)
    network.train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = get_scheduler("constant", optimizer=optimizer)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    latents = case.latents()
    while True:
        with accelerator.accumulate(network):
            noise = torch.randn_like(latents)
            loss = torch.nn.functional.mse_loss(call(latents + _SIGMA * noise).float(), noise, reduction="mean")
            accelerator.gather(loss.repeat(case.batch)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        stand()


def _published(case: Case):
    """Return diffusers' network with a MODEL's weights, and the network as a function of the latents alone."""
    import torch

    from tests.support.diffusers_host import convert_sd1
    from tests.support.published import PUBLISHED

    model = case.patcher()
    sigma = torch.full((case.batch,), _SIGMA)
    conditionings = case.conditionings()
    kind = next((one for one in PUBLISHED.values() if one.name == case.model), None)
    if kind is None:
        network = convert_sd1(model)
        context = torch.cat([one.tensors["cross_attn"] for one in conditionings])
        t = torch.full((case.batch,), 500)
        call = lambda latents: network(latents, t, context).sample  # noqa: E731
    else:
        network, _ = kind.network(model)
        network.requires_grad_(False)
        call = lambda latents: kind.run(network, latents, sigma, conditionings)  # noqa: E731
    if case.checkpointing:
        network.enable_gradient_checkpointing()
        # diffusers checkpoints only in training mode.
        network.train()
    return network, call


# By name, in the order of the table's columns.
ALL = {
    "forward": forward,
    "limit": limit,
    "attention": ours,
    "linear + conv": functools.partial(ours, targets="linear + conv"),
    "core": core,
    "core, bypass": functools.partial(core, bypass=True),
    "diffusers' limit": diffusers_limit,
    "diffusers": diffusers_step,
}
