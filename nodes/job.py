"""The node that exports a training for other machines."""

from comfy_api.latest import io

from . import inputs
from .checks import checked
from .schema import CATEGORY, Dataset, advanced, describe, named, options_input

_CATEGORY = f"{CATEGORY}/train"


class GraftExportJob(io.ComfyNode):
    """Node that writes a training job to a folder instead of running it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftExportJob",
            display_name="Graft Export Job",
            words="Training",
            aliases=["accelerate", "multi-gpu", "multiple gpus", "distributed training", "remote training", "train"],
            category=_CATEGORY,
            description="Writes a training into a folder, to run it on several GPUs or other machines with Graft's "
            "job.py. It encodes all pictures and captions, and trains nothing. Put it in the place of a trainer.",
            inputs=[
                *inputs.base("The model to train on. Only ComfyUI's own nodes may load and change it."),
                Dataset.Input("dataset", tooltip="Pictures and captions."),
                inputs.steps(),
                inputs.learning_rate(
                    "0: the default of the model's family. If it is too high, pictures look burnt.",
                    "1e-4",
                    train="LoRA",
                ),
                inputs.rank(),
                inputs.batch_size(tooltip="Pictures per step, over all processes together."),
                inputs.seed(),
                options_input(),
                inputs.lora_or_all(),
                inputs.start_adapter(),
                advanced(
                    io.Float.Input(
                        "beta",
                        default=0.0,
                        min=0.0,
                        max=1e6,
                        optional=True,
                        tooltip="For pairs, as in Graft Train Preference. 0: no preference is trained.",
                    )
                ),
            ],
            outputs=[io.String.Output("path", display_name="path")],
            is_output_node=True,
        )

    validate_inputs = checked(learning_rate=None, train=None, beta=None)

    @classmethod
    def fingerprint_inputs(cls, **values) -> float:
        """Return NaN, so that ComfyUI always runs the node.

        The folder may have been removed, and files that the graph names may have changed.
        """
        return float("nan")

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        dataset,
        steps,
        learning_rate,
        rank,
        batch_size,
        seed,
        options=None,
        train="LoRA",
        adapter=None,
        beta=0.0,
    ) -> io.NodeOutput:
        from .host.actions import train as training

        with named(cls, model=model, clip=clip, vae=vae, dataset=dataset, options=options, adapter=adapter):
            start = training.as_start(adapter)
            widgets = training.TrainInputs(
                train, steps, learning_rate, rank, batch_size, seed, start=start, preference_beta=beta
            )
            path = training.export(model, clip, vae, dataset, widgets, options, cls.hidden.unique_id)
            return io.NodeOutput(path, ui={"text": (f"Job: {path}",)})


NODES = [GraftExportJob]
