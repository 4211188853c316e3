"""Declarations of options: unset value, range or choices, default, and part in a run's identity."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from .errors import SettingsError

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """Declaration of one option, in the metadata of the dataclass field that holds its value.

    Attributes:
        node: kind of the option node with its widget; empty for a widget of the training nodes.
        input: the widget's name, if it differs from the field's.
        unset: the widget's value for "not set".
        default: the value if it is not set, or a function of a `Basis` that returns the value.
        range: lowest and highest value.
        top: highest value of the widget, if it is below the range's.
        choices: allowed values besides the default; or the name of a registry, see `engine.validation.choices_of`.
        offered: the choices that the widget offers, if they differ from `choices`; likewise.
        parse: function that converts the widget's value; it raises SettingsError for an invalid one.
        check: function that raises SettingsError for an invalid value of the field.
        decides: whether the value affects the result and so is part of the run's identity.
        before: value that reproduces versions without this option. With it the option is left out of the identity, so
            that Graft finds the runs of those versions; their jobs load with it. Options of the first release have
            none.
        needs: (other field, values) with which alone this option has an effect.
        trainer_input: input of a training node that an error of the recipe concerns, if not the one with this name.
        name: name of the dataclass field.
    """

    node: str = ""
    input: str = ""
    unset: Any = None
    default: Any = None
    range: tuple[float, float] | None = None
    top: float | None = None
    choices: tuple[str, ...] | str = ()
    offered: tuple[str, ...] | str = ()
    parse: Callable[[Any], Any] | None = None
    check: Callable[[Any], None] | None = None
    decides: bool = True
    before: Any = field(default_factory=lambda: MISSING)
    needs: tuple[str, tuple[str, ...]] | None = None
    trainer_input: str = ""
    name: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the lowest and the highest value of a number's widget. The unset value is among them."""
        assert self.range is not None, f"{self.name} has no range"
        low, high = self.range
        return min(self.unset, low), high if self.top is None else self.top

    def value_of(self, chosen: Any) -> Any:
        """Convert a widget's value to the field's. Raise SettingsError for an invalid one."""
        return chosen if self.parse is None else self.parse(chosen)

    def default_of(self, basis: Any) -> Any:
        """Return the default value for a basis."""
        return self.default(basis) if callable(self.default) else self.default

    def check_range(self, value: Any, input: str) -> None:
        """Raise SettingsError that names the input if a value is out of range."""
        if self.range is not None and not self.range[0] <= value <= self.range[1]:
            low, high = self.range
            raise SettingsError(f"{self.name} is {value}.", f"It must lie between {low} and {high}.", input)


def option(node: str = "", **attributes: Any) -> Any:
    """Declare an option as a field of a dataclass. `attributes` are those of Option, which refuses others."""
    declared = Option(node, **attributes)
    return field(default=declared.before, metadata={_KEY: declared})


def options_of(owner: type) -> dict[str, Option]:
    """Return the options that the fields of a dataclass declare, by field name."""
    declared = {entry.name: entry.metadata[_KEY] for entry in fields(owner) if _KEY in entry.metadata}
    return {name: replace(entry, name=name, input=entry.input or name) for name, entry in declared.items()}
