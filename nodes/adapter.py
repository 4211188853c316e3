"""Nodes that apply, load and save adapters and embeddings."""

from comfy_api.latest import io

from ..trainers.formats.adapter import FORMATS, save_adapter
from ..trainers.formats.embedding import first_embedding
from ..trainers.methods.targets import Pairs
from ..trainers.methods.textual_inversion import check_name
from ..trainers.recipe.parsing import parse_pairs
from . import inputs
from .checks import checked
from .dataset import eight_bits
from .host import paths
from .schema import CATEGORY, Adapter, Embedding, advanced, describe, named

_ADAPTER, _EMBEDDING = f"{CATEGORY}/adapter", f"{CATEGORY}/embedding"
_TOP_STRENGTH = 100.0


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, optional=True, tooltip=tooltip)


def _block_strengths(text: str) -> Pairs:
    return parse_pairs(text, float, -_TOP_STRENGTH, _TOP_STRENGTH, "block_strengths")


class GraftApplyAdapter(io.ComfyNode):
    """Node that applies an adapter to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftApplyAdapter",
            display_name="Graft Apply Adapter",
            words="LoRA",
            aliases=["apply lora", "lora loader", "block weight", "lbw"],
            category=_ADAPTER,
            description="Applies an adapter to a model and a text encoder. Strength 0 leaves them unchanged.",
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the adapter to."),
                Adapter.Input("adapter", tooltip="From a training or loading node."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-_TOP_STRENGTH,
                    max=_TOP_STRENGTH,
                    step=0.01,
                    tooltip="Strength on the model.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-_TOP_STRENGTH,
                    max=_TOP_STRENGTH,
                    step=0.01,
                    tooltip="Strength on the text encoder.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, if the adapter has a part for it."),
                advanced(
                    inputs.text(
                        "block_strengths",
                        "pattern=strength, one per line, such as middle_block=0.5. Multiplies the strength of "
                        "layers whose path contains the pattern. The first match counts.",
                        multiline=True,
                        optional=True,
                    )
                ),
                _percent(
                    "start_percent",
                    0.0,
                    "Part of sampling (0 to 1) after which the adapter starts to act on the model.",
                ),
                _percent(
                    "end_percent", 1.0, "Part of sampling (0 to 1) after which the adapter stops acting on the model."
                ),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model"),
                io.Clip.Output("clip_out", display_name="clip"),
            ],
        )

    validate_inputs = checked(
        strength_model=None,
        strength_clip=None,
        block_strengths=_block_strengths,
        start_percent=None,
        end_percent=None,
    )

    @classmethod
    def execute(
        cls,
        model,
        adapter,
        strength_model,
        strength_clip,
        clip=None,
        block_strengths="",
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        from .host.model.lora import apply_with_remarks

        numbers = {"strength_model": strength_model, "strength_clip": strength_clip}
        with named(cls, model=model, adapter=adapter, clip=clip, **numbers):
            blocks = _block_strengths(block_strengths)
            span = (start_percent, end_percent)
            strengths = (strength_model, strength_clip)
            *applied, remarks = apply_with_remarks(model, clip, adapter, strengths, blocks, span)
            # Without a text, the page would go on to show that of the last run.
            return io.NodeOutput(*applied, ui={"text": ("\n".join(remarks),)})


class GraftLoadAdapter(io.ComfyNode):
    """Node that loads an adapter from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftLoadAdapter",
            display_name="Graft Load Adapter",
            words="LoRA",
            aliases=["load lora", "lora file"],
            category=_ADAPTER,
            description="Loads a LoRA file from ComfyUI's loras folders, output/loras included.",
            inputs=[
                io.Combo.Input("adapter_name", options=paths.adapter_choices(), tooltip="A .safetensors LoRA file."),
            ],
            outputs=[
                Adapter.Output("adapter", display_name="adapter"),
                Embedding.Output("embedding", display_name="embedding"),
            ],
        )

    validate_inputs = checked(adapter_name=paths.adapter_path)

    @classmethod
    def fingerprint_inputs(cls, adapter_name) -> str | float:
        """Return a value that changes with the file. A name from a link is not known yet."""
        return paths.file_state(adapter_name, paths.adapter_path)

    @classmethod
    def execute(cls, adapter_name) -> io.NodeOutput:
        with named(cls):
            adapter = paths.load_named_adapter(adapter_name)
            return io.NodeOutput(adapter, first_embedding(adapter.bundled))


