"""Settings of other trainers as plain values: TOML, JSON and YAML, read within bounds."""

from __future__ import annotations

import json
import re
from typing import Any

from ...errors import SettingsError, needing

_LONGEST = 100_000
_DEEPEST = 12
CURE = "Paste the whole settings file of kohya's sd-scripts, kohya_ss, OneTrainer or ai-toolkit."


def parse_settings(text: str) -> dict[str, Any]:
    """Parse a settings file, in the format that its first line shows.

    Raises:
        SettingsError: the text is empty, too long, too deeply nested, or is no table of settings.
    """
    if len(text) > _LONGEST:
        raise SettingsError(f"The text has {len(text)} characters, more than {_LONGEST}.", CURE, "text")
    first = next((line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")), "")
    kind = "JSON" if first.startswith("{") else "TOML" if re.match(r"\[|[\w\"'.-]+\s*=", first) else "YAML"
    try:
        values = {"JSON": json.loads, "TOML": _read_toml, "YAML": _read_yaml}[kind](text)
    except RecursionError as error:
        raise SettingsError(f"The {kind} text is nested too deeply.", CURE, "text") from error
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"The text is no valid {kind}: {_printable(error, 200)}.", CURE, "text") from error
    if not isinstance(values, dict):
        raise SettingsError("The text is no settings file.", CURE, "text")
    return values


def _read_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        # Python 3.10.
        with needing("tomli", "Reading TOML on this Python", "or paste the settings as JSON", "text"):
            import tomli as tomllib
    return tomllib.loads(text)


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                # References can stand for more than memory holds; tags for other types.
                raise ValueError("it has a reference or a tag, which Graft does not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RecursionError
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def flatten(values: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Return nested tables as one, with names such as `train.lr`. Lists stay.

    Raises:
        SettingsError: the tables are nested too deeply.
    """
    if depth > _DEEPEST:
        raise SettingsError("The text is nested too deeply.", CURE, "text")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{_printable(key)}"
        flat.update(flatten(value, f"{name}.", depth + 1) if isinstance(value, dict) and value else {name: value})
    return flat


def split_arguments(value: Any) -> dict[str, str]:
    """Split arguments such as ["a=1", "b=2"] or "a=1 b=2" by name. A part without = has an empty value."""
    words = value if isinstance(value, list) else str(value).split()
    parts = (_printable(word, 200).strip("\"' ").partition("=") for word in words)
    return {name.strip(): text.strip("\"' ") for name, _, text in parts}


def shown(value: Any) -> str:
    """Return a value as reports write it: short, and in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else _printable(value)


def _printable(value: Any, most: int = 60) -> str:
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)[: 4 * most]).split())
    return text if len(text) <= most else f"{text[:most]}..."
