"""One-line summaries of recipes, for logs and node texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..methods import METHODS

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe


def summarize(recipe: Recipe) -> str:
    """Summarize the options of a recipe in one line."""
    scale = METHODS[recipe.method].scale(recipe.rank, recipe.alpha)
    strength = "" if scale is None else f"alpha {recipe.alpha:g} (effective scale {scale:g}), "
    size = f"rank {recipe.rank}, {strength}on {recipe.targets}, " if recipe.rank else ""
    if METHODS[recipe.method].in_backward:
        size = f"on {recipe.targets} in {recipe.weight_dtype}, "
    word = ""
    if recipe.embedding_name:
        start = f"{recipe.embedding_vectors} vectors from '{recipe.embedding_init}'"
        word = f"embedding:{recipe.embedding_name} ({start}, learning rate {recipe.embedding_learning_rate:g}), "
    return (
        f"{recipe.method} for {recipe.family}, {recipe.optimizer}, "
        f"learning rate {recipe.learning_rate:g} {recipe.schedule}, "
        f"{size}{_summarize_text_encoder(recipe)}{word}"
        f"batch {recipe.batch_size} x {recipe.accumulation}, resolution {recipe.resolution}, seed {recipe.seed}"
        + "".join(f", {name} {value}" for name, value in recipe.objective.set_fields().items())
    )


def _summarize_text_encoder(recipe: Recipe) -> str:
    if not recipe.text_encoder:
        return ""
    rank = f"rank {recipe.text_encoder_rank}, " if recipe.text_encoder_rank else ""
    return f"text encoder too ({rank}learning rate {recipe.text_encoder_learning_rate:g}), "
