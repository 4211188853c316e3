"""Nothing of the model: it stays frozen while something beside it, such as a word, is trained."""

from __future__ import annotations

from ..errors import SettingsError
from .base import Method

# Fields that say what an adapter is like, with the values they have where nothing is said.
_OF_ADAPTERS = {
    "alpha": 0.0,
    "target_patterns": (),
    "targets": "attention",
    "dropout": 0.0,
    "block_ranks": (),
    "block_learning_rates": (),
    "lora_plus_ratio": 1.0,
    "text_encoder": False,
    "start_from": "",
}


class NoMethod(Method):
    """No module is adapted."""

    name = "embedding"
    ranked = False
    trains_model = False

    def check(self, recipe):
        """Raises SettingsError when something is said of an adapter, which there is none of."""
        for field, unset in _OF_ADAPTERS.items():
            if getattr(recipe, field) != unset:
                raise SettingsError(
                    f"{field} is set, but no adapter is trained: it would have no effect.",
                    "Take Graft Adapter Options out of this node's options.",
                    "options",
                )

    def targets(self, module, family, recipe):
        """None."""
        return []

    def inject(self, module, targets, recipe):
        """Nothing is added."""
        return {}

    def groups(self, trainables, recipe):
        """None."""
        return []
