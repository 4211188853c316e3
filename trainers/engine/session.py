"""One training from dataset to adapter: find the run, fill the caches, inject the trainables, train, export."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..data.scan import check_captions
from ..distributed.follower import follow, lead
from ..errors import RunError
from ..formats.adapter import Adapter, LazyAdapter, load_adapter
from ..formats.metadata import tensors_hash
from ..methods import METHODS, textual_inversion
from ..optimizers import OPTIMIZERS
from ..preprocessing.prepare import Prepared, prepare
from ..protocols import HOLE, base_digest, earlier_fingerprint, embedded_digest
from ..runs import earlier, run_lock, tensorboard
from ..runs.checkpoint import State
from ..runs.folders import Products
from ..runs.notes import Notes, read_notes, write_notes
from ..runs.run import PAUSED, STOPPED, Run
from .export import make_exporter
from .summary import summarize
from .trainable_modules import TrainableModules

if TYPE_CHECKING:
    from ..data.examples import Dataset, LeftOut
    from ..formats.embedding import Embedding
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from ..runs.folders import Folders
    from ..runs.loss_by_timestep import LossByTimestep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """Result of a training.

    Attributes:
        adapter: with the host's key names; None if no weight of the model was trained.
        embedding: None if no embedding was trained.
        losses: one per step.
        loss_by_timestep: the loss per timestep bucket.
        run: the run on disk.
        resumed_from: the step from which training resumed; equal to `step` if the run was already finished.
        step: the last step; below the recipe's `steps` if the user stopped the run.
        left_out: files of the dataset that were not trained on.
    """

    adapter: Adapter | None
    embedding: Embedding | None
    losses: list[float]
    loss_by_timestep: LossByTimestep
    run: Run
    resumed_from: int
    step: int
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Task:
    """Checked input of a training, complete before anything is encoded.

    Attributes:
        dataset: with the embedding's placeholder inserted into the captions, if an embedding is trained.
        start: the adapter to start from; None for none.
        identity: hash that names the run.
        earlier: the identity that earlier versions gave the run; empty if their runs belong to another base.
        embedded: hash of the embedding files that the captions use; empty if they use none.
        label: name of the run's folder if the user gave none.
        made_from: the dataset's name, and digests of the dataset and the base, to tell runs apart.
    """

    dataset: Dataset
    start: Adapter | None
    identity: str
    earlier: str
    embedded: str
    label: str
    made_from: dict[str, str]


def task_of(recipe: Recipe, dataset: Dataset, host: Host, folders: Folders) -> Task:
    """Check that recipe, dataset and base fit together, and return the task.

    Raises:
        GraftError: they do not fit. The error names the input and the cure.
    """
    if recipe.embedding_name:
        textual_inversion.check_word(recipe, host.text)
        dataset = textual_inversion.insert_placeholder(dataset, recipe.embedding_name, recipe.embedding_templates)
    method = METHODS[recipe.method]
    if not method.trains_model:
        textual_inversion.refuse_preservation(dataset)
    check_captions(dataset)
    recipe.objective.check(host.denoiser.parameterization)
    start = load_adapter(folders.adapter_of(recipe.start_from)) if recipe.start_from else None
    pictures, embedded = dataset.fingerprint(), _embedded(recipe, dataset, host)
    base, before = _bases(host, start)
    may_be_ours = earlier.claim(folders.runs, before, base)
    if embedded:
        base = base_digest(base, f"embeddings {embedded}")
    label = dataset.name if method.trains_model else recipe.embedding_name
    made_from = {"dataset": dataset.name, "dataset_digest": pictures, "base_digest": base}
    found_by = recipe.identity(pictures, before) if may_be_ours else ""
    return Task(dataset, start, recipe.identity(pictures, base), found_by, embedded, label, made_from)


def _embedded(recipe: Recipe, dataset: Dataset, host: Host) -> str:
    """Return a hash of the embedding files that captions, class prompts and the embedding's init text use."""
    anchors = (one.anchor.prompt for one in dataset.examples if one.anchor is not None)
    texts = dict.fromkeys(text for one in dataset.examples for text in (*one.captions, one.trigger))
    # The trained embedding is not a file, even if an earlier training has left a file of its name.
    own = (recipe.embedding_name,) if recipe.embedding_name else ()
    found = embedded_digest(host.text, (*texts, *dict.fromkeys(anchors)), own)
    start = embedded_digest(host.text, (recipe.embedding_init,)) if recipe.embedding_name else ""
    return f"{found} from {start}" if start else found


