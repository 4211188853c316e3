"""One training from dataset to adapter: find the run, fill the caches, inject the trainables, train, export."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..data.masks import check_masks
from ..data.scan import check_captions
from ..distributed.group import follow, lead
from ..errors import RunError
from ..fingerprints import base_digest, embedded_digest
from ..formats.adapter import Adapter, LazyAdapter, load_adapter
from ..formats.metadata import source_of
from ..methods import METHODS, textual_inversion
from ..optimizers import OPTIMIZERS
from ..preprocessing.prepare import Prepared, prepare
from ..recipe.options import SHARDED
from ..runs import earlier, tensorboard
from ..runs.checkpoint import State
from ..runs.folders import Products
from ..runs.reports import report_damaged
from ..runs.run import PAUSED, STOPPED, Run
from ..runs.saves import SAVES_IN_FOLDER
from ..steps.plan import Plan
from .export import Exporter
from .resolve import describe_preset, summarize
from .trainable_modules import TrainableModules

if TYPE_CHECKING:
    from ..data.examples import Dataset, LeftOut
    from ..formats.embedding import Embedding
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from ..runs.folders import Folders
    from ..runs.loss_by_picture import LossByPicture
    from ..runs.loss_by_timestep import LossByTimestep
    from .kept import Kept

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """Result of a training.

    Attributes:
        adapter: with the host's key names; None if no weight of the model was trained.
        embedding: None if no embedding was trained.
        losses: one per step.
        loss_by_timestep, loss_by_picture: the loss per timestep bucket, and that of each picture.
        run: the run on disk.
        resumed_from: the step from which training resumed; equal to `step` if the run was already finished.
        step: the last step; below the recipe's `steps` if the user stopped the run.
        left_out: files of the dataset that were not trained on.
    """

    adapter: Adapter | None
    embedding: Embedding | None
    losses: list[float]
    loss_by_timestep: LossByTimestep
    loss_by_picture: LossByPicture
    run: Run
    resumed_from: int
    step: int
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Task:
    """Checked input of a training, complete before anything is encoded.

    Attributes:
        dataset: with the embedding's placeholder inserted into the captions, if an embedding is trained.
        start: the adapter or embedding to start from; None for none.
        identity: hash that names the run.
        earlier: the identity that earlier versions gave the run; empty if their runs belong to another base.
        embedded: hash of the embedding files that the captions use; empty if they use none.
        label: name of the run's folder if the user gave none.
        made_from: names of the dataset and of what it starts from, and digests, to tell runs apart.
    """

    dataset: Dataset
    start: Adapter | Embedding | None
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
        textual_inversion.check_word(recipe, host.text, host.start)
        dataset = textual_inversion.insert_placeholder(dataset, recipe.embedding_name, recipe.embedding_templates)
    method = METHODS[recipe.method]
    if not method.trains_model:
        textual_inversion.refuse_preservation(dataset)
    check_captions(dataset, recipe.live_text)
    recipe.objective.check(host.denoiser.parameterization)
    check_masks(dataset, recipe.objective.masked_prior_weight)
    name = recipe.start_from
    start = load_adapter(folders.adapter_of(name)) if name and host.start is None else host.start
    pictures, embedded = dataset.fingerprint(), _embedded(recipe, dataset, host)
    base, earlier_base = earlier.base_digests(host, start)
    may_be_ours = earlier.claim(folders.runs, earlier_base, base)
    if embedded:
        base = base_digest(base, f"embeddings {embedded}")
    source = {} if start is None else {"start": source_of(start.metadata)}
    made_from = {"dataset": dataset.name, "dataset_digest": pictures, "base_digest": base, **source}
    return Task(
        dataset=dataset,
        start=start,
        identity=recipe.identity(pictures, base),
        earlier=recipe.identity(pictures, earlier_base) if may_be_ours else "",
        embedded=embedded,
        label=dataset.name if method.trains_model else recipe.embedding_name,
        made_from=made_from,
    )


def _embedded(recipe: Recipe, dataset: Dataset, host: Host) -> str:
    """Return a hash of the embedding files that captions, class prompts and the embedding's init text use."""
    examples = dataset.examples
    anchors = (example.anchor for example in examples if example.anchor is not None)
    class_prompts = dict.fromkeys(prompt for anchor in anchors for prompt in (anchor.prompt, *anchor.others))
    texts = dict.fromkeys(text for example in examples for text in (*example.captions, example.trigger))
    # The trained embedding is not a file, even if an earlier training has left a file of its name.
    own = (recipe.embedding_name,) if recipe.embedding_name else ()
    used = embedded_digest(host.text, (*texts, *class_prompts, *recipe.slider_texts), own)
    start = embedded_digest(host.text, (recipe.embedding_init,)) if recipe.embedding_name else ""
    return f"{used} from {start}" if start else used