class GraftSaveAdapter(io.ComfyNode):
    """Node that writes an adapter to output/loras."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftSaveAdapter",
            display_name="Graft Save Adapter",
            words="LoRA",
            aliases=["save lora", "export lora"],
            category=_ADAPTER,
            description="Writes an adapter below output/loras, where ComfyUI's LoRA loaders find it.",
            inputs=[
                Adapter.Input("adapter", tooltip="From a training node."),
                inputs.text("filename_prefix", "File name, or subfolder/name.", default="graft"),
                inputs.choice(
                    "format",
                    FORMATS,
                    "kohya: read by nearly everything. diffusers and peft: for those libraries. LyCORIS: for "
                    "DoRA, LoHa and LoKr outside ComfyUI.",
                ),
                advanced(
                    io.Model.Input(
                        "model",
                        optional=True,
                        tooltip="The model that the adapter was trained on. Needed to save a loaded DoRA or IA3 for "
                        "other programs, a DoRA of peft or diffusers as kohya, and to tell families of the same layers "
                        "apart.",
                    )
                ),
                io.Image.Input("preview", optional=True, tooltip="Picture to save beside it, as NAME.preview.png."),
            ],
            outputs=[io.String.Output("path", display_name="path")],
            is_output_node=True,
        )

    validate_inputs = checked(filename_prefix=paths.check_prefix, format=None)

    @classmethod
    def execute(cls, adapter, filename_prefix, format, model=None, preview=None) -> io.NodeOutput:
        from .host.actions.adapter_tools import restore_magnitudes, save_preview, with_family

        with named(cls, adapter=adapter, model=model, preview=preview):
            picture = next(eight_bits([] if preview is None else [preview], "preview"), None)
            if model is not None:
                adapter = restore_magnitudes(with_family(adapter, model), model, format)
            path = paths.new_adapter_path(filename_prefix, format)
            save_adapter(path, adapter, paths.title_of(path), format)
            if picture is not None:
                save_preview(path, picture)
            return io.NodeOutput(path, ui={"text": (path,)})


class GraftApplyEmbedding(io.ComfyNode):
    """Node that adds an embedding to a CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftApplyEmbedding",
            display_name="Graft Apply Embedding",
            aliases=["textual inversion", "ti", "apply textual inversion"],
            category=_EMBEDDING,
            description="Adds a trained embedding to a text encoder, so that its prompts can write embedding:NAME.",
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The text encoder of the model family that the embedding was trained for."
                ),
                Embedding.Input("embedding", tooltip="From a training or loading node."),
            ],
            outputs=[io.Clip.Output("clip_out", display_name="clip")],
        )

    @classmethod
    def execute(cls, clip, embedding) -> io.NodeOutput:
        from .host.model.embeddings import apply_embedding

        with named(cls, clip=clip, embedding=embedding):
            return io.NodeOutput(apply_embedding(clip, embedding))


class GraftLoadEmbedding(io.ComfyNode):
    """Node that loads an embedding from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftLoadEmbedding",
            display_name="Graft Load Embedding",
            aliases=["load textual inversion", "ti"],
            category=_EMBEDDING,
            description="Loads a textual-inversion file from ComfyUI's embeddings folders, output/embeddings included.",
            inputs=[
                io.Combo.Input(
                    "embedding_name", options=paths.embedding_choices(), tooltip="A .safetensors embedding file."
                ),
            ],
            outputs=[Embedding.Output("embedding", display_name="embedding")],
        )

    validate_inputs = checked(embedding_name=paths.embedding_path)

    @classmethod
    def fingerprint_inputs(cls, embedding_name) -> str | float:
        """Return a value that changes with the file. A name from a link is not known yet."""
        return paths.file_state(embedding_name, paths.embedding_path)

    @classmethod
    def execute(cls, embedding_name) -> io.NodeOutput:
        with named(cls):
            return io.NodeOutput(paths.load_named_embedding(embedding_name))


class GraftSaveEmbedding(io.ComfyNode):
    """Node that writes an embedding to output/embeddings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftSaveEmbedding",
            display_name="Graft Save Embedding",
            aliases=["save textual inversion", "ti"],
            category=_EMBEDDING,
            description="Writes an embedding below output/embeddings, where every prompt finds it as embedding:NAME.",
            inputs=[
                Embedding.Input("embedding", tooltip="From a training node."),
                inputs.text("name", "Its name in prompts. Empty: the name it was trained with."),
            ],
            outputs=[io.String.Output("path", display_name="path")],
            is_output_node=True,
        )

    validate_inputs = checked(name=lambda name: check_name(name.strip()) if name.strip() else None)

    @classmethod
    def execute(cls, embedding, name) -> io.NodeOutput:
        with named(cls, embedding=embedding):
            path = paths.save_named_embedding(embedding, name)
            return io.NodeOutput(path, ui={"text": (path,)})


NODES = [
    GraftApplyAdapter,
    GraftLoadAdapter,
    GraftSaveAdapter,
    GraftApplyEmbedding,
    GraftLoadEmbedding,
    GraftSaveEmbedding,
]