def _find_run(recipe: Recipe, task: Task, folders: Folders, name: str) -> Run:
    if name:
        return Run.named(folders, name)
    run = Run.open(folders, recipe, task.identity, task.label)
    if not task.earlier or task.earlier == task.identity or os.path.exists(run.recipe_path):
        return run
    before = Run.open(folders, recipe, task.earlier, task.label)
    is_known = before.identity() == task.earlier
    # If captions use embedding files, the base does not tell with which files the earlier run was made.
    is_ours = is_known and (not task.embedded or earlier.claim(folders.runs, task.earlier, task.identity))
    return before if is_ours else run


def _hold(run: Run, recipe: Recipe, name: str, stack: ExitStack) -> tuple[State, bool]:
    """Lock a run until the stack closes. Return the state to resume from, and True if the run is finished.

    Raises:
        RunError: the run is not finished and cannot be locked, or its path contains a link.
    """
    run.refuse_links()
    refused = None
    try:
        stack.enter_context(run.held())
    except RunError as error:
        refused = error
    state, finished = _read(run, recipe, name)
    if refused is not None and not finished:
        raise refused
    return state, finished


def _read(run: Run, recipe: Recipe, name: str) -> tuple[State, bool]:
    """Return the state to resume from, and True if the run is finished."""
    state = State()
    # A paused run has already started over.
    if name or recipe.on_existing != "start over" or run.halted_as(PAUSED, recipe.steps):
        state = run.load(recipe.steps) or state
    stopped = run.halted_as(STOPPED, recipe.steps)
    return state, bool(state.step == recipe.steps or (stopped and state.step == stopped.step))


def is_finished(recipe: Recipe, dataset: Dataset, host: Host, folders: Folders) -> bool:
    """Report whether `run_recipe` would return a finished run without training. Raise the same errors."""
    run = _find_run(recipe, task_of(recipe, dataset, host, folders), folders, "")
    return _read(run, recipe, "")[1]


def run_recipe(recipe: Recipe, dataset: Dataset, host: Host, folders: Folders, name: str = "") -> Result:
    """Train a recipe, resume an unfinished run, or return a finished run.

    A run that the user stopped counts as finished for its number of steps at that time. With another number of steps,
    it resumes. Call this outside torch's inference mode.

    Args:
        name: name of the run, if it is known already; `on_existing` is then ignored.

    Raises:
        GraftError: training is not possible. The error names the input and the cure.
        RunHeldError: another process trains the run.
        Any exception that `host.report` raises to interrupt; the progress is saved first.
    """
    task = task_of(recipe, dataset, host, folders)
    with ExitStack() as stack:
        if host.group.is_main:
            run = _find_run(recipe, task, folders, name)
            state, finished = _hold(run, recipe, name, stack)
            lead(host.group, run, state, finished)
        else:
            run, state, finished = follow(host.group, folders)
        return _run(recipe, task, host, folders, run, state, finished)


