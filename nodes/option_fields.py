"""Base class and widgets of the option nodes: ranges, choices and checks of their options, and the merge upstream."""

from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

from ..trainers.engine.resolve import Options as Chosen
from ..trainers.engine.validation import check_option, choices_of
from ..trainers.option import Option
from ..trainers.recipe.options import OPTIONS
from .checks import Rule
from .schema import CATEGORY as _PACK
from .schema import Options, describe, named, options_input

CATEGORY = f"{_PACK}/options"


def rules(node: str) -> dict[str, Rule | None]:
    """Return the rules for an option node's choices, texts and floats. An unset value is always valid."""
    return {
        name: None if declared.unset == "auto" else _rule_of(node, declared)
        for name, declared in OPTIONS[node].items()
        if not isinstance(declared.unset, int)
    }


def _rule_of(node: str, declared: Option) -> Rule:
    return lambda value: value == declared.unset or check_option(node, declared.input, value)


class OptionNode(io.ComfyNode):
    """Base class of the option nodes. It adds the inputs that the user set to the upstream options."""

    kind = ""

    @classmethod
    def widget(cls, name: str, tooltip: str, **display: Any):
        """Return the widget of one of the node's options: a choice, a text, or a number that is not rounded.

        Args:
            display: arguments of ComfyUI's input class, such as `step`. For a choice, `options` are those of the host.
        """
        declared = OPTIONS[cls.kind][name]
        if declared.unset == "auto":
            choices = display.pop("options", None) or choices_of(declared.offered or declared.choices)
            offered = ["auto", *(choice for choice in choices if choice != "auto")]
            return io.Combo.Input(name, options=offered, default="auto", tooltip=tooltip, **display)
        if isinstance(declared.unset, str):
            return io.String.Input(name, default="", tooltip=tooltip, **display)
        low, high = declared.bounds
        if isinstance(declared.unset, int):
            return io.Int.Input(name, default=declared.unset, min=low, max=high, tooltip=tooltip, **display)
        return io.Float.Input(name, default=declared.unset, min=low, max=high, round=False, tooltip=tooltip, **display)

    @classmethod
    def preset(cls):
        """Return the widget of the preset, which is the same on several nodes."""
        return cls.widget("preset", "Fills the unset fields of all options. auto: none.")

    @classmethod
    def execute(cls, options=None, **values) -> io.NodeOutput:
        with named(cls, options=options):
            return io.NodeOutput((options or Chosen()).adding(cls.kind, values))


def _later(built):
    """Mark an input that a later version added. It is optional and follows the socket, so old graphs stay valid."""
    built.optional = True
    return built


def option_schema(
    node_id: str, title: str, aliases: list[str], description: str, inputs: list, later: Iterable = (), words: str = ""
) -> io.Schema:
    """Return an option node's schema.

    Args:
        inputs: the widgets of the node's first version.
        later: the widgets that were added since.
        words: as for `describe`.
    """
    return describe(
        node_id=node_id,
        display_name=title,
        words=words,
        aliases=aliases,
        category=CATEGORY,
        description=description,
        inputs=[*inputs, options_input(), *(_later(built) for built in later)],
        outputs=[Options.Output("options_out", display_name="options")],
    )
