"""The adapter and the embedding of a run as files, with their metadata."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.examples import count_tags
from ..formats.adapter import Adapter, LazyAdapter
from ..formats.full_diff import FullDiff
from ..formats.kohya import network_fields
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


@dataclass(frozen=True)
class Exporter:
    """Function that makes the adapter and the embedding of a run, with metadata, from the trainables' values.

    Attributes:
        modules: the trees that the trainables belong to.
        identity: hash that names the run.
    """

    recipe: Recipe
    modules: TrainableModules
    host: Host
    dataset: Dataset
    run: Run
    identity: str

    def __call__(self, values: dict[str, torch.Tensor], step: int) -> Products:
        facts = self._facts(step)
        weights = {name: value for name, value in values.items() if not name.startswith(textual_inversion.PREFIX)}
        adapter = self._adapter(weights, facts) if weights else None
        embedding = None
        if self.recipe.embedding_name:
            metadata = describe_training(facts, "textual-inversion")
            embedding = textual_inversion.made_of(values, self.recipe, metadata)
        return Products(adapter, embedding)

    def _adapter(self, weights: dict[str, torch.Tensor], facts: dict[str, Any]) -> Adapter:
        tensors = self.modules.export(weights)
        if isinstance(tensors, FullDiff):
            return LazyAdapter(tensors, describe_training(facts, "difference"))
        metadata = describe_training({**facts, **self._network(tensors)}, "lora")
        # Convert at once while the modules are loaded, since the conversion may read them; else on demand.
        native = functools.partial(self.modules.native, weights)
        return Adapter(tensors, metadata, native() if self.modules.are_there else native)

    def _network(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return kohya's metadata of the network. A file without factors has the recipe's rank and alpha."""
        fields = network_fields(tensors)
        if fields["network_dim"] is None:
            fields.update(network_dim=self.recipe.rank, network_alpha=self.recipe.alpha)
        return fields

    def _facts(self, step: int) -> dict[str, Any]:
        recipe, family = self.recipe, self.host.denoiser.family
        return {
            "family": family,
            "parameterization": self.host.denoiser.parameterization,
            "recipe": recipe.as_json(),
            "identity": self.identity,
            "run": self.run.name,
            "thumbnail": self.run.thumbnail(step),
            "trigger": self.dataset.trigger,
            "resolution": recipe.resolution,
            "base_model_version": "sd_v1" if family == "SD1" else family,
            "learning_rate": recipe.learning_rate,
            "unet_lr": recipe.learning_rate,
            "text_encoder_lr": recipe.text_encoder_learning_rate if recipe.text_encoder else None,
            "optimizer": recipe.optimizer,
            "lr_scheduler": recipe.schedule,
            "lr_warmup_steps": recipe.warmup_steps,
            "max_grad_norm": recipe.max_grad_norm,
            "total_batch_size": recipe.batch_size,
            "gradient_accumulation_steps": recipe.accumulation,
            "num_train_images": sum(example.repeats for example in self.dataset.examples if not example.prior),
            "num_reg_images": sum(example.prior for example in self.dataset.examples),
            "steps": step,
            "max_train_steps": recipe.steps,
            "seed": recipe.seed,
            "v2": family.startswith("SD2"),
            "tag_frequency": count_tags(self.dataset) if recipe.tag_frequency == "on" else None,
            **recipe.objective.kohya_metadata(),
        }
