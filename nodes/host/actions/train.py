"""Training from a node's inputs and widgets to its outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from comfy.cli_args import args
from comfy_execution.graph_utils import ExecutionBlocker

from ....trainers.data.buckets import geometry_without_model
from ....trainers.data.examples import shortened
from ....trainers.engine.job import export_job
from ....trainers.engine.resolve import Options, RecipeInputs, resolve, summarize
from ....trainers.engine.session import is_finished, run_recipe
from ....trainers.errors import OutOfMemory, SettingsError, in_one_line, is_out_of_memory
from ....trainers.families import family_of
from ....trainers.formats.adapter import Adapter, as_adapter
from ....trainers.formats.kohya import ranks_of
from ....trainers.objective.options import NATIVE
from ....trainers.preprocessing.crops import all_resolutions
from ....trainers.protocols import Geometry, Host
from ....trainers.recipe.options import AS_IT_IS
from ....trainers.recipe.parsing import text_of
from ....trainers.recipe.recipe import EmbeddingSpec, SliderSpec
from ....trainers.runs.loss_by_picture import BY_PICTURE
from ....trainers.runs.loss_by_timestep import BY_TIMESTEP
from .. import paths
from ..jobs import launcher, provenance
from ..jobs.readme import job_readme
from ..model import families
from ..model.checks import check_not_applied, check_sockets
from ..model.denoiser import ComfyDenoiser
from ..model.embeddings import apply_embedding
from ..model.kept_tree import TreeKeeper
from ..model.lora import apply_adapter
from ..model.preview_model import ComfyPreviewModel, PreviewChoice
from ..model.text_encoder import ComfyText
from ..model.vae import ComfyCodec
from ..server.control import Training, check_interrupt, run_controlled
from ..server.messages import graph_of
from ..server.progress import Progress, counter

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ....trainers.data.examples import Dataset
    from ....trainers.engine.session import Result
    from ....trainers.formats.embedding import Embedding
    from ....trainers.recipe.recipe import Recipe


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainInputs:
    """The values on a training node, and what it starts from.

    Attributes:
        rank: 0 for that of the adapter to start from, and if only an embedding is trained.
        embedding_spec: set if only an embedding is trained.
        preference_beta: 0 for no preference.
        slider: set if a slider is trained.
        start: the connected adapter (`as_start`) or embedding; None for none.
        start_name: name of the adapter file that `start` was read from, empty if it was not.
    """

    method: str
    steps: int
    learning_rate: float
    rank: int
    batch_size: int
    seed: int
    embedding_spec: EmbeddingSpec | None = None
    slider: SliderSpec | None = None
    start: Adapter | Embedding | None = None
    preference_beta: float = 0.0
    start_name: str = ""


@dataclass(frozen=True)
class TrainOutput:
    """The outputs of a training node; adapter and embedding are None if none was trained."""

    model: ModelPatcher
    clip: CLIP
    adapter: Adapter | None
    embedding: Embedding | None
    loss: dict[str, Any]
    ui: dict[str, Any]


def train(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    dataset: Dataset,
    widgets: TrainInputs,
    options: Options | None,
    node: str,
) -> TrainOutput:
    """Train or resume a run, or return a finished one. The returned model and clip have the result applied.

    Raises:
        InterruptProcessingException: ComfyUI's interruption, after progress was saved.
    """
    way = give_way(options)
    return run_controlled(node, way, lambda training: _train(model, clip, vae, dataset, widgets, options, training))


def give_way(options: Options | None) -> str:
    """Return the option's value for the prompts that a training gives way to."""
    return "auto" if options is None else options.value("run", "give_way", "auto")


def as_start(adapter: Mapping[str, torch.Tensor] | None) -> Adapter | None:
    """Return the adapter that a node starts from, None if none is connected. Raise ModelError if it is damaged."""
    return None if adapter is None else as_adapter(adapter)


