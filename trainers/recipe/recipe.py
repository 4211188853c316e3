"""Recipe: all settings of a run with every default filled in, and the run identity that follows from them."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from typing import Any

from .options import ALL_BUT_ATTENTION, RECIPE_OPTIONS, RecipeOptions


@dataclass(frozen=True)
class EmbeddingSpec:
    """Settings of an embedding to train.

    Attributes:
        name: name after `embedding:` in prompts.
        init_text: text whose token vectors initialize the embedding.
        vectors: number of vectors in each text encoder.
        learning_rate: 0 for the default.
        stop: fraction of the run after which the embedding is frozen; 0 for never.
        templates: key of `textual_inversion.TEMPLATES`, for pictures without a caption.
    """

    name: str
    init_text: str
    vectors: int
    learning_rate: float = 0.0
    stop: float = 0.0
    templates: str = "object"


@dataclass(frozen=True)
class SliderSpec:
    """Settings of a slider to train.

    Attributes:
        prompts: (target, positive, negative) texts; empty if a dataset of pairs takes their place.
        anchors: prompts whose predictions stay.
        strength: strength of the adapter at which it is trained, in both directions.
    """

    prompts: tuple[tuple[str, str, str], ...]
    anchors: tuple[str, ...]
    strength: float


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeOptions):
    """All settings of a run. Fields that affect its result make up `identity`; the others may change on resume.

    `options.py` declares the fields.
    """

    @property
    def live_text(self) -> bool:
        """Return True if training changes the text encoder's output, so that every step must encode its captions."""
        return bool(self.embedding_name) or self.text_encoder

    @property
    def learns_pictures(self) -> bool:
        """Return True if a low loss of a picture means that it was learned well."""
        return not (self.preference_beta or self.slider_strength)

    @property
    def takes_pairs(self) -> bool:
        """Return True if training compares each picture with a worse one, or with the other side of a slider."""
        return self.preference_beta > 0 or (self.slider_strength > 0 and not self.slider_prompts)

    @property
    def slider_texts(self) -> tuple[str, ...]:
        """Return all prompts of a slider, each once."""
        return tuple(dict.fromkeys(("", *itertools.chain(*self.slider_prompts), *self.slider_anchors)))

    @property
    def keeps_attention(self) -> bool:
        """Return True if checkpointed blocks keep the outputs of attention."""
        return self.recompute == ALL_BUT_ATTENTION

    def deciding(self) -> dict[str, Any]:
        """Return the fields that affect the result, without options whose value reproduces versions before them."""
        values = {
            name: getattr(self, name)
            for name, declared in RECIPE_OPTIONS.items()
            if declared.decides and getattr(self, name) != declared.before
        }
        if "objective" in values:
            values["objective"] = self.objective.set_fields()
        return values

    def identity(self, dataset: str, base: str) -> str:
        """Return the run's identity: the SHA-256 of the deciding fields, the dataset and the base model.

        Args:
            dataset: hash of the dataset's content.
            base: hash of the base model.
        """
        text = json.dumps([self.deciding(), dataset, base], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible values."""
        return asdict(self)