def _find_run(recipe: Recipe, task: Task, folders: Folders, name: str) -> Run:
    if name:
        return Run.named(folders, name)
    run = Run.open(folders, recipe, task.identity, task.label)
    if not task.earlier or task.earlier == task.identity or os.path.exists(run.recipe_path):
        return run
    earlier_run = Run.open(folders, recipe, task.earlier, task.label)
    exists = earlier_run.identity() == task.earlier
    # If captions use embedding files, the base does not tell with which files the earlier run was made.
    is_ours = exists and (not task.embedded or earlier.claim(folders.runs, task.earlier, task.identity))
    return earlier_run if is_ours else run


def _lock(run: Run, recipe: Recipe, name: str, stack: ExitStack) -> tuple[State, bool]:
    """Lock a run until the stack closes. Return the state to resume from, and True if the run is finished.

    Raises:
        RunError: the run is not finished and cannot be locked, or its path contains a link.
    """
    run.refuse_links()
    lock_error = None
    try:
        stack.enter_context(run.held())
    except RunError as error:
        lock_error = error
    state, finished = _read(run, recipe, name)
    if lock_error is not None and not finished:
        raise lock_error
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
            state, finished = _lock(run, recipe, name, stack)
            lead(host.group, run, state, finished)
        else:
            run, state, finished = follow(host.group, folders)
        return _run(_Session.of(recipe, task, host, folders, run), state, finished)


@dataclass(frozen=True)
class _Session:
    """A training and all that its stages use."""

    recipe: Recipe
    task: Task
    host: Host
    folders: Folders
    run: Run
    modules: TrainableModules
    export: Exporter

    @classmethod
    def of(cls, recipe: Recipe, task: Task, host: Host, folders: Folders, run: Run) -> _Session:
        """Return the session of a task that trains into a run. The identity that the run has on disk counts."""
        task = replace(task, identity=run.identity() or task.identity)
        modules = TrainableModules(METHODS[recipe.method], recipe, host)
        export = Exporter(recipe, modules, host, task.dataset, run, task.identity)
        return cls(recipe, task, host, folders, run, modules, export)

    @property
    def is_sharded(self) -> bool:
        """Report whether weights are sharded over several processes."""
        return self.recipe.shard in SHARDED and self.host.group.world_size > 1


def _run(session: _Session, state: State, finished: bool) -> Result:
    """Train the session's run from a state, or export it if it is finished."""
    recipe, run = session.recipe, session.run
    progress = {"name": run.name, "folder": run.folder, "step": state.step, "steps": recipe.steps}
    session.host.report("run", {**progress, "settings": recipe.as_json()})
    if finished:
        log.info("Graft: run %s is already finished at step %d.", run.name, state.step)
        return _export_finished(session, state)
    if text := describe_preset(recipe):
        log.info("Graft: %s.", text)
        session.host.report("adapter warnings", {"warnings": [{"kind": "preset", "text": text}]})
    log.info("Graft: run %s, from step %d to %d: %s", run.name, state.step, recipe.steps, summarize(recipe))
    return _train(session, state)


def _train(session: _Session, state: State) -> Result:
    # Import here: the loop imports torch, which nodes that only describe datasets do not need.
    from .kept import Kept, keep_tree, take_tree
    from .loop import train
    from .oom_fallback import place_weights
    from .preflight import check_gradients, check_keys, check_packages, start_at_inputs

    recipe, host, run = session.recipe, session.host, session.run
    check_packages(recipe, session.is_sharded)
    resumed_from = state.step
    key = run.folder, session.task.identity, recipe
    prepared = prepare(session.task.dataset, recipe, host, session.folders)
    host.report_phase("loading")
    with session.modules.training(recipe.offload == "on" or session.is_sharded, prepared.training[: not state.step]):
        kept = take_tree(host, key, state.step)
        if kept is None:
            session.modules.compile()
        block_count = session.modules.checkpoint() if kept is None else kept.block_count
        plan = _make_plan(session, prepared, state.step, kept)
        if kept is None:
            # Before a run that starts over is cleared.
            check_keys(plan, host)
        _write_run(session, plan, state.step, _facts(session, prepared, block_count))
        plan = place_weights(plan, run, host, session.modules.read_later())
        if state.step == 0 and session.task.start is None:
            start_at_inputs(plan, host)
        if state.step == 0 and plan.shards is None:
            check_gradients(plan, host)
        writes_events = recipe.tensorboard == "on" and host.group.is_main
        with tensorboard.writing(run, state.step) if writes_events else nullcontext():
            try:
                state = train(plan, run, host, state)
            except BaseException:
                keep_tree(host, plan, key, Kept(plan.trainables, session.modules.layers, block_count))
                raise
        # Export inside the context: the files of some adapter types need the base weights.
        return _result(session, state, resumed_from, prepared.left_out)