def _train(model, clip, vae, dataset, widgets, options, training: Training) -> TrainOutput:
    check_sockets(model, clip, vae, widgets.method)
    check_not_applied(model, clip, widgets.start)
    with torch.inference_mode(False):
        text = ComfyText(clip)
        denoiser = ComfyDenoiser(model, text, vae)
        widgets = with_named_start(widgets, options)
        recipe = with_expert_range(build_recipe(model, dataset, widgets, options), model, training.node)
        if training.workflow:
            recipe = with_picture(recipe, dataset)
        progress = Progress(training, recipe.steps)
        preview_model = _preview_model(recipe, denoiser, model, clip, vae, options, training.node)
        host = Host(
            denoiser,
            text,
            ComfyCodec(vae),
            progress,
            training.next_command,
            check_interrupt,
            preview_model=preview_model,
            graph=_graph(training),
            start=widgets.start,
            keeper=TreeKeeper(denoiser, training),
        )
        try:
            result = _result_of(recipe, dataset, host, training.node)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise _out_of_memory(error) from error
    trained_model, trained_clip = model, clip
    if result.adapter is not None:
        trained_model, trained_clip = apply_adapter(model, clip, result.adapter, 1.0, 1.0)
    if result.embedding is not None:
        trained_clip = apply_embedding(trained_clip, result.embedding)
    done = {"run": result.run.name, "step": result.step, "steps": recipe.steps}
    training.send("done", {**done, "cached": result.resumed_from == result.step})
    summary = _summary(result, recipe)
    loss = {
        "loss": result.losses,
        BY_TIMESTEP: result.loss_by_timestep.as_json(),
        BY_PICTURE: result.loss_by_picture.as_json(),
    }
    return TrainOutput(trained_model, trained_clip, result.adapter, result.embedding, loss, {"text": (summary,)})


def _graph(training: Training) -> dict[str, Any] | None:
    return None if args.disable_metadata else graph_of(training.prompt) or None


def _result_of(recipe: Recipe, dataset: Dataset, host: Host, node: str) -> Result:
    folders = paths.folders()
    if recipe.processes == 1 or is_finished(recipe, dataset, host, folders):
        return run_recipe(recipe, dataset, host, folders)
    name, step = launcher.train(recipe, dataset, host, node)
    result = run_recipe(recipe, dataset, host, folders, name)
    if host.graph is not None:
        # The processes have no page from which to get the graph.
        result.run.write_graph(host.graph)
    return replace(result, resumed_from=step)


def _out_of_memory(error: Exception) -> OutOfMemory:
    return OutOfMemory(
        f"Memory ran out before the first step or after the last one ({in_one_line(error)}).",
        "Close other programs, or use a smaller model or a lower resolution. Saved progress is kept: queue the graph "
        "again to continue.",
        "model",
    )


def export(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    dataset: Dataset,
    widgets: TrainInputs,
    options: Options | None,
    node: str,
) -> str:
    """Write the training that `train` would run as a job for other machines, and return its folder.

    Raises:
        InterruptProcessingException: ComfyUI's interruption; the job's files are then removed.
    """
    check_sockets(model, clip, vae, widgets.method)
    check_not_applied(model, clip, widgets.start)
    tick = counter(node)

    def report(event: str, payload: dict) -> None:
        if event == "cache":
            tick(payload["done"], payload["total"])

    with torch.inference_mode(False):
        text = ComfyText(clip)
        denoiser = ComfyDenoiser(model, text, vae)
        widgets = with_named_start(widgets, options)
        recipe = with_expert_range(build_recipe(model, dataset, widgets, options), model, node)
        preview_model = _preview_model(recipe, denoiser, model, clip, vae, options, node)
        host = Host(denoiser, text, ComfyCodec(vae), report, preview_model=preview_model, start=widgets.start)
        base = provenance.describe(node, host, files=True)
        readme = partial(job_readme, base=base)
        return export_job(paths.jobs_folder(), recipe, dataset, host, paths.folders(), base, readme)


def build_recipe(model: ModelPatcher, dataset: Dataset, widgets: TrainInputs, options: Options | None) -> Recipe:
    """Return a node's recipe before anything is loaded for it.

    Raises:
        SettingsError: a value is out of range, or two values contradict each other.
        ModelError: the model for sample pictures is of another family.
    """
    options = options or Options()
    if options.preview_model is not None:
        options.preview_model.check_family(model)
    values = {name: value for name, value in vars(widgets).items() if name not in ("start", "start_name")}
    is_needed = isinstance(widgets.start, Adapter) and not widgets.rank
    ranks = ranks_of(widgets.start) if is_needed else {}
    inputs = RecipeInputs(**values, resolution=dataset.resolution, trigger=dataset.trigger, ranks=ranks)
    return resolve(options, family_of(families.family_name(model)), inputs)


