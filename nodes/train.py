"""Nodes that train."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainers.methods.textual_inversion import TEMPLATES, check_name
from ..trainers.recipe.recipe import EmbeddingSpec
from . import inputs
from .checks import checked
from .schema import CATEGORY, Dataset, Embedding, LossMap, Trainer, describe, named, options_input, usually

_CATEGORY = f"{CATEGORY}/train"


class GraftTrainLoRA(Trainer):
    """Node that trains a LoRA on the graph's own MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftTrainLoRA",
            display_name="Graft Train LoRA",
            words="Training",
            aliases=["lora training", "lora trainer", "finetune", "fine-tune", "train", "locon", "dora"],
            category=_CATEGORY,
            description="Trains a LoRA on a dataset, and returns the model with the LoRA applied. The queue is busy "
            "until training is done. Queued again, it resumes, or returns the finished run.",
            inputs=[
                *inputs.base("The model to train on. LoRAs applied before it count as part of it."),
                Dataset.Input("dataset", tooltip="Pictures and captions."),
                inputs.steps(),
                usually(
                    inputs.learning_rate(
                        "0: the default of the model's family (1e-4). If it is too high, pictures look burnt."
                    ),
                    "1e-4",
                    optimizer="auto",
                ),
                inputs.rank(),
                inputs.batch_size(),
                inputs.seed(),
                options_input(),
            ],
            outputs=[
                *inputs.trained(),
                Embedding.Output("embedding", display_name="embedding"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    validate_inputs = checked(learning_rate=None)

    @classmethod
    def execute(
        cls, model, clip, vae, dataset, steps, learning_rate, rank, batch_size, seed, options=None
    ) -> io.NodeOutput:
        from .host.actions import train

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options):
            widgets = train.TrainInputs("LoRA", steps, learning_rate, rank, batch_size, seed)
            done = train.train(model, clip, vae, dataset, widgets, options, cls.hidden.unique_id)
            embedding = done.embedding
            if embedding is None:
                embedding = train.nothing("This run trained no embedding. Connect Graft Pivotal Options to train one.")
            return io.NodeOutput(done.model, done.clip, done.adapter, done.loss, embedding, ui=done.ui)


class GraftTrainEmbedding(Trainer):
    """Node that trains a new embedding for the graph's own CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftTrainEmbedding",
            display_name="Graft Textual Inversion",
            words="Training",
            aliases=["textual inversion", "ti", "embedding training", "train", "finetune"],
            category=_CATEGORY,
            description="Textual inversion: learns a new embedding and changes no weight of the model. Prompts "
            "connected to the clip output write it as embedding:NAME.",
            inputs=[
                *inputs.base("The model that the embedding is for."),
                Dataset.Input(
                    "dataset",
                    tooltip="Pictures, with or without captions. Each caption must contain the "
                    "embedding's name or the trigger.",
                ),
                io.String.Input(
                    "name",
                    default="my-word",
                    tooltip="Name of the embedding. Prompts write it as embedding:NAME between spaces. Choose a name "
                    "that does not exist yet.",
                ),
                io.String.Input(
                    "init_text",
                    default="",
                    tooltip="What it shows, in a word or two, such as dog or oil painting. Training starts from there.",
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Number of a prompt's 75 tokens that the embedding takes. More vectors hold more, and "
                    "need more pictures.",
                ),
                inputs.steps(),
                usually(
                    inputs.learning_rate(
                        "0: the default, 5e-4. If it is too high, pictures become noise or a single color."
                    ),
                    "5e-4",
                    optimizer="auto",
                ),
                inputs.batch_size(),
                inputs.seed("Determines the order of the pictures and the noise. Another seed makes another run."),
                options_input(),
                io.Combo.Input(
                    "templates",
                    options=list(TEMPLATES),
                    default="object",
                    optional=True,
                    tooltip="Captions for pictures without one. object: a photo of it; style: something in its style.",
                ),
            ],
            outputs=[
                io.Clip.Output("trained_clip", display_name="clip"),
                Embedding.Output("embedding", display_name="embedding"),
                LossMap.Output("loss", display_name="loss"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    validate_inputs = checked(
        name=lambda name: check_name(name.strip()), init_text=None, learning_rate=None, templates=None
    )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        dataset,
        name,
        init_text,
        vectors,
        steps,
        learning_rate,
        batch_size,
        seed,
        options=None,
        templates="object",
    ) -> io.NodeOutput:
        from .host.actions import train

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options):
            spec = EmbeddingSpec(name.strip(), init_text.strip(), vectors, templates=templates)
            widgets = train.TrainInputs("embedding", steps, learning_rate, 0, batch_size, seed, spec)
            done = train.train(model, clip, vae, dataset, widgets, options, cls.hidden.unique_id)
            return io.NodeOutput(done.clip, done.embedding, done.loss, ui=done.ui)


class GraftFineTune(Trainer):
    """Node that trains all weights of a copy of the graph's own MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftFineTune",
            display_name="Graft Fine-tune",
            words="Checkpoint Training",
            aliases=["finetune", "full finetune", "fine-tuning", "train checkpoint", "train"],
            category=_CATEGORY,
            description="Trains all weights of the model on a dataset, and returns the model with the result applied. "
            "The queue is busy until training is done. Queued again, it resumes, or returns the finished run.",
            inputs=[
                *inputs.base(
                    "The model to train. LoRAs applied before it count as part of it. The input stays unchanged."
                ),
                Dataset.Input("dataset", tooltip="Pictures and captions, best some hundred or more."),
                inputs.steps(),
                inputs.learning_rate(
                    "0: the default of the model's family (SD1.5 5e-6, SDXL 1e-6). If it is too high, the model "
                    "forgets what it knew."
                ),
                inputs.batch_size(),
                inputs.seed("Determines the order of the pictures and the noise. Another seed makes another run."),
                options_input(),
            ],
            outputs=inputs.trained(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    validate_inputs = checked(learning_rate=None)

    @classmethod
    def execute(cls, model, clip, vae, dataset, steps, learning_rate, batch_size, seed, options=None) -> io.NodeOutput:
        from .host.actions import train

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options):
            widgets = train.TrainInputs("all weights", steps, learning_rate, 0, batch_size, seed)
            done = train.train(model, clip, vae, dataset, widgets, options, cls.hidden.unique_id)
            return io.NodeOutput(done.model, done.clip, done.adapter, done.loss, ui=done.ui)


NODES = [GraftTrainLoRA, GraftTrainEmbedding, GraftFineTune]
