"""The pack's sockets, the small additions to ComfyUI's schema classes, and the way errors are shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from comfy_api.latest import io

from ..trainers.errors import DatasetError, GraftError
from .checks import check_arrived

CATEGORY = "graft"

# Name of what the page is told of an input's unset value.
_UNSET = "graft_unset"

Dataset = io.Custom("GRAFT_DATASET")
Embedding = io.Custom("GRAFT_EMBEDDING")
Options = io.Custom("GRAFT_OPTIONS")
Adapter = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")


class Trainer(io.ComfyNode):
    """A node that trains. What it hands on is decided by its inputs, but for a run that was stopped early."""

    @classmethod
    def fingerprint_inputs(cls, **values) -> list:
        """Changes where the host would answer from its cache, and must not.

        A stopped run was told to go on, or one was deleted, or an embedding file that a prompt calls was replaced.
        """
        from .host.model.embeddings import file_states
        from .host.server.control import REGISTRY

        return [REGISTRY.lifted, *file_states()]


def describe(aliases: list[str], words: str = "", **given) -> io.Schema:
    """Describe a node to ComfyUI.

    Args:
        aliases: other words by which it is found when nodes are searched; hosts before 0.33 have no place for them.
        words: the one or two of them that stand behind its title, in parentheses. Hosts before 0.33 search ids and
            titles alone, and of a title no word that begins behind the 30th character.
        given: what ComfyUI's own schema takes.
    """
    if words:
        given["display_name"] = f"{given['display_name']} ({words})"
    if any(field.name == "search_aliases" for field in fields(io.Schema)):
        given["search_aliases"] = aliases
    for built in given["inputs"]:
        _mark_unset(built)
    return io.Schema(**given)


def title_of(display_name: str) -> str:
    """Return a node's title without the words that it is found by, as errors and help pages name it."""
    return display_name.partition(" (")[0]


def usually(built, usual: str, **when: str):
    """Tell the page the value that an unset number stands for.

    Args:
        usual: as the page shows it.
        when: widgets that have to have these values for it, on the node and on all nodes of the pack that lead to it.
    """
    built.extra_dict = {**(built.extra_dict or {}), _UNSET: {"value": built.default, "usual": usual, "when": when}}
    return built


def _mark_unset(built) -> None:
    """Tell the page of a number whose default stands for another value, which the tooltip says: `0: 500.`"""
    default = getattr(built, "default", None)
    if isinstance(default, bool) or default not in (0, -1) or _UNSET in (built.extra_dict or {}):
        return
    told = re.search(rf"(?:^|[.;] ){default:g}: (.+?)(?:[,;]|\.?$|\. )", built.tooltip or "")
    if told:
        usual = told.group(1)
        usually(built, usual if usual == "none" or usual[0].isdigit() else "")


def advanced(built):
    """Marks an input as advanced; as an attribute, since older hosts do not know the argument."""
    built.extra_dict = {**(built.extra_dict or {}), "advanced": True}
    return built


def options_input():
    """The optional input that chains option nodes."""
    return Options.Input("options", optional=True, tooltip="Settings from Graft option nodes; may be chained.")


def execution_id(node: type[io.ComfyNode]) -> str | None:
    """Of the node that executes, also inside subgraphs; None outside a graph."""
    return node.hidden.unique_id if node.hidden is not None else None


@contextmanager
def named(node: type[io.ComfyNode], **arrived) -> Iterator[None]:
    """Lets an error say which node and which input it comes from.

    Args:
        arrived: what came in over sockets, by input; refused when it is something else.
    """
    try:
        check_arrived(node, arrived)
        yield
    except GraftError as error:
        # Asked anew: the class that executes is a locked copy, on which the host's own accessor cannot store it.
        schema = node.define_schema()
        title = title_of(schema.display_name)
        identity = execution_id(node)
        where = f"{title} (node {identity})" if identity else title
        given = _input_of(error, [given.id for given in schema.inputs])
        if given:
            where = f"{where}, input '{given}'"
        raise type(error)(f"{where}: {error.message}", error.cure, given) from error


def _input_of(error: GraftError, inputs: list[str]) -> str:
    """The node's own input that an error concerns: trouble with a picture came in as the dataset here."""
    if error.input in inputs:
        return error.input
    return "dataset" if isinstance(error, DatasetError) and "dataset" in inputs else ""
