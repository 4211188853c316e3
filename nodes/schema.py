"""The pack's socket types, additions to ComfyUI's schema classes, and the node and input in error messages."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from comfy_api.latest import io

from ..trainers.errors import DatasetError, GraftError
from .checks import check_arrived, title_of
from .host.server.messages import neutral_inputs

CATEGORY = "graft"

# Keys under which an input tells the web page the meaning of its unset value, and that it does not affect a run.
_UNSET = "graft_unset"
_NEUTRAL = "graft_neutral"

Dataset = io.Custom("GRAFT_DATASET")
Embedding = io.Custom("GRAFT_EMBEDDING")
Options = io.Custom("GRAFT_OPTIONS")
Adapter = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")


class Trainer(io.ComfyNode):
    """Base class of the nodes that train. Equal inputs give equal outputs, unless a run was stopped early."""

    @classmethod
    def fingerprint_inputs(cls, **values) -> list:
        """Return a value that changes when ComfyUI must not use its cached outputs.

        That is the case when a stopped run is to resume, a run was deleted, or an embedding file that a prompt names
        was replaced.
        """
        from .host.model.embeddings import file_states
        from .host.server.control import REGISTRY

        return [REGISTRY.cache_version, *file_states()]


def describe(aliases: list[str], words: str = "", **given) -> io.Schema:
    """Describe a node to ComfyUI, which tells each node its id.

    Args:
        aliases: other words for the node search. ComfyUI before 0.33 has no field for them.
        words: one or two of them that follow the title in parentheses. ComfyUI before 0.33 searches only ids and
            titles, and in a title no word that begins after the 30th character.
        given: the arguments of ComfyUI's schema.
    """
    if words:
        given["display_name"] = f"{given['display_name']} ({words})"
    if any(field.name == "search_aliases" for field in fields(io.Schema)):
        given["search_aliases"] = aliases
    for built in given["inputs"]:
        _mark_unset(built)
        if built.id in neutral_inputs(given["node_id"]):
            built.extra_dict = {**(built.extra_dict or {}), _NEUTRAL: True}
    return io.Schema(hidden=[io.Hidden.unique_id], **given)


def usually(built, usual: str, **when: str):
    """Tell the web page the value that an unset number stands for.

    Args:
        usual: the value, as the page shows it.
        when: widget values that this default requires, on the node and on all nodes of the pack upstream.
    """
    built.extra_dict = {**(built.extra_dict or {}), _UNSET: {"value": built.default, "usual": usual, "when": when}}
    return built


def _mark_unset(built) -> None:
    """Tell the web page about a number whose default stands for another value, read from the tooltip: `0: 500.`"""
    default = getattr(built, "default", None)
    if isinstance(default, bool) or default not in (0, -1) or _UNSET in (built.extra_dict or {}):
        return
    unset = re.search(rf"(?:^|[.;] ){default:g}: (.+?)(?:[,;]|\.?$|\. )", built.tooltip or "")
    if unset:
        usual = unset.group(1)
        usually(built, usual if usual == "none" or usual[0].isdigit() else "")


def advanced(built):
    """Mark an input as advanced, in `extra_dict` because older ComfyUI versions do not have the argument."""
    built.extra_dict = {**(built.extra_dict or {}), "advanced": True}
    return built


def options_input():
    """Return the optional input that chains option nodes."""
    return Options.Input("options", optional=True, tooltip="Settings from Graft option nodes. You can chain them.")


def execution_id(node: type[io.ComfyNode]) -> str | None:
    """Return the id of the executing node, also inside subgraphs. None outside a graph."""
    return node.hidden.unique_id if node.hidden is not None else None


@contextmanager
def named(node: type[io.ComfyNode], **arrived) -> Iterator[None]:
    """Add the node's title and the input to errors that the block raises.

    Args:
        arrived: linked values by input name. Values of a wrong type are refused.
    """
    try:
        check_arrived(node, arrived)
        yield
    except GraftError as error:
        # ComfyUI executes a locked copy of the class, and its own accessor cannot store the schema there.
        schema = node.define_schema()
        title = title_of(schema.display_name)
        identity = execution_id(node)
        where = f"{title} (node {identity})" if identity else title
        given = _input_of(error, [given.id for given in schema.inputs])
        if given:
            where = f"{where}, input '{given}'"
        raise type(error)(f"{where}: {error.message}", error.cure, given) from error


def _input_of(error: GraftError, inputs: list[str]) -> str:
    """Return the node's input that an error concerns. An error about an image concerns the input `dataset`."""
    if error.input in inputs:
        return error.input
    return "dataset" if isinstance(error, DatasetError) and "dataset" in inputs else ""
