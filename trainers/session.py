"""One training from dataset to adapter: caches, run, adapter layers, loop, export."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .data.scan import check_captions
from .errors import ModelError
from .families import family_of
from .formats.adapter import Adapter
from .formats.metadata import describe_training
from .methods import METHODS
from .optimisers import OPTIMISERS
from .prepare import Prepared, prepare
from .run import Products, Run, State

if TYPE_CHECKING:
    import torch

    from .data.examples import Dataset, LeftOut
    from .formats.embedding import Embedding
    from .protocols import Host
    from .run import Folders
    from .settings import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What training gives.

    Attributes:
        adapter: in the host's names; None where nothing of the model was trained.
        embedding: None where none was trained.
        losses: of each step.
        run: its folder.
        resumed_from: step it went on from; equal to the recipe's steps when it was already finished.
        left_out: files of the dataset that were not trained on.
    """

    adapter: Adapter | None
    embedding: Embedding | None
    losses: list[float]
    run: Run
    resumed_from: int
    left_out: tuple[LeftOut, ...] = ()


def run_recipe(recipe: Recipe, dataset: Dataset, host: Host, folders: Folders) -> Result:
    """Trains what a recipe says, goes on with an unfinished run, or returns a finished one.

    Must be called outside torch's inference mode.

    Raises:
        GraftError: with the input and the cure.
        Anything that `host.report` raises to interrupt; what was reached is saved first.
    """
    check_captions(dataset)
    recipe.objective.check(host.denoiser.parameterisation)
    method = METHODS[recipe.method]
    identity = recipe.identity(dataset.fingerprint(), _base(host))
    run = Run.open(folders, recipe, identity, dataset.name)
    state = State()
    if recipe.on_existing != "start over":
        state = run.load(recipe.steps) or state
    export = _exporter(method, recipe, host, dataset)
    host.report("run", {"name": run.name, "folder": run.folder, "step": state.step, "steps": recipe.steps})
    if state.step == recipe.steps:
        log.info("Graft: run %s is already finished at step %d.", run.name, state.step)
        return _result(export, state, run, state.step)
    log.info("Graft: run %s, from step %d to %d: %s", run.name, state.step, recipe.steps, recipe.summary())
    return _train(recipe, dataset, host, folders, method, identity, run, state, export)


def _train(recipe, dataset, host, folders, method, identity, run, state, export) -> Result:
    # Imported here: the loop imports torch, which the nodes that only describe datasets do not need.
    from .loop import Plan, train

    # An optimiser that is not installed is refused before anything is encoded.
    OPTIMISERS[recipe.optimizer].load()
    denoiser = host.denoiser
    resumed_from = state.step
    prepared = prepare(dataset, recipe, host, folders.cache, folders.cache_limit)
    with denoiser.training(recipe.compute_dtype):
        targets = method.targets(denoiser.module, family_of(denoiser.family))
        blocks = _checkpoint(denoiser.module, recipe)
        trainables = method.inject(denoiser.module, targets, recipe)
        facts = {"layers": len(targets), "checkpointed_blocks": blocks, **_counts(prepared), **prepared.facts}
        if recipe.on_existing == "start over":
            # Only now, when all that could be refused has been: what is there is lost with this.
            run.clear()
        run.write_recipe(recipe, identity, facts)
        run.forget_after(state.step)
        plan = Plan(
            recipe, prepared.training, prepared.validation, trainables, export, method.groups(trainables, recipe)
        )
        if state.step == 0:
            _check_gradient(plan, host)
        _check_names(plan, host)
        state = train(plan, run, host, state)
    return _result(export, state, run, resumed_from, prepared.left_out)


def _result(export, state: State, run: Run, resumed_from: int, left_out: tuple[LeftOut, ...] = ()) -> Result:
    made = export(state.ema or state.trainables, state.step)
    return Result(made.adapter, made.embedding, state.losses, run, resumed_from, left_out)


def _counts(prepared: Prepared) -> dict[str, int]:
    training, validation = ({item.name for item in items} for items in (prepared.training, prepared.validation))
    return {"images": len(training | validation), "validation_images": len(validation)}


def _base(host: Host) -> str:
    parts = [host.denoiser.fingerprint(), host.text.fingerprint(), host.codec.fingerprint()]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _checkpoint(module, recipe: Recipe) -> int:
    """Switches checkpointing on where the recipe or the model's size asks for it; the number of blocks."""
    from .autograd import blocks_of, checkpoint_blocks

    size = sum(parameter.numel() for parameter in module.parameters())
    wanted = recipe.checkpointing == "on" or (recipe.checkpointing == "auto" and size > 1_500_000_000)
    if not wanted:
        return 0
    blocks = blocks_of(module)
    checkpoint_blocks(blocks)
    return len(blocks)


def _check_gradient(plan, host: Host) -> None:
    """The self-check where the user asked for it, or where the family is not described."""
    from .check import TOLERANCE, TOLERANCE_HALF, check_gradient
    from .loop import batch_loss

    wanted = plan.recipe.gradient_check
    if wanted == "off" or (wanted == "auto" and host.denoiser.family != "general"):
        return
    exact = host.denoiser.compute_dtype.itemsize >= 4
    check_gradient(lambda: batch_loss(plan, host), plan.trainables, TOLERANCE if exact else TOLERANCE_HALF)


def _check_names(plan, host: Host) -> None:
    """Finds out before the first step that the host would not read the adapter, not after the last."""
    values = {name: parameter.detach() for name, parameter in plan.trainables.items()}
    unread = host.denoiser.check_adapter(plan.export(values, 0).adapter)
    if unread:
        raise ModelError(
            f"The host would not read {len(unread)} keys of this model's adapter, such as {unread[0]}.",
            "This model cannot be trained yet. Please report its name.",
            "model",
        )


def _exporter(method, recipe: Recipe, host: Host, dataset: Dataset):
    """A function from the trainables' values and the step to what is handed on, with its metadata."""

    def export(values: dict[str, torch.Tensor], step: int) -> Products:
        facts = {
            "family": host.denoiser.family,
            "parameterisation": host.denoiser.parameterisation,
            "recipe": recipe.as_json(),
            "trigger": dataset.trigger,
            "resolution": recipe.resolution,
            "base_model_version": "sd_v1" if host.denoiser.family == "SD1" else host.denoiser.family,
            "network_module": "networks.lora",
            "network_dim": recipe.rank,
            "network_alpha": recipe.alpha,
            "learning_rate": recipe.learning_rate,
            "unet_lr": recipe.learning_rate,
            "optimizer": recipe.optimizer,
            "lr_scheduler": recipe.schedule,
            "lr_warmup_steps": recipe.warmup_steps,
            "max_grad_norm": recipe.max_grad_norm,
            "total_batch_size": recipe.batch_size,
            "gradient_accumulation_steps": recipe.accumulation,
            "num_train_images": sum(example.repeats for example in dataset.examples),
            "steps": step,
            "max_train_steps": recipe.steps,
            "seed": recipe.seed,
            "v2": host.denoiser.family.startswith("SD2"),
            **recipe.objective.kohya_metadata(),
        }
        tensors = method.export(values, recipe, host.denoiser.adapter_name)
        return Products(Adapter(tensors, describe_training(facts)))

    return export