def _make_plan(session: _Session, prepared: Prepared, step: int, kept: Kept | None) -> Plan:
    """Add the trainables to the models, and return the loop's plan. At step 0 load the values to start from."""
    modules, start, method = session.modules, session.task.start, METHODS[session.recipe.method]
    trainables = modules.inject() if kept is None else modules.adopt(kept.trainables, kept.layers)
    constants = modules.constants()
    if start is not None and step == 0 and method.trains_model:
        modules.start(trainables, start)
    plan = Plan(
        recipe=session.recipe,
        train=prepared.training,
        validation=prepared.validation,
        previews=prepared.previews,
        trainables=trainables,
        export=session.export,
        groups=modules.groups(trainables),
        switched_off=modules.switched_off,
        scaled=modules.scaled,
        constants=constants,
        after_step=partial(modules.after_step, trainables),
        in_backward=method.in_backward,
    )
    return plan.with_embedding(session.host, None if method.trains_model else start)


def _facts(session: _Session, prepared: Prepared, block_count: int) -> dict[str, Any]:
    """Return the facts of the run's record, JSON-serializable."""
    count = session.host.group.world_size
    return {
        "layers": session.modules.layers,
        "checkpointed_blocks": block_count,
        **prepared.counts(),
        **prepared.facts,
        "made_from": session.task.made_from,
        **({"processes": count} if count > 1 else {}),
    }


def _write_run(session: _Session, plan: Plan, step: int, facts: dict[str, Any]) -> None:
    """Write the run's record before the first step. Delete the old run if the recipe starts over."""
    recipe, run = session.recipe, session.run
    run.check_room(sum(value.nbytes for value in plan.trainables.values()), OPTIMIZERS[recipe.optimizer].slots)
    if recipe.on_existing == "start over" and step == 0:
        # This deletes the old run, except the user's notes. Do it only after all checks that can fail.
        run.clear()
    # Earlier versions saved elsewhere. A run that started with this version has none of those saves.
    facts[SAVES_IN_FOLDER] = step == 0 or run.fact(SAVES_IN_FOLDER) is True
    facts |= earlier.arithmetic(run, step)
    run.write_recipe(recipe, session.task.identity, facts)
    if session.host.graph is not None:
        run.write_graph(session.host.graph)
    run.forget_after(step)
    report_damaged(run, session.host, step)
    run.forget_halt()


def _export_finished(session: _Session, state: State) -> Result:
    """Return the result of a finished run."""
    recipe, modules = session.recipe, session.modules
    if not METHODS[recipe.method].reads_base(recipe):
        return _result(session, state, state.step)
    # Keep the weights off the device if training did: nothing is computed here, and they may not fit.
    with modules.training(recipe.offload == "on" or recipe.shard in SHARDED):
        modules.inject()
        for name, tensor in modules.constants().items():
            tensor.copy_(state.constants[name])
        return _result(session, state, state.step)


def _result(session: _Session, state: State, resumed_from: int, left_out: tuple[LeftOut, ...] = ()) -> Result:
    # Free the optimizer state, which is saved on disk: the difference of a full fine-tune may need the memory.
    state.optimizer = {}
    values = state.ema or state.trainables
    with session.host.group.main_process_only() as is_main:
        products = session.export(values, state.step) if is_main else Products()
        adapter = products.adapter.taken() if isinstance(products.adapter, LazyAdapter) else products.adapter
    return Result(
        adapter=adapter,
        embedding=products.embedding,
        losses=state.losses,
        loss_by_timestep=state.loss_by_timestep,
        loss_by_picture=state.loss_by_picture,
        run=session.run,
        resumed_from=resumed_from,
        step=state.step,
        left_out=left_out,
    )
