"""Nodes that work on adapters and losses: merge, resize, extract, inspect, plot."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ..trainers.errors import SettingsError
from ..trainers.tools import extract, merge
from . import inputs
from .checks import checked
from .schema import CATEGORY, Adapter, LossMap, advanced, describe, execution_id, named

if TYPE_CHECKING:
    from ..trainers.runs.loss_by_timestep import LossByTimestep

_CATEGORY = f"{CATEGORY}/adapter"
_TOP_WEIGHT = 100.0
_BY_STEP, _BY_TIMESTEP = "loss", "loss by timestep"


def _rank(tooltip: str, default: int = 0) -> io.Int.Input:
    return io.Int.Input("rank", default=default, min=0, max=4096, tooltip=tooltip)


def _energy() -> io.Float.Input:
    return io.Float.Input(
        "energy",
        default=1.0,
        min=0.001,
        max=1.0,
        step=0.001,
        tooltip="Fraction of each layer's squared singular values to keep. 1: everything that the rank allows.",
    )


def _model() -> io.Model.Input:
    return io.Model.Input(
        "model",
        optional=True,
        tooltip="The model. Types such as DoRA, OFT, BOFT, GLoRA and IA3 need its weights.",
    )


def _weight(name: str, of: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-_TOP_WEIGHT, max=_TOP_WEIGHT, step=0.01, tooltip=f"Weight of {of}.")


def _clip() -> io.Clip.Input:
    return advanced(io.Clip.Input("clip", optional=True, tooltip="The text encoder, if the adapter has a part for it."))


class GraftMergeAdapters(io.ComfyNode):
    """Node that merges two adapters."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftMergeAdapters",
            display_name="Graft Merge Adapters",
            words="LoRA",
            aliases=["merge lora", "lora merge", "ties", "dare", "svd"],
            category=_CATEGORY,
            description="Merges two adapters into one.",
            inputs=[
                Adapter.Input("adapter_a", tooltip="The first adapter."),
                Adapter.Input("adapter_b", tooltip="The second, for the same model."),
                _weight("weight_a", "the first adapter"),
                _weight("weight_b", "the second adapter"),
                inputs.choice(
                    "method",
                    [*merge.METHODS, merge.AVERAGE],
                    "weighted sum: the same as applying both. SVD: the same in the smallest rank. The others "
                    "keep a part of each, so that two subjects or styles disturb each other less. average of saves: "
                    "of adapter_a's run; connect the same adapter twice.",
                    default=merge.SUM,
                ),
                _rank("Maximum rank per layer of the result. 0: large enough to lose nothing."),
                io.Float.Input(
                    "density",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of each adapter's values that TIES, DARE and magnitude prune keep.",
                ),
                inputs.seed("Determines the values that DARE drops."),
                _model(),
                _clip(),
                advanced(
                    io.Float.Input(
                        "average_width",
                        default=0.0,
                        min=0.0,
                        max=round(merge.WIDEST - 0.005, 2),
                        step=0.01,
                        optional=True,
                        tooltip="Width of the average of saves, in parts of all steps. 0: 0.1.",
                    )
                ),
            ],
            outputs=[Adapter.Output("adapter", display_name="adapter")],
        )

    validate_inputs = checked(weight_a=None, weight_b=None, method=None, density=None, average_width=None)

    @classmethod
    def execute(
        cls,
        adapter_a,
        adapter_b,
        weight_a,
        weight_b,
        method,
        rank,
        density,
        seed,
        model=None,
        clip=None,
        average_width=0.0,
    ) -> io.NodeOutput:
        from .host.actions.adapter_tools import average_run, merge_adapters

        sockets = {"adapter_a": adapter_a, "adapter_b": adapter_b, "model": model, "clip": clip}
        with named(cls, **sockets, weight_a=weight_a, weight_b=weight_b, average_width=average_width):
            if method == merge.AVERAGE:
                return io.NodeOutput(average_run(adapter_a, adapter_b, average_width or merge.WIDTH))
            if average_width:
                raise SettingsError(
                    f"average_width is set, but method is {method}: it would have no effect.",
                    f"Choose {merge.AVERAGE}, or set average_width to 0.",
                    "average_width",
                )
            how = merge.Merging((weight_a, weight_b), method, rank, density, seed)
            return io.NodeOutput(merge_adapters(adapter_a, adapter_b, how, execution_id(cls), model, clip))


