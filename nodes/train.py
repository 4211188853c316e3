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
            description="Trains a LoRA on the pictures of a dataset and hands the model on with it applied. "
            "The queue is busy while it runs. Queued again, it goes on where it was, or returns what is finished.",
            inputs=[
                *inputs.base("The model to train on; LoRAs that wait on it count as part of it."),
                Dataset.Input("dataset", tooltip="Pictures and captions."),
                inputs.steps(),
                usually(
                    inputs.learning_rate(
                        "0: the default of the model's family (1e-4). Too high shows as burnt pictures."
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
                embedding = train.nothing("No embedding was trained: connect Graft Pivotal Options to train one.")
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
            description="Textual inversion: learns vectors for a new word and changes no weight. "
            "Prompts behind the clip that comes out write it as embedding:NAME.",
            inputs=[
                *inputs.base("The model the word is learnt for."),
                Dataset.Input("dataset", tooltip="Pictures; captions, if any, name the word where the thing is named."),
                io.String.Input(
                    "name",
                    default="my-word",
                    tooltip="The word, written in prompts as embedding:NAME between spaces. No word that exists.",
                ),
                io.String.Input(
                    "init_text",
                    default="",
                    tooltip="What it is, in a word or two, such as dog or oil painting: where learning starts.",
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many of a prompt's 75 places it takes. More hold more, and need more pictures.",
                ),
                inputs.steps(),
                usually(
                    inputs.learning_rate(
                        "0: the default, 5e-4. Too high shows as pictures that only look like noise or one colour."
                    ),
                    "5e-4",
                    optimizer="auto",
                ),
                inputs.batch_size(),
                inputs.seed("Decides order and noise. Another seed is another run."),
                options_input(),
                io.Combo.Input(
                    "templates",
                    options=list(TEMPLATES),
                    default="object",
                    optional=True,
                    tooltip="What pictures without a caption are called: a photo of it, or something in its style.",
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
            word = EmbeddingSpec(name.strip(), init_text.strip(), vectors, templates=templates)
            widgets = train.TrainInputs("embedding", steps, learning_rate, 0, batch_size, seed, word)
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
            description="Trains all weights of the model on the pictures of a dataset and hands the model on with what "
            "changed applied. The queue is busy while it runs. Queued again, it goes on where it was, or returns what "
            "is finished.",
            inputs=[
                *inputs.base("The model to train; LoRAs that wait on it count as part of it. It stays as it is."),
                Dataset.Input("dataset", tooltip="Pictures and captions; some hundred and more."),
                inputs.steps(),
                inputs.learning_rate(
                    "0: the default of the model's family (SD1.5 5e-6, SDXL 1e-6). Too high forgets what it knew."
                ),
                inputs.batch_size(),
                inputs.seed("Decides order and noise. Another seed is another run."),
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