def _run(recipe: Recipe, task: Task, host: Host, folders: Folders, run: Run, state: State, finished: bool) -> Result:
    method = METHODS[recipe.method]
    parts = TrainableModules(method, recipe, host)
    task = replace(task, identity=run.identity() or task.identity)
    export = make_exporter(method, parts, recipe, host, task.dataset, run, task.identity)
    host.report(
        "run",
        {
            "name": run.name,
            "folder": run.folder,
            "step": state.step,
            "steps": recipe.steps,
            "settings": recipe.as_json(),
        },
    )
    if finished:
        log.info("Graft: run %s is already finished at step %d.", run.name, state.step)
        return _finished(recipe, host, method, parts, run, state, export)
    log.info("Graft: run %s, from step %d to %d: %s", run.name, state.step, recipe.steps, summarize(recipe))
    return _train(recipe, task, host, folders, parts, run, state, export)


def _train(recipe, task: Task, host, folders, parts, run, state, export) -> Result:
    # Import here: the loop imports torch, which nodes that only describe datasets do not need.
    from ..distributed.fsdp import check_shards
    from ..memory.autograd import blocks_of
    from ..memory.checkpointing import checkpoint_blocks
    from .loop import train
    from .oom_fallback import offload_blocks
    from .plan import Plan
    from .preflight import check_gradients, check_keys

    # Fail on a missing package before anything is encoded.
    OPTIMIZERS[recipe.optimizer].load()
    shares = recipe.shard == "on" and host.group.world_size > 1
    if shares:
        check_shards()
    if recipe.tensorboard == "on":
        tensorboard.load()
    denoiser = host.denoiser
    resumed_from = state.step
    since = run_lock.earliest_start(folders.runs)
    prepared = prepare(task.dataset, recipe, host, folders.cache, folders.cache_limit, used_since=since)
    host.report_phase("loading")
    with _training(recipe, host, recipe.offload == "on" or shares):
        blocks = _checkpoint(denoiser.module, recipe)
        if blocks and recipe.live_text:
            checkpoint_blocks(blocks_of(host.text.module), recipe.keeps_attention)
        trainables = parts.inject()
        constants = parts.constants()
        if task.start is not None and state.step == 0:
            parts.start(trainables, task.start)
        groups = parts.groups(trainables)
        renormalize = _keep_still
        if recipe.embedding_name:
            vectors = textual_inversion.start(host.text, recipe)
            trainables |= vectors
            groups.append(textual_inversion.group(vectors, recipe))
            renormalize = textual_inversion.renormalizing(vectors, host.text, recipe)
        facts = {"layers": parts.layers, "checkpointed_blocks": blocks, **_counts(prepared), **prepared.facts}
        facts["made_from"] = task.made_from
        if host.group.world_size > 1:
            facts["processes"] = host.group.world_size
        run.check_room(sum(one.nbytes for one in trainables.values()), OPTIMIZERS[recipe.optimizer].slots)
        notes = Notes()
        if recipe.on_existing == "start over" and state.step == 0:
            # This deletes the old run. Do it only after all checks that can fail.
            notes = read_notes(run)
            run.clear()
        run.write_recipe(recipe, task.identity, facts)
        if notes != Notes():
            write_notes(run, notes)
        if host.graph is not None:
            run.write_graph(host.graph)
        run.forget_after(state.step)
        _tell_damaged(run, host, state.step)
        run.forget_halt()
        plan = Plan(
            recipe,
            prepared.training,
            prepared.validation,
            trainables,
            export,
            groups,
            renormalize,
            parts.switched_off,
            constants,
            METHODS[recipe.method].in_backward,
        )
        if recipe.offload == "on":
            # Offload before the first forward: until now, the blocks' weights are not on the device.
            log.info("Graft: %s.", offload_blocks(plan, run, host) or "offload is on, but no weights are frozen")
        if shares:
            # An adapter has a gradient in every pass. An embedding alone has one only if the caption contains it.
            keep = [*trainables.values(), *parts.read_later()]
            host.group.shard(denoiser.module, keep, needs_input_grad=not METHODS[recipe.method].trains_model)
            denoiser.make_room(weights=True)
        elif recipe.shard == "on":
            log.info("Graft: shard is on, but only one process trains: it holds all weights.")
        if state.step == 0:
            check_gradients(plan, host)
        check_keys(plan, host)
        writes = recipe.tensorboard == "on" and host.group.is_main
        with tensorboard.writing(run, state.step) if writes else nullcontext():
            state = train(plan, run, host, state)
        # Export inside the context: the files of some adapter types need the base weights.
        return _result(export, state, run, resumed_from, prepared.left_out)


