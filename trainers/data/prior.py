"""Prior preservation: class images or a prior target keep a subject's class unchanged while the subject is learned.

Source: Ruiz et al. 2022, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import DatasetError, SettingsError
from . import captions
from .examples import Dataset, PriorTarget, combine, shortened

if TYPE_CHECKING:
    from .examples import EncodedPrompt, Example, LeftOut


SEVERAL, BY_CAPTION = "differential, several prompts", "differential, by caption"
PRIORS = ("class images", "differential", SEVERAL, BY_CAPTION)


def add_class_images(dataset: Dataset, class_dataset: Dataset, weight: float) -> Dataset:
    """Add class images to a dataset, with a weight in the loss.

    Batches draw class images one to one with the dataset's own images. The loss of a batch of B is
    (1/B) sum w_i l_i, with w = 1 for the dataset's own images and the weight for class images. Class images keep their
    own captions and never get the dataset's trigger. Class images that are marked as held out are dropped, because
    validation measures the subject. Weight 0 returns the dataset unchanged.

    Raises:
        DatasetError: there is no class image, or a class image's caption holds the subject's trigger. The
            error names the input.
        SettingsError: the weight is not between 0 and 1000.
    """
    if not 0.0 <= weight <= 1000.0:
        raise SettingsError(f"The prior weight is {weight}.", "It must lie between 0 and 1000; 1 is usual.", "weight")
    if weight == 0.0:
        return dataset
    chosen = tuple(example for example in class_dataset.examples if not example.held_out)
    if not chosen:
        raise DatasetError(
            f"The class dataset '{class_dataset.name}' has no picture to train on.",
            "Connect a dataset with pictures to train on, or Graft Class Images.",
            "class_dataset",
        )
    _refuse_subject(dataset, chosen)
    marked = tuple(replace(example, prior=True, weight=weight, anchor=None) for example in chosen)
    try:
        joined = combine(dataset, replace(class_dataset, examples=marked))
    except DatasetError as error:
        raise DatasetError(error.message, error.cure, "class_dataset") from error
    return replace(joined, trigger=dataset.trigger, name=dataset.name)


def _refuse_subject(dataset: Dataset, classes: Sequence[Example]) -> None:
    """Raise DatasetError if a class image's caption holds a trigger of the dataset: both would mean the subject."""
    triggers = {example.trigger for example in dataset.examples if example.trigger and not example.prior}
    for example in classes:
        caption = captions.unvaried_caption(example)
        for trigger in sorted(triggers):
            if captions.holds_words(caption, trigger):
                raise DatasetError(
                    f"The caption '{caption}' of the class image '{example.source.name}' contains the subject's "
                    f"trigger '{trigger}'.",
                    "Caption class images with the class alone, such as 'a photo of a dog'. Remove the trigger of "
                    "their dataset, or choose another.",
                    "class_dataset",
                )


def add_prior_target(dataset: Dataset, class_prompt: str, weight: float, kind: str = "differential") -> Dataset:
    """Give each example of the subject a prior target: the frozen base's own prediction for a class prompt.

    The loss l of an example becomes l + weight |eps(x_t, class prompt) - eps_base(x_t, class prompt)|^2, on the same
    noised latent x_t. This needs no class images, and a step costs about twice as much. Weight 0 returns the dataset
    unchanged.

    Args:
        class_prompt: for SEVERAL, prompts between `|`, of which each visit draws one; an empty one is the empty prompt.
            For BY_CAPTION, the words that replace the dataset's trigger in each caption (ai-toolkit).
        kind: one of PRIORS.

    Raises:
        SettingsError: the class prompt is empty.
        DatasetError: a caption does not have the words to replace.
    """
    if weight == 0.0:
        return dataset
    if kind == SEVERAL:
        prompt, *others = (" ".join(part.split()) for part in class_prompt.split("|"))
    else:
        prompt, others = checked_prompt(class_prompt, "class_prompt"), []
    target = PriorTarget(prompt, weight, tuple(others), dataset.trigger if kind == BY_CAPTION else "")
    if kind == BY_CAPTION:
        _refuse_without(dataset)
    rows = (example if example.prior else replace(example, anchor=target) for example in dataset.examples)
    return replace(dataset, examples=tuple(rows))


def _refuse_without(dataset: Dataset) -> None:
    """Raise DatasetError if a caption lacks the dataset's trigger: its class prompt would still mean the subject."""
    for example in dataset.examples:
        if example.prior or example.encoded is not None:
            continue
        for caption in example.captions:
            if not (
                dataset.trigger
                and captions.holds_words(captions.with_trigger(caption, example.trigger), dataset.trigger)
            ):
                raise DatasetError(
                    f"The caption '{caption}' of '{example.source.name}' does not contain '{dataset.trigger}', which "
                    "class_prompt would replace.",
                    "Set the trigger of Graft Load Dataset to the words for the subject in all captions.",
                    "dataset",
                )


def class_prompts(target: PriorTarget, prompt: str | EncodedPrompt) -> tuple[str, ...]:
    """Return the class prompts for an example's prompt. A visit draws one of them."""
    if target.replaced and isinstance(prompt, str):
        return (captions.replace_words(prompt, target.replaced, target.prompt),)
    return (target.prompt, *target.others)


def checked_prompt(prompt: str, input: str) -> str:
    """Return a prompt in one line.

    Raises:
        SettingsError: the prompt is empty.
    """
    joined = " ".join(prompt.split())
    if not joined:
        what = "subject" if input == "instance_prompt" else "class"
        example = "a photo of sks dog" if what == "subject" else "a photo of a dog"
        raise SettingsError(f"The {input} is empty.", f"Name the {what}, such as '{example}'.", input)
    return joined


def captioned(dataset: Dataset, prompt: str, input: str) -> Dataset:
    """Use a prompt as the caption of each image that has neither a caption nor an encoded prompt of its own.

    Args:
        input: name of the prompt's input, for the error.

    Raises:
        SettingsError: images have no caption, and the prompt is empty.
    """
    bare = [not any(example.captions) and example.encoded is None for example in dataset.examples]
    if not any(bare):
        return dataset
    caption = (checked_prompt(prompt, input),)
    rows = zip(dataset.examples, bare, strict=True)
    return replace(
        dataset, examples=tuple(replace(example, captions=caption) if lacks else example for example, lacks in rows)
    )


def refuse_if_one_sided(dataset: Dataset, usable: Sequence[Example], left_out: Sequence[LeftOut]) -> None:
    """Raise DatasetError if all images of the subject, or all class images, are left out."""
    for prior, name in ((False, "images of the subject"), (True, "class images")):
        count = sum(example.prior == prior for example in dataset.examples)
        if count and not any(example.prior == prior for example in usable):
            raise DatasetError(
                f"Graft cannot train on any of the {count} {name} of '{dataset.name}': {shortened(left_out)}.",
                "Replace damaged pictures. Replace small ones, or turn on upscale.",
                "dataset",
            )
