"""Nodes that draw images of a class and add them to those of a subject."""

from comfy_api.latest import io

from ..trainers.data import class_images, prior
from . import inputs
from .checks import checked
from .schema import CATEGORY, Dataset, describe, named

_CATEGORY = f"{CATEGORY}/dataset"


class GraftClassImages(io.ComfyNode):
    """Node that renders class images with the graph's own model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftClassImages",
            display_name="Graft Class Images",
            words="Regularization",
            aliases=["regularization images", "regularisation images", "reg images", "prior preservation"],
            category=_CATEGORY,
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
            category=_CATEGORY,
            description="Adds class images to a subject's images, one to one, so that a trainer learns the subject "
            "and keeps its class unchanged.",
            inputs=[
                Dataset.Input("dataset", tooltip="The subject's images, captioned with its rare word."),
                Dataset.Input("class_dataset", tooltip="Images of the class, captioned without that word."),
                inputs.prior_weight("weight"),
            ],
            outputs=[Dataset.Output("dataset_out", display_name="dataset")],
        )

    validate_inputs = checked(weight=None)

    @classmethod
    def execute(cls, dataset, class_dataset, weight) -> io.NodeOutput:
        with named(cls, dataset=dataset, class_dataset=class_dataset):
            return io.NodeOutput(prior.add_class_images(dataset, class_dataset, weight))


NODES = [GraftClassImages, GraftPriorPreservation]