def _tell_damaged(run: Run, host: Host, step: int) -> None:
    """Report the damaged saved states that were skipped to find the one to resume from."""
    for row in run.damaged:
        event = {"event": "damaged state", "step": step, **row}
        run.log(event)
        host.report("damaged state", event)


@contextmanager
def _training(recipe: Recipe, host: Host, offloaded: bool) -> Iterator[None]:
    """Prepare the denoiser for training in the block, and the text encoder if an embedding or its weights are trained.

    Args:
        offloaded: keep the weights of the denoiser's blocks off the device.
    """
    with ExitStack() as stack:
        stack.enter_context(host.denoiser.training(recipe.compute_dtype, offloaded))
        if recipe.live_text:
            stack.enter_context(host.text.training())
        yield


def _finished(recipe, host, method, parts, run, state, export) -> Result:
    """Return the result of a finished run."""
    if not method.needs_base:
        return _result(export, state, run, state.step)
    # Keep the weights off the device if training did: nothing is computed here, and they may not fit.
    with _training(recipe, host, recipe.offload == "on" or recipe.shard == "on"):
        parts.inject()
        for name, tensor in parts.constants().items():
            tensor.copy_(state.constants[name])
        return _result(export, state, run, state.step)


def _result(export, state: State, run: Run, resumed_from: int, left_out: tuple[LeftOut, ...] = ()) -> Result:
    # Free the optimizer state, which is saved on disk: the difference of a full fine-tune may need the memory.
    state.optimizer = {}
    values = state.ema or state.trainables
    # Only the main process has values to export.
    made = export(values, state.step) if values else Products()
    adapter = made.adapter.taken() if isinstance(made.adapter, LazyAdapter) else made.adapter
    return Result(
        adapter, made.embedding, state.losses, state.loss_by_timestep, run, resumed_from, state.step, left_out
    )


def _keep_still(factor: float) -> None:
    """Do nothing: stand in for `Plan.renormalize` if no embedding is trained."""


def _counts(prepared: Prepared) -> dict[str, int]:
    subject = [item for item in prepared.training if not item.prior]
    training, validation = ({item.name for item in items} for items in (subject, prepared.validation))
    classes = {item.name for item in prepared.training if item.prior}
    counts = {"images": len(training | validation), "validation_images": len(validation)}
    return {**counts, "class_images": len(classes)} if classes else counts


def _bases(host: Host, start: Adapter | None) -> tuple[str, str]:
    """Return the hash of the base and the adapter to start from, and the same hash as earlier versions computed it."""
    more = []
    if host.denoiser.conditioning_kind == HOLE:
        # Earlier versions gave inpainting models no inpaint mask. Such a run must not be resumed.
        more.append("holes")
    if start is not None:
        more.append(tensors_hash(start if start.native is None else start.native.all_tensors()))
    parts = (host.denoiser, host.text, host.codec)
    whole, before = [part.fingerprint() for part in parts], [earlier_fingerprint(part) for part in parts]
    return base_digest(*whole, *more), base_digest(*before, *more)


def _checkpoint(module, recipe: Recipe) -> int:
    """Turn activation checkpointing on if the recipe or the model's size asks for it. Return the number of blocks."""
    from ..memory.autograd import blocks_of
    from ..memory.checkpointing import checkpoint_blocks

    size = sum(parameter.numel() for parameter in module.parameters())
    wanted = recipe.checkpointing == "on" or (recipe.checkpointing == "auto" and size > 1_500_000_000)
    if not wanted:
        return 0
    blocks = blocks_of(module)
    checkpoint_blocks(blocks, recipe.keeps_attention)
    return len(blocks)
