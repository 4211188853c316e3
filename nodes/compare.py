"""The node that draws the same prompts with several adapters."""

from comfy_api.latest import io, ui

from . import inputs
from .checks import checked
from .schema import CATEGORY, Adapter, describe, named

_CATEGORY = f"{CATEGORY}/adapter"
# Of a moving preview: Wan's own.
_FRAME_RATE = 16


class GraftCompare(io.ComfyNode):
    """Node that draws a grid of images: prompts by adapters, saves of a run, and strengths."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftCompare",
            display_name="Graft Compare",
            words="XY Plot",
            aliases=["xy plot", "xyz plot", "grid", "lora comparison", "checkpoint comparison"],
            category=_CATEGORY,
            description="Draws the same prompts with several adapters, with the saves of a run, and at several "
            "strengths, as one labeled picture. All pictures of a row start from the same noise.",
            inputs=[
                *inputs.base("The model, without the adapters that you compare."),
                inputs.text("prompts", "One prompt per line. Each gives a row of pictures.", multiline=True),
                inputs.text(
                    "strengths", "Numbers separated by commas. 0 is the unchanged model, drawn once.", default="0, 1"
                ),
                inputs.text(
                    "files",
                    "LoRA files as Graft Load Adapter lists them, one per line. * matches anything: "
                    "my_run-1a2b3c4d/* means all saves of that run.",
                    multiline=True,
                ),
                inputs.negative_prompt(),
                inputs.sampling_steps(20),
                inputs.cfg(),
                *inputs.sampler(),
                inputs.resolution("Side in pixels. 0: the model's own resolution."),
                inputs.seed("Seed for the noise of the first row. Each next row adds 1."),
                Adapter.Input("adapter", optional=True, tooltip="From a training or loading node."),
                Adapter.Input("adapter_b", optional=True, tooltip="A second adapter to compare."),
                io.Int.Input(
                    "frames",
                    default=1,
                    min=1,
                    max=10000,
                    optional=True,
                    tooltip="For video models: frames of a clip, rounded down to what the VAE takes. 1: stills.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image"),
                io.Image.Output("pictures", display_name="pictures"),
            ],
            is_output_node=True,
        )

    validate_inputs = checked(
        prompts=None, strengths=None, files=None, negative_prompt=None, cfg=None, sampler_name=None, scheduler=None
    )

    @classmethod
    def fingerprint_inputs(cls, files="", **_) -> list | float:
        """Return a value that changes with the adapter and embedding files. A run may have written new ones."""
        from .host.actions.compare import states_of
        from .host.model.embeddings import file_states

        # A value from a link is not known yet.
        return [*states_of(files), *file_states()] if isinstance(files, str) else float("nan")

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        prompts,
        strengths,
        files,
        negative_prompt,
        steps,
        cfg,
        sampler_name,
        scheduler,
        resolution,
        seed,
        adapter=None,
        adapter_b=None,
        frames=1,
    ) -> io.NodeOutput:
        from .host.actions.compare import CompareRequest, compare

        arrived = {"model": model, "clip": clip, "vae": vae, "adapter": adapter, "adapter_b": adapter_b, "cfg": cfg}
        with named(cls, **arrived):
            request = CompareRequest(
                prompts,
                strengths,
                files,
                negative_prompt,
                steps,
                cfg,
                sampler_name,
                scheduler,
                resolution,
                seed,
                frames,
            )
            adapters = {"adapter": adapter, "adapter b": adapter_b}
            image, pictures = compare(model, clip, vae, request, adapters, cls.hidden.unique_id)
            return io.NodeOutput(image, pictures, ui=_preview(image, cls))


def _preview(image, node) -> ui.PreviewImage | ui.SavedImages:
    """Return a preview of a picture, or of frames [T, H, W, 3] as animated WebP in ComfyUI's temporary folder."""
    if len(image) == 1:
        return ui.PreviewImage(image, cls=node)
    saving = {"fps": _FRAME_RATE, "lossless": False, "quality": 85, "method": 4}
    saved = ui.ImageSaveHelper.save_animated_webp(image, "graft_compare", io.FolderType.temp, node, **saving)
    return ui.SavedImages([saved], is_animated=True)


NODES = [GraftCompare]
