"""Node that trains a preference from pairs of pictures."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs
from .checks import checked
from .schema import CATEGORY, Dataset, Trainer, describe, named, options_input


class GraftTrainPreference(Trainer):
    """Node that trains a LoRA, or all weights, on pairs of a better and a worse picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftTrainPreference",
            display_name="Graft Train Preference",
            words="DPO",
            aliases=["dpo", "diffusion-dpo", "preference", "reward", "pairs", "alignment", "lora training", "train"],
            category=f"{CATEGORY}/train",
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
                inputs.choice(
                    "train",
                    ["LoRA", "all weights"],
                    "Train a LoRA, or all weights of the model. rank has no effect on all weights.",
                    optional=True,
                ),
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


NODES = [GraftTrainPreference]
