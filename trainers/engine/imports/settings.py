"""Import of other trainers' settings: options, values of a trainer's widgets, and a report of both."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ...errors import SettingsError
from ...families import family_of
from ...methods import METHODS
from ...methods.arguments import check_arguments
from ...optimizers import finds_its_rate
from ...recipe.options import OPTIONS
from ...recipe.parsing import parse_arguments
from ..resolve import Options, RecipeInputs, resolve
from . import ai_toolkit, onetrainer, sd_scripts
from .converters import CURE, flatten, is_off, number, parse_settings, shown, typed, whole

TRAINERS = {"sd-scripts": sd_scripts, "OneTrainer": onetrainer, "ai-toolkit": ai_toolkit}
# (default, lowest, highest) of the trainers' widgets.
WIDGETS = {
    "steps": (1000, 1, 1_000_000),
    "learning_rate": (0.0, 0.0, 10.0),
    "rank": (16, 1, 1024),
    "batch_size": (1, 1, 1024),
    "seed": (0, 0, 2**64 - 1),
}
# Ends of fields for which 0 and false mean something.
_MEANT = ("grad_norm", "weight_decay", "checkpointing", "mse_strength")
_ARGUMENTS = ("optimizer_args.", "train.optimizer_params.")
_ADAFACTOR = ("relative_step", "scale_parameter", "warmup_init")
_LONGEST = 20_000


@dataclass(frozen=True)
class Imported:
    """Settings of another trainer.

    Attributes:
        options: those that Graft has too.
        widgets: values of WIDGETS, the defaults where the text has none.
        report: what was taken, what other nodes have, and what has no counterpart.
    """

    options: Options
    widgets: dict[str, Any]
    report: str

    def added_to(self, options: Options) -> Options:
        """Return options with these on top."""
        for node in OPTIONS:
            options = options.adding(node, self.options.values_of(node))
        return options


def import_settings(text: str) -> Imported:
    """Convert the settings of sd-scripts, kohya_ss, OneTrainer or ai-toolkit. Without a text nothing is set.

    Raises:
        SettingsError: the text is none of these.
    """
    if not text.strip():
        widgets = {name: default for name, (default, _, _) in WIDGETS.items()}
        return Imported(Options(), widgets, "There is no text: this node changes nothing.")
    tool, given = recognize(text)
    draft = _Draft(TRAINERS[tool], given)
    draft.leave_out_useless()
    return Imported(draft.options(), draft.widgets, draft.report(tool))


def recognize(text: str) -> tuple[str, dict[str, Any]]:
    """Return the trainer's name and the fields of its settings. Raise SettingsError for any other text."""
    values = parse_settings(text)
    config = values.get("config")
    processes = config.get("process") if isinstance(config, dict) else None
    if isinstance(processes, list) and processes and isinstance(processes[0], dict):
        fields = flatten({"name": config.get("name"), **processes[0]})
        folders = fields.get("datasets")
        if isinstance(folders, list) and folders and isinstance(folders[0], dict):
            fields |= {**flatten(folders[0], "datasets."), "datasets": len(folders) - 1}
        return "ai-toolkit", fields
    merged: dict[str, Any] = {}
    for name, value in values.items():
        # A section of sd-scripts' TOML has no meaning.
        merged |= value if isinstance(value, dict) else {name: value}
    both = {"sd-scripts": flatten(merged), "OneTrainer": flatten(values)}
    tables = {tool: {*TRAINERS[tool].TABLE, *TRAINERS[tool].CONVERTERS, *TRAINERS[tool].NOTES} for tool in both}
    tool = max(both, key=lambda tool: len(both[tool].keys() & tables[tool]))
    if len(both[tool].keys() & tables[tool]) < 2:
        raise SettingsError("The text has no settings that Graft knows.", CURE, "text")
    if tool == "sd-scripts":
        return tool, sd_scripts.fields_of(both[tool])
    fields = both[tool]
    if fields.get("clip_grad_norm", 1) is None:
        # No clipping.
        fields["clip_grad_norm"] = 0.0
    return tool, fields


