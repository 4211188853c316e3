"""What the option nodes share: fields that start unset, what may be set, and the way of what is set to the trainer."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainers.engine.resolve import UNSET
from ..trainers.engine.resolve import Options as Chosen
from ..trainers.engine.validation import check_option
from .schema import CATEGORY, Options, describe, named, options_input

_CATEGORY = f"{CATEGORY}/options"
_MANY = 10_000_000


def auto(name: str, options: list[str], tooltip: str) -> io.Combo.Input:
    """A choice that starts at `auto`, which leaves it to model, method and optimiser."""
    return io.Combo.Input(name, options=["auto", *options], default="auto", tooltip=tooltip)


def count(name: str, tooltip: str, unset: int = 0, top: int = _MANY) -> io.Int.Input:
    """A whole number from its unset value on."""
    return io.Int.Input(name, default=unset, min=unset, max=top, tooltip=tooltip)


def number(name: str, tooltip: str, unset: float, top: float, step: float) -> io.Float.Input:
    """A number from its unset value on, kept to all its digits."""
    return io.Float.Input(name, default=unset, min=unset, max=top, step=step, round=False, tooltip=tooltip)


def rules(kind: str, *names: str) -> dict:
    """Rules for an option node's fields, as they hold when they are set."""

    def rule_of(name: str):
        return lambda value: value == UNSET[kind][name] or check_option(kind, name, value)

    return {name: rule_of(name) for name in names}


class OptionNode(io.ComfyNode):
    """What the option nodes share: they add their set fields to those that arrive."""

    kind = ""

    @classmethod
    def execute(cls, options=None, **values) -> io.NodeOutput:
        with named(cls, options=options):
            return io.NodeOutput((options or Chosen()).adding(cls.kind, values))


def _later(built):
    """Marks a field that came after its node had landed: optional, behind the socket, so that old graphs stay valid."""
    built.optional = True
    return built


def option_schema(
    node_id: str, title: str, aliases: list[str], description: str, inputs: list, later: tuple = (), words: str = ""
) -> io.Schema:
    """An option node's schema.

    Args:
        inputs: the fields that it landed with.
        later: those that came since.
        words: behind the title, as `describe` takes them.
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
