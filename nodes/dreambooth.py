"""Nodes that train a subject and preserve its class."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainers.data import class_images, prior
from . import inputs
from .checks import checked
from .schema import CATEGORY, Dataset, Trainer, advanced, describe, named, options_input

_DATASET = f"{CATEGORY}/dataset"
_TRAIN = f"{CATEGORY}/train"


def _prior_weight(name: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=0.0,
        max=100.0,
        step=0.01,
        tooltip="Weight of the class in the loss; the subject counts 1. 0: the class is not preserved.",
    )


class GraftClassImages(io.ComfyNode):
    """Node that renders class images with the graph's own model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftClassImages",
            display_name="Graft Class Images",
            words="Regularization",
            aliases=["regularization images", "regularisation images", "reg images", "prior preservation"],
            category=_DATASET,
            description="Draws pictures of a class with the graph's own model, for prior preservation, and keeps them "
            "on disk. Queued again, the node draws only missing pictures.",
            inputs=[
                *inputs.base("The model that you will train. It draws what it knows of the class."),
                inputs.text(
                    "class_prompt",
                    "The class without the subject's rare word, such as a photo of a dog. It is also the "
                    "pictures' caption.",
                    multiline=True,
                ),
                io.Int.Input("count", default=200, min=1, max=100_000, tooltip="Number of pictures in total."),
                inputs.sampling_steps(class_images.STEPS),
                inputs.cfg(),
                inputs.resolution("Side in pixels; use the dataset's. 0: the model's own resolution."),
                inputs.seed("Seed for the noise of the first picture. Each next picture adds 1."),
                inputs.negative_prompt(),
                *inputs.sampler(),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Pictures drawn at once. More are faster on a graphics card, and take more memory.",
                ),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset"),
                io.Image.Output("image", display_name="image"),
            ],
            is_output_node=True,
        )

    validate_inputs = checked(class_prompt=None, cfg=None, negative_prompt=None, sampler_name=None, scheduler=None)

    @classmethod
    def fingerprint_inputs(cls, **values) -> list:
        """Return a value that changes when an embedding file that a prompt names is replaced."""
        from .host.model.embeddings import file_states

        return file_states()

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        class_prompt,
        count,
        steps,
        cfg,
        resolution,
        seed,
        negative_prompt,
        sampler_name,
        scheduler,
        batch_size,
    ) -> io.NodeOutput:
        from .host.actions.class_images import ClassImageRequest, make

        with named(cls, model=model, clip=clip, vae=vae, cfg=cfg):
            request = ClassImageRequest(
                class_prompt,
                count,
                steps,
                cfg,
                resolution,
                seed,
                negative_prompt,
                sampler_name,
                scheduler,
                batch_size,
            )
            drawn = make(model, clip, vae, request, cls.hidden.unique_id)
            return io.NodeOutput(drawn.dataset, drawn.batch(), ui={"images": drawn.previews, "animated": (False,)})


class GraftPriorPreservation(io.ComfyNode):
    """Node that adds class images to the images of a subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftPriorPreservation",
            display_name="Graft Prior Preservation",
            words="Regularization",
            aliases=["regularization", "regularisation", "reg images", "class images"],
            category=_DATASET,
            description="Adds class images to a subject's images, one to one, so that a trainer learns the subject "
            "and keeps its class unchanged.",
            inputs=[
                Dataset.Input("dataset", tooltip="The subject's images, captioned with its rare word."),
                Dataset.Input("class_dataset", tooltip="Images of the class, captioned without that word."),
                _prior_weight("weight"),
            ],
            outputs=[Dataset.Output("dataset_out", display_name="dataset")],
        )

    validate_inputs = checked(weight=None)

    @classmethod
    def execute(cls, dataset, class_dataset, weight) -> io.NodeOutput:
        with named(cls, dataset=dataset, class_dataset=class_dataset):
            return io.NodeOutput(prior.add_class_images(dataset, class_dataset, weight))


class GraftTrainDreamBooth(Trainer):
    """Node that trains a subject from a few images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftTrainDreamBooth",
            display_name="Graft Train DreamBooth",
            words="Training",
            aliases=["dreambooth", "db", "subject training", "finetune", "train"],
            category=_TRAIN,
            description="Learns a subject from a few images under a rare word, and keeps its class unchanged. The "
            "queue is busy until training is done. Queued again, it resumes, or returns the finished run.",
            inputs=[
                *inputs.base("The model to train on. LoRAs applied before it count as part of it."),
                Dataset.Input("dataset", tooltip="The subject's images. Images that have captions keep them."),
                inputs.text(
                    "instance_prompt",
                    "Caption of images without one: a rare word and the class, such as a photo of sks dog.",
                ),
                inputs.text(
                    "class_prompt",
                    "The class without the rare word, such as a photo of a dog. Class images are drawn from it.",
                ),
                io.Int.Input(
                    "class_images",
                    default=200,
                    min=0,
                    max=100_000,
                    tooltip="Number of class images in total; missing ones are drawn. 0: none, and the class is not "
                    "preserved.",
                ),
                _prior_weight("prior_weight"),
                inputs.choice(
                    "train",
                    ["LoRA", "all weights"],
                    "LoRA: a small difference on the attention layers. all weights: the whole model.",
                ),
                inputs.steps(800),
                inputs.learning_rate(
                    "0: the default of the model's family (SD1.5: 1e-4 for a LoRA, 5e-6 for all weights).",
                    "1e-4",
                    train="LoRA",
                ),
                inputs.rank(),
                inputs.batch_size(2, "Pictures per step, class images included: 2 is one of each."),
                inputs.seed(),
                Dataset.Input(
                    "class_dataset", optional=True, tooltip="Your own class images, or those of another node."
                ),
                options_input(),
                advanced(
                    inputs.choice(
                        "prior",
                        prior.PRIORS,
                        "How to preserve the class. differential: no class images; the loss holds the model "
                        "to its predictions for class_prompt before training. A step takes about twice as long.",
                        optional=True,
                    )
                ),
                inputs.start_adapter(),
            ],
            outputs=inputs.trained(),
            is_output_node=True,
        )

    validate_inputs = checked(
        instance_prompt=None, class_prompt=None, prior_weight=None, train=None, learning_rate=None, prior=None
    )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        dataset,
        instance_prompt,
        class_prompt,
        class_images,
        prior_weight,
        train,
        steps,
        learning_rate,
        rank,
        batch_size,
        seed,
        class_dataset=None,
        options=None,
        prior="class images",
        adapter=None,
    ) -> io.NodeOutput:
        from .host.actions import dreambooth
        from .host.actions.train import TrainInputs, as_start

        sockets = {"model": model, "clip": clip, "vae": vae, "dataset": dataset}
        with named(cls, **sockets, class_dataset=class_dataset, options=options, adapter=adapter):
            done = dreambooth.train(
                model,
                clip,
                vae,
                dataset,
                dreambooth.Subject(instance_prompt, class_prompt, class_images, prior_weight, prior, class_dataset),
                TrainInputs(train, steps, learning_rate, rank, batch_size, seed, start=as_start(adapter)),
                options,
                cls.hidden.unique_id,
            )
            return io.NodeOutput(done.model, done.clip, done.adapter, done.loss, ui=done.ui)


NODES = [GraftClassImages, GraftPriorPreservation, GraftTrainDreamBooth]