class GraftResizeAdapter(io.ComfyNode):
    """Node that reduces the rank of an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftResizeAdapter",
            display_name="Graft Resize Adapter",
            words="LoRA",
            aliases=["resize lora", "lora rank", "svd", "shrink lora"],
            category=_CATEGORY,
            description="Makes an adapter smaller: in each layer it keeps the part with most of the effect.",
            inputs=[
                Adapter.Input("adapter", tooltip="The adapter. Other types become a LoRA."),
                _rank("Maximum rank per layer. 0: no limit.", 16),
                _energy(),
                _model(),
                _clip(),
            ],
            outputs=[Adapter.Output("resized", display_name="adapter")],
        )

    validate_inputs = checked(energy=None)

    @classmethod
    def execute(cls, adapter, rank, energy, model=None, clip=None) -> io.NodeOutput:
        from .host.actions.adapter_tools import resize_adapter

        with named(cls, adapter=adapter, energy=energy, model=model, clip=clip):
            return io.NodeOutput(resize_adapter(adapter, rank, energy, execution_id(cls), model, clip))


class GraftExtractAdapter(io.ComfyNode):
    """Node that extracts the difference of two models as an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftExtractAdapter",
            display_name="Graft Extract Adapter",
            words="LoRA",
            aliases=["extract lora", "model difference", "svd"],
            category=_CATEGORY,
            description="Makes an adapter from the difference of two models. LoRAs applied to either model count.",
            inputs=[
                io.Model.Input("model_tuned", tooltip="The trained or merged model, or a model with adapters applied."),
                io.Model.Input("model_base", tooltip="The model to which you will apply the adapter."),
                _rank("Maximum rank per layer. 0: no limit.", 32),
                _energy(),
                inputs.choice(
                    "conv",
                    extract.CONV,
                    "Convolutions with a kernel: as a LoRA, as whole differences, or not at all.",
                    default=extract.LOW,
                ),
                inputs.choice(
                    "norms_and_biases",
                    extract.REST,
                    "Weights that are no matrices: as whole differences, which few programs besides ComfyUI "
                    "read, or not at all.",
                    default=extract.FULL,
                ),
                io.Clip.Input("clip_tuned", optional=True, tooltip="The trained model's text encoder."),
                io.Clip.Input("clip_base", optional=True, tooltip="The text encoder to compare it with."),
            ],
            outputs=[
                Adapter.Output("adapter", display_name="adapter"),
                io.String.Output("report", display_name="report"),
            ],
        )

    validate_inputs = checked(energy=None, conv=None, norms_and_biases=None)

    @classmethod
    def execute(
        cls, model_tuned, model_base, rank, energy, conv, norms_and_biases, clip_tuned=None, clip_base=None
    ) -> io.NodeOutput:
        from .host.actions.adapter_tools import extract_adapter

        sockets = {"model_tuned": model_tuned, "model_base": model_base}
        with named(cls, **sockets, clip_tuned=clip_tuned, clip_base=clip_base, energy=energy):
            how = extract.Extraction(rank, energy, conv, norms_and_biases)
            models, clips = (model_tuned, model_base), (clip_tuned, clip_base)
            return io.NodeOutput(*extract_adapter(models, clips, how, execution_id(cls)))


