"""No adapter: the model stays frozen while an embedding is trained."""

from __future__ import annotations

from ..errors import SettingsError
from .base import Method

# Options of adapters, with their values if the user sets none.
_OF_ADAPTERS = {
    "alpha": 0.0,
    "target_patterns": (),
    "targets": "attention",
    "dropout": 0.0,
    "block_ranks": (),
    "block_learning_rates": (),
    "lora_plus_ratio": 1.0,
    "adapter_args": (),
    "text_encoder": False,
    "start_from": "",
}


class NoMethod(Method):
    """A method that trains nothing in the model."""

    name = "embedding"
    ranked = False
    trains_model = False

    def check(self, recipe):
        """Raise SettingsError if the recipe sets an option of adapters."""
        for field, unset in _OF_ADAPTERS.items():
            if getattr(recipe, field) != unset:
                raise SettingsError(
                    f"{field} is set, but this node trains no adapter: it would have no effect.",
                    "Remove Graft Adapter Options from this node's options.",
                    "options",
                )

    def targets(self, module, family, recipe):
        """Return no targets."""
        return []

    def inject(self, module, targets, recipe):
        """Add nothing."""
        return {}

    def groups(self, trainables, recipe):
        """Return no groups."""
        return []