def with_expert_range(recipe: Recipe, model: ModelPatcher, node: str) -> Recipe:
    """Train an expert of Wan 2.2 on its own timesteps if the user sets none."""
    objective = recipe.objective
    is_set = (objective.min_timestep, objective.max_timestep) != (NATIVE.min_timestep, NATIVE.max_timestep)
    bounds = families.expert_range(model, provenance.loader_texts(node))
    if bounds is None or is_set or recipe.slider_prompts:
        return recipe
    log.info("Graft: this model is an expert of Wan 2.2, so it is trained on timesteps %d to %d.", *bounds)
    return replace(recipe, objective=replace(objective, min_timestep=bounds[0], max_timestep=bounds[1]))


def with_named_start(widgets: TrainInputs, options: Options | None) -> TrainInputs:
    """Return the inputs with the adapter that start_from names, read once, if its ranks are needed.

    Raises:
        SettingsError: an adapter is connected as well.
        ModelError: the list has no such name, or the file cannot be read.
    """
    name = options.value("adapter", "start_from", "") if options is not None else ""
    if not name or widgets.start_name:
        return widgets
    if isinstance(widgets.start, Adapter):
        raise SettingsError(
            f"An adapter is connected, and start_from in Graft Adapter Options is '{name}', too.",
            "Disconnect adapter, or set start_from to auto.",
            "adapter",
        )
    return widgets if widgets.rank else replace(widgets, start=paths.load_named_adapter(name), start_name=name)


def _preview_model(
    recipe: Recipe,
    denoiser: ComfyDenoiser,
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    options: Options | None,
    node: str,
) -> ComfyPreviewModel | None:
    """Return the model for sample pictures if pictures are drawn, and not on the trained weights.

    Without a choice of the user, pictures of a run with a quantized base show the node's MODEL with the adapter.
    """
    choice = None if options is None else options.preview_model
    if choice is None and recipe.base_dtype != AS_IT_IS:
        choice = PreviewChoice(model, node)
    if choice is None or not recipe.preview_prompts:
        return None
    return ComfyPreviewModel(choice, denoiser, clip, vae, recipe.preview_strength)


def with_picture(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Draw one sample picture after the last step if no previews are set, for the page's history of runs.

    Its prompt is the trained embedding, the slider's target, the dataset's trigger, or the first caption.
    """
    if recipe.preview_prompts:
        return recipe
    captions = (caption for example in dataset.examples if not example.prior for caption in example.captions)
    prompt = text_of(dataset.trigger or next((line for line in captions if line.strip()), ""))
    if recipe.slider_prompts:
        prompt = text_of(recipe.slider_prompts[0][0])
    if recipe.embedding_name:
        prompt = f"embedding:{recipe.embedding_name}"
    return replace(recipe, preview_prompts=(prompt,), preview_every=0) if prompt else recipe


def _summary(result, recipe) -> str:
    tail = result.losses[-max(1, len(result.losses) // 10) :]
    how = "returned without training" if result.resumed_from == result.step else "trained"
    stopped = f", stopped before {recipe.steps}" if result.step < recipe.steps else ""
    return (
        f"Run {result.run.name}: {result.step} steps {how}{stopped}; "
        f"loss of the last tenth {sum(tail) / len(tail):.4f}; {summarize(recipe)}.{_missing(result)}"
    )


def _missing(result) -> str:
    if not result.left_out:
        return ""
    return f" Skipped files: {shortened(result.left_out)}."


def geometries(dataset: Dataset, model: ModelPatcher | None, vae: VAE | None) -> dict[int, Geometry]:
    """Return the geometry of a model's crops by resolution, 0 for the dataset's own; without a model, that of SD1."""
    factor = int(vae.spacial_compression_encode()) if vae is not None else 8
    by_side = {}
    for side in all_resolutions(dataset):
        wanted = side or dataset.resolution
        if model is not None:
            by_side[side] = families.geometry(model, factor, wanted)
        else:
            by_side[side] = geometry_without_model(wanted)
    return by_side


def snapping(vae: VAE | None) -> Callable[[int], int]:
    """Return the function that rounds frames to what a VAE takes; without a VAE, one that leaves them as they are."""
    return ComfyCodec(vae).snap_frames if vae is not None else lambda frames: frames


def family_name(model: ModelPatcher | None) -> str:
    """Return the name of a model's family, empty without a model."""
    return families.family_name(model) if model is not None else ""


def token_counter(clip: CLIP | None) -> Callable[[str], int] | None:
    """Return a function that counts a caption's tokens, or None without a text encoder."""
    return ComfyText(clip).count_tokens if clip is not None else None


def nothing(reason: str) -> ExecutionBlocker:
    """Return an output that blocks its consumers and shows them the reason."""
    return ExecutionBlocker(reason)
