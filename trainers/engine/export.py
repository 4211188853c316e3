"""The adapter and the embedding of a run as files, with their metadata."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ..formats.adapter import Adapter, LazyAdapter
from ..formats.full_diff import FullDiff
from ..formats.metadata import describe_training
from ..methods import textual_inversion
from ..runs.folders import Products
from ..runs.run import Run
from .trainable_modules import TrainableModules

if TYPE_CHECKING:
    import torch

    from ..data.examples import Dataset
    from ..protocols import Host
    from ..recipe.recipe import Recipe


def _network(method, recipe: Recipe) -> dict:
    """Return kohya's metadata for the adapter's type."""
    module, args = method.network
    return {
        "network_module": module,
        "network_args": args,
        "network_dim": recipe.rank,
        "network_alpha": recipe.alpha,
    }


def make_exporter(
    method, parts: TrainableModules, recipe: Recipe, host: Host, dataset: Dataset, run: Run, identity: str
):
    """Return a function that makes the adapter and the embedding, with metadata, from the values and the step."""

    def export(values: dict[str, torch.Tensor], step: int) -> Products:
        facts = {
            "family": host.denoiser.family,
            "parameterisation": host.denoiser.parameterization,
            "recipe": recipe.as_json(),
            "identity": identity,
            "thumbnail": run.thumbnail(step),
            "trigger": dataset.trigger,
            "resolution": recipe.resolution,
            "base_model_version": "sd_v1" if host.denoiser.family == "SD1" else host.denoiser.family,
            **(_network(method, recipe) if method.ranked else {}),
            "learning_rate": recipe.learning_rate,
            "unet_lr": recipe.learning_rate,
            "text_encoder_lr": recipe.text_encoder_learning_rate if recipe.text_encoder else None,
            "optimizer": recipe.optimizer,
            "lr_scheduler": recipe.schedule,
            "lr_warmup_steps": recipe.warmup_steps,
            "max_grad_norm": recipe.max_grad_norm,
            "total_batch_size": recipe.batch_size,
            "gradient_accumulation_steps": recipe.accumulation,
            "num_train_images": sum(one.repeats for one in dataset.examples if not one.prior),
            "num_reg_images": sum(one.prior for one in dataset.examples),
            "steps": step,
            "max_train_steps": recipe.steps,
            "seed": recipe.seed,
            "v2": host.denoiser.family.startswith("SD2"),
            **recipe.objective.kohya_metadata(),
        }
        own = {name: value for name, value in values.items() if not name.startswith(textual_inversion.PREFIX)}
        adapter = None
        if own:
            tensors = parts.export(own)
            metadata = describe_training(facts, "lora" if method.ranked else "difference")
            if isinstance(tensors, FullDiff):
                adapter = LazyAdapter(tensors, metadata)
            else:
                # Convert at once while the modules are loaded, since the conversion may read them; else on demand.
                native = functools.partial(parts.native, own)
                adapter = Adapter(tensors, metadata, native() if parts.are_there else native)
        embedding = None
        if recipe.embedding_name:
            embedding = textual_inversion.made_of(values, recipe, describe_training(facts, "textual-inversion"))
        return Products(adapter, embedding)

    return export
