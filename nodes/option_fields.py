"""Base class and fields of the option nodes: unset values, validation, and the merge with upstream options."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainers.engine.resolve import UNSET
from ..trainers.engine.resolve import Options as Chosen
from ..trainers.engine.validation import check_option
from .schema import CATEGORY, Options, describe, named, options_input

_CATEGORY = f"{CATEGORY}/options"
_MANY = 10_000_000


def auto(name: str, options: list[str], tooltip: str) -> io.Combo.Input:
    """Return a choice with the default `auto`, which leaves the value to model, method and optimizer."""
    return io.Combo.Input(name, options=["auto", *options], default="auto", tooltip=tooltip)


def count(name: str, tooltip: str, unset: int = 0, top: int = _MANY) -> io.Int.Input:
    """Return an integer input whose minimum is its unset value."""
    return io.Int.Input(name, default=unset, min=unset, max=top, tooltip=tooltip)


def number(name: str, tooltip: str, unset: float, top: float, step: float) -> io.Float.Input:
    """Return a float input whose minimum is its unset value. It is not rounded."""
    return io.Float.Input(name, default=unset, min=unset, max=top, step=step, round=False, tooltip=tooltip)


def rules(kind: str, *names: str) -> dict:
    """Return rules for an option node's fields. An unset value is always valid."""

    def rule_of(name: str):
        return lambda value: value == UNSET[kind][name] or check_option(kind, name, value)

    return {name: rule_of(name) for name in names}


class OptionNode(io.ComfyNode):
    """Base class of the option nodes. It adds the fields that the user set to the upstream options."""

    kind = ""

    @classmethod
    def execute(cls, options=None, **values) -> io.NodeOutput:
        with named(cls, options=options):
            return io.NodeOutput((options or Chosen()).adding(cls.kind, values))


def _later(built):
    """Mark a field that a later version added. It is optional and follows the socket, so old graphs stay valid."""
    built.optional = True
    return built


def option_schema(
    node_id: str, title: str, aliases: list[str], description: str, inputs: list, later: tuple = (), words: str = ""
) -> io.Schema:
    """Return an option node's schema.

    Args:
        inputs: the fields of the node's first version.
        later: the fields that were added since.
        words: as for `describe`.
    """
    return describe(
        node_id=node_id,
        display_name=title,
        words=words,
        aliases=aliases,
        category=_CATEGORY,
        description=description,
        inputs=[*inputs, options_input(), *(_later(built) for built in later)],
        outputs=[Options.Output("options_out", display_name="options")],
        hidden=[io.Hidden.unique_id],
    )
