"""Nothing of the model: it stays frozen while something beside it, such as a word, is trained."""

from __future__ import annotations

from .base import Method


class Frozen(Method):
    """No module is adapted."""

    name = "embedding"
    ranked = False

    def targets(self, module, family, recipe):
        """None."""
        return []

    def inject(self, module, targets, recipe):
        """Nothing is added."""
        return {}

    def groups(self, trainables, recipe):
        """None."""
        return []
