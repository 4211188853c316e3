"""Textual inversion: training of a new embedding (Gal et al. 2022), alone or together with an adapter.

Captions that reach the text encoder name the embedding as ComfyUI does, `embedding:<name>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import DatasetError, ModelError, SettingsError
from ..formats.embedding import Embedding
from ..optimizers import Group, finds_its_rate
from ..text import composed, ends_word, is_windows_reserved, starts_word
from . import METHODS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.examples import Dataset, Example
    from ..protocols import TextEncoder
    from ..recipe.recipe import Recipe

PREFIX = "embedding/"
# Default learning rate of embedding vectors. They have no weight decay.
EMBEDDING_RATE = 5e-4
_IDENTIFIER = "embedding:"

# Captions for images that have none. {} stands for the embedding. Our own wording, after the idea of Gal et al.
TEMPLATES = {
    "object": (
        "a photo of {}",
        "a photo of a {}",
        "a picture of {}",
        "a close photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
        "a cropped picture of the {}",
        "one {} in a photo",
        "a sharp picture of {}",
        "{}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a scene in the style of {}",
        "a portrait in the style of {}",
        "a landscape in the style of {}",
        "a detailed picture in {} style",
        "a simple picture in {} style",
        "art in the style of {}",
        "{}",
    ),
}

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_ENDINGS = (".safetensors", ".pt", ".bin")


def is_addressable(name: str) -> bool:
    """Return True if a prompt can name this existing embedding file, which may be in a folder.

    ComfyUI reads the name up to the next white space and cuts commas from its end. Newer versions also end it at < and
    [. Parentheses with a colon set weights, and a backslash escapes them.
    """
    return bool(name) and name == name.strip(",") and re.search(r"[\s()\\\0:<\[]", name) is None


def check_name(name: str, input: str = "name") -> None:
    """Refuse a name that a prompt cannot address.

    ComfyUI reads `embedding:<name>` up to the next space. So the name must not contain a space, a weight or a path.

    Raises:
        SettingsError: the name is invalid. The error names the input.
    """
    sound = _NAME.fullmatch(name) is not None and not name.endswith(".") and not is_windows_reserved(name)
    if sound and not name.lower().endswith(_ENDINGS):
        return
    raise SettingsError(
        f"A prompt cannot use the embedding name '{name}'.",
        "Use letters, digits, '-', '_' and '.', no spaces, no folders, no file ending and no name that Windows "
        "reserves for a device. In prompts write embedding:NAME with a space before and after it.",
        input,
    )


def check_word(recipe: Recipe, text: TextEncoder, given: Mapping[str, torch.Tensor] | None = None) -> None:
    """Refuse a name that already has a meaning, and start values that do not exist or do not fit.

    Args:
        given: what the graph gives to start from; an embedding if the recipe trains no model.

    Raises:
        SettingsError: the name or the init text is invalid. The error names the input.
        ModelError: the text encoder cannot take new embeddings, or the given embedding does not fit.
    """
    # An embedding beside an adapter is set on an option node, so errors name the input `options`.
    own = not METHODS[recipe.method].trains_model
    check_name(recipe.embedding_name, "name" if own else "options")
    if text.is_word(recipe.embedding_name):
        raise SettingsError(
            f"'{recipe.embedding_name}' is already a word of the text encoder.",
            "Choose another name, such as my-dog: other prompts would use the existing embedding.",
            "name" if own else "options",
        )
    vectors = text.start_vectors(recipe.embedding_init)
    if own and given is not None:
        _check_given(recipe, vectors, given)
        return
    for key, rows in vectors.items():
        if not len(rows):
            raise SettingsError(
                f"init_text '{recipe.embedding_init}' gives no token for the text encoder {key}.",
                "Name the subject in a word or two, such as 'dog' or 'oil painting'.",
                "init_text" if own else "options",
            )


def _check_given(recipe: Recipe, vectors: dict[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Refuse an embedding to start from that has other encoders, widths or numbers of vectors than the run.

    Args:
        vectors: those of the init text, [tokens, width] by encoder.
    """
    if recipe.embedding_init:
        raise SettingsError(
            f"init_text is '{recipe.embedding_init}', but training starts from the connected embedding: it would have "
            "no effect.",
            "Leave init_text empty, or disconnect embedding.",
            "init_text",
        )
    widths, own = ({key: rows.shape[-1] for key, rows in by_key.items()} for by_key in (given, vectors))
    if widths != own:
        there, here = (", ".join(f"{key} ({width} wide)" for key, width in by_key.items()) for by_key in (widths, own))
        raise ModelError(
            f"The embedding to start from is for the encoders {there}, and this text encoder has {here}.",
            "Connect an embedding that was trained for this model's family.",
            "embedding",
        )
    counts = {len(rows) for rows in given.values()}
    if counts != {recipe.embedding_vectors}:
        count = " and ".join(map(str, sorted(counts)))
        raise ModelError(
            f"The embedding to start from has {count} vectors, but this run trains {recipe.embedding_vectors}.",
            f"Set vectors to {count}, or connect another embedding.",
            "embedding",
        )


def insert_placeholder(dataset: Dataset, name: str, templates: str) -> Dataset:
    """Return the dataset with the embedding in every caption.

    In captions the embedding replaces the trigger, the bare name or `[trigger]`. A caption without any of them gets the
    embedding in front if the dataset has a trigger. An image without a caption gets the templates, one per visit. Class
    images stay unchanged.

    Args:
        templates: key of TEMPLATES.

    Raises:
        DatasetError: captions lack the embedding in a dataset without a trigger. The message names their files.
    """
    word = _IDENTIFIER + name
    examples = []
    lacking = []
    for example in dataset.examples:
        if example.prior:
            # A class image shows the class, not the subject.
            examples.append(example)
            continue
        texts = tuple(_renamed(text, example, name) for text in example.captions if text)
        if not texts:
            texts = tuple(template.format(word) for template in TEMPLATES[templates])
        elif not example.trigger and not all(word in text for text in texts):
            lacking.append(example.source.name)
        # A class prompt by caption has the class where the embedding is now.
        anchor = example.anchor and replace(example.anchor, replaced=_renamed(example.anchor.replaced, example, name))
        examples.append(replace(example, captions=texts, trigger=word, anchor=anchor))
    if lacking:
        shown = ", ".join(lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        raise DatasetError(
            f"{len(lacking)} of {len(dataset.examples)} captions do not contain the embedding '{name}': {shown}.",
            f"Write {name} into them in place of the subject's name, or set the dataset's trigger.",
            "dataset",
        )
    return replace(dataset, examples=tuple(examples), trigger=word)


def _renamed(caption: str, example: Example, name: str) -> str:
    names = {name, example.trigger, composed(example.trigger), "[trigger]"} - {""}
    longest = sorted(names, key=len, reverse=True)
    prefixed = starts_word(_IDENTIFIER) + _IDENTIFIER
    words = (f"(?:{prefixed}|{starts_word(alias)}){re.escape(alias)}{ends_word(alias)}" for alias in longest)
    # Names may contain '-' and '.': without the space, `my-word-style` would name another embedding.
    pattern = re.compile(rf"(?<!:)(?:{'|'.join(words)})(?=([\w.-]?))", re.IGNORECASE)
    if not pattern.search(caption):
        # Accents may be separate characters in the caption.
        other = composed(caption)
        caption = other if pattern.search(other) else caption
    return pattern.sub(lambda match: _IDENTIFIER + name + (" " if match.group(1) else ""), caption)


def refuse_preservation(dataset: Dataset) -> None:
    """Refuse class images if only an embedding is trained: no weight changes, so there is nothing to preserve.

    Raises:
        DatasetError: the dataset has class images or anchors.
    """
    if any(example.prior or example.anchor is not None for example in dataset.examples):
        raise DatasetError(
            "The dataset has prior preservation, but training an embedding alone changes no weights.",
            "Connect the dataset without Graft Prior Preservation.",
            "dataset",
        )


def start(
    text: TextEncoder, recipe: Recipe, given: Mapping[str, torch.Tensor] | None = None
) -> dict[str, nn.Parameter]:
    """Create the embedding vectors from an embedding's, or from those of the init text, repeated if it has fewer.

    Args:
        given: the embedding, which `check_word` has accepted; None for the init text.

    Returns:
        `embedding/<encoder>`: [vectors, width] float32, added to the training copy of the text encoder.
    """
    import torch

    trainables = {}
    for key, rows in sorted((given or text.start_vectors(recipe.embedding_init)).items()):
        chosen = [rows[number % len(rows)] for number in range(recipe.embedding_vectors)]
        vectors = torch.stack(chosen).to(text.device, torch.float32)
        trainables[PREFIX + key] = torch.nn.Parameter(vectors)
    text.attach(recipe.embedding_name, {name[len(PREFIX) :]: value for name, value in trainables.items()})
    return trainables


def group(vectors: dict[str, nn.Parameter], recipe: Recipe) -> Group:
    """Return the parameter group of the vectors. It has no weight decay, which would pull them towards zero."""
    until = round(recipe.embedding_stop * recipe.steps) if recipe.embedding_stop else None
    return Group(tuple(vectors), recipe.embedding_learning_rate, 0.0, until)


def renormalizing(
    vectors: dict[str, nn.Parameter], text: TextEncoder, recipe: Recipe
) -> Callable[[float | torch.Tensor], None]:
    """Return a function that pulls the norms of the vectors towards the vocabulary's median after each step.

    Without it the norms grow until the embedding drowns out the rest of a prompt. The pull is 100 times the learning
    rate, at most 1. The rule comes from cloneofsimo's lora, which introduced pivotal tuning of diffusion models.
    """
    import torch

    medians = {PREFIX + key: value for key, value in text.median_norms().items()}
    rate = EMBEDDING_RATE if finds_its_rate(recipe.optimizer) else recipe.embedding_learning_rate

    def renormalize(factor: float | torch.Tensor) -> None:
        pull = 100.0 * rate * factor
        pull = pull.clamp(max=1.0) if torch.is_tensor(pull) else min(1.0, pull)
        with torch.no_grad():
            for name, value in vectors.items():
                if value.requires_grad:
                    norms = value.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                    value.mul_((norms + pull * (medians[name] - norms)) / norms)

    return renormalize


def made_of(values: dict[str, torch.Tensor], recipe: Recipe, metadata: dict[str, str]) -> Embedding:
    """Build the embedding from the values of the trainables.

    Raises:
        ModelError: the values hold no embedding.
    """
    vectors = {name[len(PREFIX) :]: value for name, value in values.items() if name.startswith(PREFIX)}
    if not vectors:
        raise ModelError("The run has no embedding.", "Start the run over (on_existing in Graft Run Options).")
    ready = {key: value.detach().to("cpu").float().clone() for key, value in vectors.items()}
    return Embedding(ready, recipe.embedding_name, metadata)