class _Draft:
    """Settings while they are converted, with what the report says of each."""

    def __init__(self, trainer: Any, given: dict[str, Any]):
        self._trainer, self._given = trainer, given
        self._fields = {**trainer.defaults(given), **given}
        self.widgets = {name: default for name, (default, _, _) in WIDGETS.items()}
        # Values and fields by target, reasons by field.
        self._values: dict[str, Any] = {}
        self._sources: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._off: list[str] = []
        known = dict.fromkeys((*trainer.TABLE, *trainer.CONVERTERS))
        for name in (*known, *(name for name in self._fields if name not in known)):
            if name in self._fields:
                self._read(name)

    def _read(self, name: str) -> None:
        """Convert a field, and note what becomes of it."""
        value = self._fields[name]
        meant = name.endswith(_MEANT) or name.startswith(_ARGUMENTS)
        if is_off(value) and (value in (None, "") or not meant):
            self._off += [name] if name in self._given else []
            return
        try:
            targets = self._targets(name, value)
            checked = {target: self._checked(target, chosen) for target, chosen in targets.items() if target}
        except SettingsError as error:
            self._missing[name] = error.message
        except ArithmeticError:
            self._missing[name] = "It is no number of a usable size."
        else:
            self._values |= checked
            self._sources |= dict.fromkeys(checked, name)

    def _targets(self, name: str, value: Any) -> dict[str, Any]:
        """Return values by target."""
        trainer = self._trainer
        trainer.check(name, self._fields)
        if name in trainer.CONVERTERS:
            return trainer.CONVERTERS[name](value, self._fields) or {}
        group, _, argument = name.rpartition(".")
        if name not in trainer.TABLE and f"{group}." in _ARGUMENTS:
            if argument in _ADAFACTOR and not is_off(value):
                raise SettingsError("Graft's Adafactor takes the learning rate as it is.")
            return {} if argument in _ADAFACTOR else {f"optimizer_args.{argument}": value}
        if name not in trainer.TABLE:
            raise SettingsError(trainer.NOTES.get(name, "Graft has nothing like it."))
        return {trainer.TABLE[name]: value}

    def _checked(self, target: str, value: Any) -> Any:
        """Return a value as its target takes it."""
        node, _, input = target.partition(".")
        if node == "trainer":
            _, low, high = WIDGETS[input]
            value = number(value) if input == "learning_rate" else whole(value)
            if not low <= value <= high:
                raise SettingsError(f"It must lie between {low} and {high}.")
            self.widgets[input] = value
        elif node.endswith("_args"):
            value = ",".join(map(shown, value)) if isinstance(value, list) else shown(value)
            parse_arguments(f"{input}={value}", node)
        elif node != "dataset":
            value = typed(node, input, value)
        return value

    def options(self) -> Options:
        """Return the options."""
        options = Options()
        arguments: dict[str, list[str]] = {}
        for target, value in self._values.items():
            node, _, input = target.partition(".")
            if node in OPTIONS:
                options = options.adding(node, {input: value})
            elif node.endswith("_args"):
                arguments.setdefault(node, []).append(f"{input}={value}")
        for node, words in arguments.items():
            options = options.adding(node.removesuffix("_args"), {node: " ".join(words)})
        return options

    def leave_out_useless(self) -> None:
        """Leave out what contradicts other settings or has no effect with them."""
        kind = self._values.get("adapter.type", "LoRA")
        if finds_its_rate(self._values.get("optimizer.optimizer", "AdamW")):
            for target in ("adapter.text_encoder_learning_rate", "adapter.lora_plus_ratio"):
                self._leave_out(target, "This optimizer finds one learning rate for everything.")
        for target, value in list(self._values.items()):
            node, _, input = target.partition(".")
            if node == "adapter_args":
                alone = SimpleNamespace(method=kind, adapter_args=parse_arguments(f"{input}={value}", node))
                try:
                    check_arguments(alone, METHODS[kind].arguments)
                except SettingsError as error:
                    self._leave_out(target, error.message)
        while True:
            try:
                inputs = RecipeInputs("LoRA", resolution=0, trigger="", **self.widgets)
                resolve(self.options(), family_of("SD1"), inputs)
                return
            except SettingsError as error:
                if isinstance(error.__cause__, ImportError):
                    # The trainer names the missing package.
                    return
                target = next((target for target in self._values if _is_blamed(target, error)), None)
                if target is None:
                    raise SettingsError(f"The settings do not fit: {error.message}", error.cure, "text") from error
                self._leave_out(target, error.message)

    def _leave_out(self, target: str, reason: str) -> None:
        if self._values.pop(target, None) is not None:
            self._missing[self._sources[target]] = reason

    def report(self, tool: str) -> str:
        """Return the report."""
        taken: dict[str, list[str]] = {}
        elsewhere: dict[str, list[str]] = {}
        reasons: dict[str, list[str]] = {}
        for target, value in self._values.items():
            node, _, input = target.partition(".")
            text = {"trainer": f"{input} {shown(value)} of the trainer", "dataset": f"{input} of the dataset node"}
            parts = elsewhere if node in text else taken
            parts.setdefault(self._field(self._sources[target]), []).append(
                text.get(node, f"{node} {input} {shown(value)}")
            )
        for name, reason in self._missing.items():
            reasons.setdefault(reason, []).append(self._field(name))
        lines = [f"Settings of {tool}, {len(self._given)} fields."]
        for title, entries in (
            ("Taken", [f"{field}: {', '.join(texts)}" for field, texts in taken.items()]),
            ("Set in other nodes", [f"{field}: {', '.join(texts)}" for field, texts in elsewhere.items()]),
            ("Not taken", [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]),
        ):
            lines += ["", f"{title}:", *(f"  {entry}" for entry in entries or ["nothing"])]
        absent = [f"{name} {shown(self.widgets[name])}" for name in WIDGETS if f"trainer.{name}" not in self._values]
        if absent:
            lines += ["", f"Not in the text, so the outputs have Graft's defaults: {', '.join(absent)}."]
        if self._off:
            lines += ["", f"Off or empty: {', '.join(self._off)}."]
        report = "\n".join(lines)
        return report if len(report) <= _LONGEST else f"{report[:_LONGEST]}..."

    def _field(self, name: str) -> str:
        return f"{name} = {shown(self._fields[name])}{'' if name in self._given else ' (its default)'}"


def _is_blamed(target: str, error: SettingsError) -> bool:
    """Return True if an error of the recipe names the target."""
    node, _, input = target.partition(".")
    if node.endswith("_args"):
        return node == error.input and f"'{input}'" in error.message
    return node in OPTIONS and error.input in (input, OPTIONS[node][input].name)
