"""Optimizers that are used as their libraries document them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from .optimizer import Optimizer, needs

if TYPE_CHECKING:
    import torch

    from ..recipe.recipe import Recipe


class LibraryOptimizer(Optimizer):
    """An optimizer that is used as its library documents it.

    Args:
        package: name on PyPI.
        module: that holds the class.
        name: of the class.
        betas: of the class; none if it has none. Those after the second keep these values.
        rate_factor, learning_rate, per_parameter, elementwise: see `Optimizer`.
    """

    weight_decay = 0.0

    def __init__(
        self,
        package: str,
        module: str,
        name: str,
        betas: tuple[float, ...] = (0.9, 0.999),
        rate_factor: float = 1.0,
        learning_rate: float | None = None,
        per_parameter: bool = True,
        elementwise: bool = False,
    ):
        self._package, self._module, self._name = package, module, name
        self.beta1, self.beta2 = betas[:2] if betas else (0.0, 0.0)
        self._betas = betas
        self.rate_factor, self.learning_rate = rate_factor, learning_rate
        self.per_parameter, self.elementwise = per_parameter, elementwise

    def load(self, recipe):
        return self._class(self._name)

    def _class(self, name: str) -> type[torch.optim.Optimizer]:
        with needs(self._package):
            module = importlib.import_module(self._module)
        return getattr(module, name)

    def make(self, groups, recipe):
        betas = {"betas": (recipe.beta1, recipe.beta2, *self._betas[2:])} if self._betas else {}
        return self.build(groups, recipe, **betas)

    def check(self, recipe):
        if not self._betas:
            refuse(recipe, "beta1", "beta2")


def refuse(recipe: Recipe, *names: str) -> None:
    """Raise SettingsError if one of these betas is set."""
    for name in names:
        if getattr(recipe, name):
            raise SettingsError(
                f"{name} is set, but {recipe.optimizer} has none.",
                f"In Graft Optimizer Options leave {name} unset; optimizer_args takes the optimizer's own names.",
                name,
            )


class ByName(LibraryOptimizer):
    """An optimizer of pytorch-optimizer whose name the user writes: name=ADOPT in optimizer_args."""

    def __init__(self):
        super().__init__(PACKAGE, "pytorch_optimizer", "", betas=(), per_parameter=False)

    def load(self, recipe):
        return self._class(dict(recipe.optimizer_args)["name"])

    def arguments(self, recipe):
        return {name: value for name, value in recipe.optimizer_args if name != "name"}

    def check(self, recipe):
        name = dict(recipe.optimizer_args).get("name")
        if name not in PYTORCH_OPTIMIZER:
            raise SettingsError(
                "optimizer is 'pytorch-optimizer', but optimizer_args does not name one of its optimizers."
                if name is None
                else f"optimizer_args has name={name}, which Graft cannot resume, or does not know.",
                f"Write name= and one of {', '.join(PYTORCH_OPTIMIZER)}.",
                "optimizer_args",
            )
        super().check(recipe)


PACKAGE = "pytorch-optimizer"
# Optimizers of pytorch-optimizer 4.1 whose state is tensors and numbers, so that a resumed run has the same bits, and
# that need neither a closure nor facts about the model. Those that average or find their rate have their own entries.
PYTORCH_OPTIMIZER = (
    *("A2Grad", "ADOPT", "APOLLO", "AccSGD", "AdEMAMix", "AdaBelief", "AdaBound", "AdaDelta", "AdaFactor", "AdaGC"),
    *("AdaMax", "AdaMod", "AdaNorm", "AdaPNM", "AdaSmooth", "AdaTAM", "Adai", "Adalite", "Adam", "AdamC", "AdamG"),
    *("AdamP", "AdamS", "AdamW", "AdamWSN", "Adan", "Aida", "Alice", "Amos", "Ano", "ApolloDQN", "AvaGrad", "BCOS"),
    *("CAME", "DiffGrad", "DualAdam"),
    *("EXAdam", "EmoFact", "EmoLynx", "EmoNavi", "FAdam", "FOCUS", "FTRL", "Fira", "FlashAdamW", "Fromage", "GaLore"),
    *("Grams", "Gravity", "GrokFastAdamW", "Kate", "LARS", "LaProp", "Lamb", "Lion", "MARS", "MSVAG", "NAdam", "Nero"),
    *("NovoGrad", "PAdam", "PID", "PNM", "QHAdam", "QHM", "RACS", "RAdam", "RMSprop", "ROSE", "Ranger"),
    *("SCION", "SCIONLight", "SGD", "SGDP", "SGDSaI", "SGDW", "SM3", "SRMM", "SWATS", "SaRA", "Shampoo", "SignSGD"),
    *("SimplifiedAdEMAMix", "TAM", "Tiger", "VSGD", "Yogi"),
)


def of_pytorch_optimizer(name: str, **more: Any) -> LibraryOptimizer:
    """Return an optimizer of pytorch-optimizer; `more` as for LibraryOptimizer."""
    # It counts steps by group.
    return LibraryOptimizer(PACKAGE, "pytorch_optimizer", name, per_parameter=False, **more)