class GraftInspectAdapter(io.ComfyNode):
    """Node that reports the type, strength and fit of an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftInspectAdapter",
            display_name="Graft Inspect Adapter",
            words="LoRA",
            aliases=["lora info", "lora metadata", "block weights"],
            category=_CATEGORY,
            description="Shows an adapter's type, how much it changes each block, and whether it fits a model.",
            inputs=[
                Adapter.Input("adapter", tooltip="The adapter to inspect."),
                io.Model.Input("model", optional=True, tooltip="Shows whether the adapter fits, and names its blocks."),
                io.Clip.Input("clip", optional=True, tooltip="The same for the adapter's text-encoder part."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.String.Output("report", display_name="report"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter, model=None, clip=None) -> io.NodeOutput:
        import torch

        from ..trainers.families import family_of
        from ..trainers.tools import inspect, plots
        from .host.model.families import family_name
        from .host.model.lora import fit

        with named(cls, adapter=adapter, model=model, clip=clip):
            fitting = None if model is None else fit(model, clip, adapter)
            findings = inspect.look(adapter, None if fitting is None else fitting.paths)
            family = None if model is None else family_of(family_name(model))
            report = inspect.report(findings, fitting, family)
            image = torch.from_numpy(plots.plot_blocks(findings))[None]
            return io.NodeOutput(image, report, ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": (report,)})


class GraftPlotLoss(io.ComfyNode):
    """Node that plots the loss of one or two runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftPlotLoss",
            display_name="Graft Plot Loss",
            aliases=["loss graph", "loss curve", "training curve"],
            category=_CATEGORY,
            description="Draws the loss by step or by timestep. A second run beside it compares two settings.",
            inputs=[
                LossMap.Input("loss", tooltip="From a training node."),
                io.Float.Input(
                    "smoothing",
                    default=0.96,
                    min=0.0,
                    max=0.999,
                    step=0.001,
                    tooltip="Weight of earlier steps in the thick line: 0.96 is about the last 25. 0: no such line.",
                ),
                io.Boolean.Input(
                    "log_scale", default=False, tooltip="Logarithmic scale: equal ratios of the loss get equal heights."
                ),
                LossMap.Input("loss_b", optional=True, tooltip="The loss of another run."),
                inputs.choice(
                    "plot",
                    [_BY_STEP, _BY_TIMESTEP],
                    "loss: each step. loss by timestep: the mean at each noise level, early and late in "
                    "training, without weighting.",
                    optional=True,
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image")],
            is_output_node=True,
        )

    validate_inputs = checked(smoothing=None, plot=None)

    @classmethod
    def execute(cls, loss, smoothing, log_scale, loss_b=None, plot=_BY_STEP) -> io.NodeOutput:
        import torch

        from ..trainers.tools import plots

        with named(cls, loss=loss, loss_b=loss_b, smoothing=smoothing):
            given = {"loss": loss, "loss_b": loss_b}
            given = {name: curve for name, curve in given.items() if curve is not None}
            if plot == _BY_TIMESTEP:
                drawn = plots.plot_levels({name: _levels_of(name, curve) for name, curve in given.items()}, log_scale)
            else:
                losses = {name: curve["loss"] for name, curve in given.items()}
                drawn = plots.plot(losses, smoothing, log_scale)
            image = torch.from_numpy(drawn)[None]
            return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def _levels_of(name: str, loss: dict) -> tuple[LossByTimestep, int]:
    """Return the losses by timestep in a loss map, and its number of steps.

    Raises:
        SettingsError: the map has no losses by timestep. The error names the input.
    """
    from ..trainers.runs.loss_by_timestep import BY_TIMESTEP, LossByTimestep

    with contextlib.suppress(ValueError):
        levels = LossByTimestep.of_json(loss.get(BY_TIMESTEP))
        if any(map(any, levels.counts)):
            return levels, len(loss["loss"])
    raise SettingsError(
        "The connected loss has no loss by timestep: its run finished before Graft kept it, or another node made it.",
        "Set plot to loss, or train that run for more steps.",
        name,
    )


NODES = [GraftMergeAdapters, GraftResizeAdapter, GraftExtractAdapter, GraftInspectAdapter, GraftPlotLoss]
