"""Errors of ComfyUI's input validation, shown at the faulty input only.

A node's `validate_inputs` answers for all inputs in its signature, and ComfyUI repeats that answer at each of them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from comfy_execution.graph_utils import is_link

import nodes

FindFaults = Callable[[type, Mapping[str, Any]], dict[str, str]]

_PARAMETERS = ["prompt_id", "prompt", "item", "validated"]
_MARK = "graft_validation"


def register(find_faults: FindFaults) -> None:
    """Wrap ComfyUI's validation once. Leave a version whose function takes other arguments as it is.

    Args:
        find_faults: returns the errors of a node's values by input, none for a node of another pack.
    """
    import execution

    validate = execution.validate_inputs
    if hasattr(validate, _MARK) or list(inspect.signature(validate).parameters)[:4] != _PARAMETERS:
        return
    execution.validate_inputs = _wrap(validate, find_faults)


def _wrap(validate: Callable, find_faults: FindFaults) -> Callable:
    @functools.wraps(validate)
    async def validate_inputs(prompt_id, prompt, item, validated, *more):
        answer = await validate(prompt_id, prompt, item, validated, *more)
        if any(map(_is_repeated, answer[1])):
            node = prompt[item]
            values = {name: None if is_link(value) else value for name, value in node["inputs"].items()}
            # ComfyUI keeps the same list in `validated`.
            _keep_faults(answer[1], find_faults(nodes.NODE_CLASS_MAPPINGS[node["class_type"]], values))
        return answer

    setattr(validate_inputs, _MARK, True)
    return validate_inputs


def _keep_faults(errors: list[dict[str, Any]], faults: dict[str, str]) -> None:
    """Keep one error for each faulty input, with that input's own message; keep all if no fault is known."""
    if not faults:
        return
    kept = []
    for error in errors:
        name = error["extra_info"].get("input_name")
        if not _is_repeated(error):
            kept.append(error)
        elif name in faults:
            kept.append({**error, "details": f"{name} - {faults[name]}"})
    errors[:] = kept


def _is_repeated(error: dict[str, Any]) -> bool:
    return error["type"] == "custom_validation_failed"
