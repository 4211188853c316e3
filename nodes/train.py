"""Nodes that train."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..trainers.methods.textual_inversion import TEMPLATES, check_name
from ..trainers.recipe.recipe import EmbeddingSpec
from . import inputs
from .checks import checked
from .schema import CATEGORY, Dataset, Embedding, LossMap, Trainer, describe, named, options_input

_CATEGORY = f"{CATEGORY}/train"
_AS_JOB = "as a job"


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
                inputs.learning_rate(
                    "0: the default of the model's family (1e-4). If it is too high, pictures look burnt.", "1e-4"
                ),
                inputs.rank(),
                inputs.batch_size(),
                inputs.seed(),
                options_input(),
                inputs.start_adapter(),
            ],
            outputs=[
                *inputs.trained(),
                Embedding.Output("embedding", display_name="embedding"),
            ],
            is_output_node=True,
        )

    validate_inputs = checked(learning_rate=None)

    @classmethod
    def execute(
        cls, model, clip, vae, dataset, steps, learning_rate, rank, batch_size, seed, options=None, adapter=None
    ) -> io.NodeOutput:
        from .host.actions import train

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options, adapter=adapter):
            start = train.as_start(adapter)
            widgets = train.TrainInputs("LoRA", steps, learning_rate, rank, batch_size, seed, start=start)
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
                inputs.text(
                    "name",
                    "Name of the embedding. Prompts write it as embedding:NAME between spaces. Choose a name "
                    "that does not exist yet.",
                    default="my-word",
                ),
                inputs.text(
                    "init_text",
                    "What it shows, in a word or two, such as dog or oil painting. Training starts from there.",
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
                inputs.learning_rate(
                    "0: the default, 5e-4. If it is too high, pictures become noise or a single color.", "5e-4"
                ),
                inputs.batch_size(),
                inputs.seed("Determines the order of the pictures and the noise. Another seed makes another run."),
                options_input(),
                inputs.choice(
                    "templates",
                    TEMPLATES,
                    "Captions for pictures without one. object: a photo of it; style: something in its style.",
                    optional=True,
                ),
                Embedding.Input(
                    "embedding",
                    optional=True,
                    tooltip="Embedding to start from, instead of init_text, which must then be empty.",
                ),
            ],
            outputs=[
                io.Clip.Output("trained_clip", display_name="clip"),
                Embedding.Output("trained_embedding", display_name="embedding"),
                LossMap.Output("loss", display_name="loss"),
            ],
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
        embedding=None,
    ) -> io.NodeOutput:
        from .host.actions import train

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options, embedding=embedding):
            spec = EmbeddingSpec(name.strip(), init_text.strip(), vectors, templates=templates)
            widgets = train.TrainInputs("embedding", steps, learning_rate, 0, batch_size, seed, spec, start=embedding)
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
                inputs.start_adapter(),
            ],
            outputs=inputs.trained(),
            is_output_node=True,
        )

    validate_inputs = checked(learning_rate=None)

    @classmethod
    def execute(
        cls, model, clip, vae, dataset, steps, learning_rate, batch_size, seed, options=None, adapter=None
    ) -> io.NodeOutput:
        from .host.actions import train

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options, adapter=adapter):
            start = train.as_start(adapter)
            widgets = train.TrainInputs("all weights", steps, learning_rate, 0, batch_size, seed, start=start)
            done = train.train(model, clip, vae, dataset, widgets, options, cls.hidden.unique_id)
            return io.NodeOutput(done.model, done.clip, done.adapter, done.loss, ui=done.ui)


class GraftTrainSlider(Trainer):
    """Node that trains a slider from prompts, or from pairs of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftTrainSlider",
            display_name="Graft Train Slider",
            words="Training",
            aliases=["concept slider", "slider lora", "lora training", "without pictures", "train"],
            category=_CATEGORY,
            description="Trains a LoRA that moves one property, such as age or light: up at positive strengths, down "
            "at negative ones. It needs no pictures. Queued again, it resumes, or returns the finished run.",
            inputs=[
                *inputs.base("The model to train on. LoRAs applied before it count as part of it."),
                inputs.text(
                    "target",
                    "What the slider changes, such as: a person. Several lines make several rows of prompts.",
                    multiline=True,
                ),
                inputs.text(
                    "positive",
                    "Where positive strengths lead, such as: a very old person. One line for each target.",
                    multiline=True,
                ),
                inputs.text(
                    "negative",
                    "Where negative strengths lead, such as: a very young person. One line for each target.",
                    multiline=True,
                ),
                inputs.text(
                    "anchors",
                    "Prompts whose pictures must stay the same, one per line, such as: a house.",
                    multiline=True,
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="Strength at which the slider is trained, in both directions.",
                ),
                inputs.steps(500),
                inputs.learning_rate(
                    "0: the default of the model's family (1e-4). If it is too high, pictures look burnt.", "1e-4"
                ),
                inputs.rank(),
                inputs.seed("Determines the start, the noise and the anchors. Another seed makes another run."),
                Dataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="Pairs of pictures in place of positive and negative: pictures of the positive side, and "
                    "those of the negative side in control_folder.",
                ),
                options_input(),
                inputs.resolution("Side in pixels. 0: the model's own resolution."),
                inputs.choice(
                    "run",
                    ["here", _AS_JOB],
                    "as a job: writes a folder for several GPUs or machines, as Graft Export Job does, and "
                    "trains nothing.",
                    optional=True,
                ),
            ],
            outputs=inputs.trained(),
            is_output_node=True,
        )

    validate_inputs = checked(
        target=None, positive=None, negative=None, anchors=None, strength=None, learning_rate=None, run=None
    )

    @classmethod
    def fingerprint_inputs(cls, run="here", **values) -> list | float:
        """Return a value that changes when ComfyUI must not use its cached outputs; a job is always written."""
        return float("nan") if run == _AS_JOB else super().fingerprint_inputs(**values)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        target,
        positive,
        negative,
        anchors,
        strength,
        steps,
        learning_rate,
        rank,
        seed,
        dataset=None,
        options=None,
        resolution=0,
        run="here",
    ) -> io.NodeOutput:
        from .host.actions import slider, train

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options):
            texts = target, positive, negative, anchors, strength
            spec, dataset = slider.from_pairs(dataset, *texts) if dataset else slider.from_prompts(*texts)
            dataset = replace(dataset, resolution=resolution or dataset.resolution)
            widgets = train.TrainInputs("LoRA", steps, learning_rate, rank, 1, seed, slider=spec)
            if run == _AS_JOB:
                path = train.export(model, clip, vae, dataset, widgets, options, cls.hidden.unique_id)
                outputs = [train.nothing("Train the job first: this node has only written it.")] * 4
                return io.NodeOutput(*outputs, ui={"text": (f"Job: {path}",)})
            done = train.train(model, clip, vae, dataset, widgets, options, cls.hidden.unique_id)
            return io.NodeOutput(done.model, done.clip, done.adapter, done.loss, ui=done.ui)


NODES = [GraftTrainLoRA, GraftTrainEmbedding, GraftFineTune, GraftTrainSlider]
