"""Input checks of the nodes: widget values before a prompt runs, and linked values when a node executes."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..trainers.data.examples import Dataset
from ..trainers.engine.resolve import Options
from ..trainers.errors import GraftError, ModelError, SettingsError
from ..trainers.formats.embedding import Embedding
from ..trainers.formats.keys import check_parts
from ..trainers.text import check_text

Rule = Callable[[Any], object]

# Maximum number of characters of a text in one line, and of a text in several lines.
_LINE = 10_000
_LINES = 100_000


def title_of(display_name: str) -> str:
    """Return a node's title without the search words, as errors and help pages use it."""
    return display_name.partition(" (")[0]


def checked(**rules: Rule | None) -> classmethod:
    """Build a node's `validate_inputs`, which returns True or the reasons why widget values are invalid.

    ComfyUI itself checks only whether a number is too small or too large, which NaN is not. Some of its versions check
    no choices, and none checks the inputs that are named here. A value from a link is not known yet and passes. ComfyUI
    shows the result at every input that is named here; `nodes/host/server/validation.py` reduces that to the inputs at
    fault.

    Args:
        rules: by input name, a function that raises GraftError for an invalid value, or None if kind, range, length and
            list of choices suffice. A choice with a rule is checked by the rule alone, since its list may be outdated.
    """

    def validate_inputs(cls, **values: Any) -> bool | str:
        return "\n".join(_faults(cls, rules, values).values()) or True

    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("cls", *rules)]
    # ComfyUI passes the inputs that the signature names.
    validate_inputs.__signature__ = inspect.Signature(named)
    validate_inputs.graft_rules = rules
    return classmethod(validate_inputs)


def find_faults(node: type, values: Mapping[str, Any]) -> dict[str, str]:
    """Check the values of a node that has `checked` inputs. Return an error for each input at fault, by its name.

    Args:
        node: any class. One without such inputs has no faults.
        values: by input name, None for a value from a link.
    """
    rules = getattr(getattr(node, "validate_inputs", None), "graft_rules", {})
    return _faults(node, rules, values) if rules else {}


def _faults(node: Any, rules: Mapping[str, Rule | None], values: Mapping[str, Any]) -> dict[str, str]:
    schema = node.define_schema()
    faults = {}
    for given in schema.inputs:
        value = values.get(given.id)
        # A node that takes lists gets the values of its widgets in lists too.
        value = value[0] if schema.is_input_list and isinstance(value, (list, tuple)) and value else value
        if given.id not in rules or value is None:
            continue
        try:
            _check(given, value, rules[given.id])
        except GraftError as error:
            faults[given.id] = f"{title_of(schema.display_name)}, input '{given.id}': {error}"
    return faults


def _check(given, value: Any, rule: Rule | None) -> None:
    kind = str(given.get_io_type())
    if kind == "FLOAT":
        check_number(value, given.min, given.max, given.id)
    elif not isinstance(value, str):
        raise SettingsError(f"The value is of type {type(value).__name__}, not a text.", "Enter a text.", given.id)
    elif kind == "STRING":
        check_text(value, given.id, _LINES if given.multiline else _LINE)
    elif rule is None and value not in given.options:
        raise SettingsError(
            f"{value[:80]!r} is not one of the choices.",
            f"Choose one of {', '.join(map(str, given.options))}.",
            given.id,
        )
    if rule is not None:
        rule(value)


def check_number(value: float, low: float, high: float, input: str) -> None:
    """Raise SettingsError unless a value is a finite number within the bounds."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise SettingsError(
            f"{str(value)[:80]} is not a number between {low:g} and {high:g}.", "Enter a number in this range.", input
        )


def check_arrived(node, values: Mapping[str, Any]) -> None:
    """Refuse linked values that a socket cannot accept.

    Prompts that a browser did not make can hold anything, and a link can bring any number.

    Args:
        values: by input name.

    Raises:
        ModelError, SettingsError: a value is refused. The error names the input.
    """
    if not values:
        return
    schema = node.define_schema()
    for given in schema.inputs:
        kind = str(given.get_io_type())
        if given.id not in values:
            continue
        value = values[given.id]
        if kind == "FLOAT":
            check_number(value, given.min, given.max, given.id)
            continue
        if value is None and given.optional:
            continue
        what, fits = _KINDS[kind]
        for item in value if schema.is_input_list else [value]:
            if not fits(item):
                _refuse(item, what, given.id)
            if kind == "LORA_MODEL":
                check_parts(item, "The connected adapter", given.id)


def _refuse(value: Any, what: str, input: str) -> None:
    if value is None:
        raise ModelError(
            f"The connected {input} is empty: the loaded file contains none.",
            "Load it with a separate loader node, and connect that.",
            input,
        )
    raise ModelError(f"The connected value is of type {type(value).__name__}, not {what}.", f"Connect {what}.", input)


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and (entry[0] is None or _is_tensor(entry[0]))
        and isinstance(entry[1], dict)
        for entry in value
    )


def _is_adapter(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and _is_tensor(tensor) for key, tensor in value.items()
    )


def _is_loss(value: Any) -> bool:
    losses = value.get("loss") if isinstance(value, Mapping) else None
    return isinstance(losses, (list, tuple)) and all(isinstance(loss, (int, float)) for loss in losses)


def _is_tensor(value: Any, *dimensions: int) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and (not dimensions or value.dim() in dimensions)


# By socket type: the description for errors, and the test that a value must pass.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "MODEL": ("a model", lambda value: hasattr(value, "model") and hasattr(value, "clone")),
    "CLIP": ("a text encoder", lambda value: hasattr(value, "cond_stage_model") and hasattr(value, "tokenizer")),
    "VAE": ("a VAE", lambda value: hasattr(value, "encode") and hasattr(value, "decode")),
    "IMAGE": ("pictures", lambda value: _is_tensor(value, 4) and value.shape[-1] in (3, 4)),
    "MASK": ("masks", lambda value: _is_tensor(value, 2, 3)),
    "CONDITIONING": ("a conditioning", _is_conditioning),
    "LORA_MODEL": ("an adapter", _is_adapter),
    "LOSS_MAP": ("the loss of a training", _is_loss),
    "GRAFT_DATASET": ("a dataset", lambda value: isinstance(value, Dataset)),
    "GRAFT_EMBEDDING": ("an embedding", lambda value: isinstance(value, Embedding)),
    "GRAFT_OPTIONS": ("the output of an option node", lambda value: isinstance(value, Options)),
}
