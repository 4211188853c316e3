"""Nodes that apply, load and save embeddings."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainers.methods.textual_inversion import check_name
from . import inputs
from .checks import checked
from .host import paths
from .schema import CATEGORY, Embedding, describe, named

_CATEGORY = f"{CATEGORY}/embedding"


class GraftApplyEmbedding(io.ComfyNode):
    """Node that adds an embedding to a CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="GraftApplyEmbedding",
            display_name="Graft Apply Embedding",
            aliases=["textual inversion", "ti", "apply textual inversion"],
            category=_CATEGORY,
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
            category=_CATEGORY,
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
            category=_CATEGORY,
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


NODES = [GraftApplyEmbedding, GraftLoadEmbedding, GraftSaveEmbedding]
