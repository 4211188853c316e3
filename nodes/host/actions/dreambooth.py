"""DreamBooth: learn a subject from a few images while its class is preserved (Ruiz et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ....trainers.data import captions, prior
from ....trainers.data.examples import combine
from ....trainers.errors import SettingsError
from ....trainers.methods import METHODS
from ....trainers.optimizers import OPTIMIZERS
from ..model import checks
from ..server.control import run_controlled
from . import class_images
from . import train as training

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

    from ....trainers.data.examples import Dataset
    from ....trainers.engine.resolve import Options

    _Draw = Callable[[class_images.ClassImageRequest], class_images.ClassImageSet]


@dataclass(frozen=True)
class Subject:
    """A subject, and the way in which its class is preserved.

    Attributes:
        class_images: requested number; 0 for none.
        prior_weight: weight of the class in the loss; 0 preserves nothing.
        prior: one of trainers.data.prior.PRIORS.
        class_dataset: the user's own class images; None for none.
    """

    instance_prompt: str
    class_prompt: str
    class_images: int
    prior_weight: float
    prior: str
    class_dataset: Dataset | None = None


def train(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    dataset: Dataset,
    subject: Subject,
    widgets: training.TrainInputs,
    options: Options | None,
    node: str,
) -> training.TrainOutput:
    """Draw the missing class images, then train as every other method does.

    Raises:
        InterruptProcessingException: ComfyUI's interruption, after progress was saved.
    """
    give_way = training.give_way(options)
    return run_controlled(node, give_way, lambda _: _train(model, clip, vae, dataset, subject, widgets, options, node))


def _train(model, clip, vae, dataset, subject, widgets, options, node: str) -> training.TrainOutput:
    checks.check_sockets(model, clip, vae)
    checks.check_not_applied(model, clip, widgets.start)
    _check_method(widgets.method)
    instance = prior.captioned(dataset, subject.instance_prompt, "instance_prompt")
    instance = replace(instance, trigger=dataset.trigger or " ".join(subject.instance_prompt.split()))
    # Fail here, before hundreds of images are drawn in vain.
    widgets = training.with_named_start(widgets, options)
    recipe = training.build_recipe(model, instance, widgets, options)
    OPTIMIZERS[recipe.optimizer].load(recipe)
    preserved, note = _preserved(instance, subject, lambda request: class_images.make(model, clip, vae, request, node))
    done = training.train(model, clip, vae, preserved, widgets, options, node)
    return replace(done, ui={"text": tuple(f"{text} {note}" for text in done.ui["text"])})


def _check_method(name: str) -> None:
    if name not in METHODS:
        raise SettingsError(f"Cannot train '{name}'.", "Choose 'LoRA'.", "train")


def _preserved(dataset: Dataset, subject: Subject, draw: _Draw) -> tuple[Dataset, str]:
    if subject.prior_weight == 0:
        return dataset, "The class is not preserved: prior_weight is 0."
    if subject.prior != "class images":
        _check_class(dataset, subject)
        targeted = prior.add_prior_target(dataset, subject.class_prompt, subject.prior_weight, subject.prior)
        target = next(example.anchor for example in targeted.examples if example.anchor is not None)
        return targeted, (
            f"The class is held to the base model's predictions for {target}, weight {subject.prior_weight:g}."
        )
    if subject.class_images == 0:
        return dataset, "The class is not preserved: class_images is 0."
    classes, note = _classes(dataset, subject, draw)
    return prior.add_class_images(dataset, classes, subject.prior_weight), note


def _classes(dataset: Dataset, subject: Subject, draw: _Draw) -> tuple[Dataset, str]:
    given, usable = subject.class_dataset, 0
    if given is not None:
        given = prior.captioned(given, subject.class_prompt, "class_prompt")
        usable = sum(not example.held_out for example in given.examples)
    if usable >= subject.class_images:
        return given, f"Class images: {usable} from class_dataset."
    _check_class(dataset, subject)
    # Number the drawn images after the given ones, which may be the first images of the same drawing.
    count = subject.class_images
    request = class_images.ClassImageRequest(subject.class_prompt, count, resolution=dataset.resolution, first=usable)
    images = draw(request)
    classes = images.dataset if given is None else combine(given, replace(images.dataset, resolution=given.resolution))
    kept = len(images.dataset.examples) - images.drawn
    drawn = f"{kept} reused and {images.drawn} drawn in {images.folder}"
    return classes, f"Class images: {usable} from class_dataset, {drawn}."


def _check_class(dataset: Dataset, subject: Subject) -> None:
    """Refuse a class prompt that holds a trigger or the instance prompt, before anything is drawn for it.

    Raises:
        SettingsError: names the input.
    """
    class_prompt = subject.class_prompt
    if subject.prior != prior.SEVERAL:
        class_prompt = prior.checked_prompt(class_prompt, "class_prompt")
    triggers = {example.trigger for example in dataset.examples} | {" ".join(subject.instance_prompt.split())}
    for trigger in sorted(triggers - {""}):
        if captions.holds_words(class_prompt, trigger):
            raise SettingsError(
                f"The class_prompt '{class_prompt}' contains '{trigger}', which stands for the subject.",
                "Write the class alone, such as 'a photo of a dog' for 'a photo of sks dog'.",
                "class_prompt",
            )
