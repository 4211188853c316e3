"""Arguments of `adapter_args`, by the names of LyCORIS and sd-scripts, and their check."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SettingsError

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe


# Name of the module in peft's layer that drops its ranks or all of it.
STRUCTURE_DROPOUT = "structure_dropout"


class Argument(NamedTuple):
    """Kind of an argument: a switch if its bounds are None, else a number between them."""

    kind: type
    low: float | None = None
    high: float | None = None

    def problem(self, value: Any) -> str:
        """Return what a value must be, or an empty string if it is."""
        if self.low is None:
            return "" if isinstance(value, bool) else "true or false"
        is_number = isinstance(value, (int, self.kind)) and not isinstance(value, bool)
        noun = "a whole number" if self.kind is int else "a number"
        return "" if is_number and self.low <= value <= self.high else f"{noun} from {self.low:g} to {self.high:g}"


_SWITCH, _FRACTION = Argument(bool), Argument(float, 0.0, 0.95)
ARGUMENTS = {
    "factor": Argument(int, 1, 4096),
    "full_matrix": _SWITCH,
    "decompose_both": _SWITCH,
    "use_tucker": _SWITCH,
    "dora_wd": _SWITCH,
    "rank_dropout": _FRACTION,
    "module_dropout": _FRACTION,
    "scale_weight_norms": Argument(float, 1e-4, 1e4),
    "lora_fa": _SWITCH,
    "eva": _SWITCH,
    "train_norm": _SWITCH,
    "train_bias": _SWITCH,
}
# Arguments of all low-rank types whose layers are changed by no more than their own factors.
BESIDE = ("train_norm", "train_bias")
# Variants that no type has, with the reason.
_REFUSED = {
    "t_lora": "T-LoRA's rank depends on the timestep, and no file that ComfyUI reads says so",
}


def value_of(recipe: Recipe, name: str, default: Any = None) -> Any:
    """Return the value of an argument, or the default if it is not set."""
    return dict(recipe.adapter_args).get(name, default)


def check_arguments(recipe: Recipe, known: Collection[str]) -> None:
    """Raise SettingsError for an argument that the type does not have, or for a wrong value.

    Args:
        known: names of the type's arguments.
    """
    for name, value in recipe.adapter_args:
        if name in known:
            problem = ARGUMENTS[name].problem(value)
            cure = f"Write {name}= and {problem}."
            problem = problem and f"{name} is {value}"
        else:
            problem = f"adapter_args has '{name}', which {recipe.method} does not take"
            problem += f": {_REFUSED[name]}" if name in _REFUSED else ""
            cure = f"It takes {', '.join(known)}." if known else "It takes none. Leave adapter_args unset."
        if problem:
            raise SettingsError(f"{problem}.", cure, "adapter_args")
