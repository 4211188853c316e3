"""Nodes that train."""

from dataclasses import replace

from comfy_api.latest import io

from ..trainers.data import prior
from ..trainers.methods.textual_inversion import TEMPLATES, check_name
from ..trainers.recipe.recipe import EmbeddingSpec
from . import inputs
from .checks import checked
from .schema import CATEGORY, Dataset, Embedding, LossMap, Trainer, advanced, describe, named, options_input

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


class GraftTrainDreamBooth(Trainer):
    """Node that trains a subject from a few images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftTrainDreamBooth",
            display_name="Graft Train DreamBooth",
            words="Training",
            aliases=["dreambooth", "db", "subject training", "finetune", "train"],
            category=_CATEGORY,
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
                inputs.prior_weight("prior_weight"),
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


class GraftTrainPreference(Trainer):
    """Node that trains a LoRA, or all weights, on pairs of a better and a worse picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftTrainPreference",
            display_name="Graft Train Preference",
            words="DPO",
            aliases=["dpo", "diffusion-dpo", "preference", "reward", "pairs", "alignment", "lora training", "train"],
            category=_CATEGORY,
            description="Learns from pairs of pictures for a caption which one you prefer, and draws more like it. The "
            "queue is busy until training is done. Queued again, it resumes, or returns the finished run.",
            inputs=[
                *inputs.base("The model to train on. LoRAs applied before it count as part of it."),
                Dataset.Input("dataset", tooltip="Pairs: better pictures with captions, and worse_folder."),
                io.Float.Input(
                    "beta",
                    default=5000.0,
                    min=1.0,
                    max=1e6,
                    step=100.0,
                    tooltip="How closely the result stays with the model: higher is closer. 2000 for SD1.5, 5000 for "
                    "SDXL.",
                ),
                inputs.steps(),
                inputs.learning_rate(
                    "0: a tenth of the usual one of the model's family (1e-5 for a LoRA).", "1e-5", train="LoRA"
                ),
                inputs.rank(),
                inputs.batch_size(tooltip="Pairs per step."),
                inputs.seed(),
                options_input(),
                inputs.start_adapter(),
                inputs.lora_or_all(),
            ],
            outputs=inputs.trained(),
            is_output_node=True,
        )

    validate_inputs = checked(beta=None, learning_rate=None, train=None)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        dataset,
        beta,
        steps,
        learning_rate,
        rank,
        batch_size,
        seed,
        options=None,
        adapter=None,
        train="LoRA",
    ) -> io.NodeOutput:
        from .host.actions import train as training

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options, adapter=adapter):
            start = training.as_start(adapter)
            widgets = training.TrainInputs(
                train, steps, learning_rate, rank, batch_size, seed, start=start, preference_beta=beta
            )
            done = training.train(model, clip, vae, dataset, widgets, options, cls.hidden.unique_id)
            return io.NodeOutput(done.model, done.clip, done.adapter, done.loss, ui=done.ui)


NODES = [
    GraftTrainLoRA,
    GraftTrainEmbedding,
    GraftFineTune,
    GraftTrainSlider,
    GraftTrainDreamBooth,
    GraftTrainPreference,
]
