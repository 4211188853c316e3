"""An optimizer as the recipe and the loop use it, base of all entries of the registry; schedule-free averages."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError, needing

if TYPE_CHECKING:
    import torch

    from ..recipe.recipe import Recipe


class ScheduleFreeAverage:
    """The point x of schedule-free, for saves and previews. The gradient is taken at another point, y.

    The trainables hold y throughout. The library's own conversions between x and y round: the result of a run
    would depend on how often it is previewed. So this class computes x separately and puts the unchanged y back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list):
        self._optimizer = optimizer
        self._parameters = parameters
        self._beta1 = optimizer.defaults.get("momentum") or optimizer.defaults["betas"][0]
        self._kept: list[torch.Tensor] = []

    @property
    def shadow_params(self) -> list[torch.Tensor]:
        """Return x of every parameter."""
        averages = []
        for parameter in self._parameters:
            y = parameter.detach()
            # Look it up each time: restoring a saved state replaces the dict.
            z = self._optimizer.state.get(parameter, {}).get("z")
            # A parameter without an update has no z. Then x, y and z are equal.
            averages.append(y.clone() if z is None else y.lerp(z, 1 - 1 / self._beta1))
        return averages

    def step(self, parameters: list, skip: torch.Tensor | None = None) -> None:
        """Do nothing: the optimizer's own step updates the average."""

    def store(self, parameters: list) -> None:
        """Keep a copy of y."""
        self._kept = [parameter.detach().clone() for parameter in parameters]

    def copy_to(self, parameters: list) -> None:
        """Put x into the trainables."""
        self._put(self.shadow_params, parameters)

    def restore(self, parameters: list) -> None:
        """Put y back into the trainables."""
        self._put(self._kept, parameters)
        self._kept = []

    def _put(self, values: list, parameters: list) -> None:
        for value, parameter in zip(values, parameters, strict=True):
            parameter.detach().copy_(value)


# Arguments of an optimizer's class that the recipe's other fields set.
_RECIPE_SETS = {"params", "lr", "weight_decay"}


def needs(package: str) -> AbstractContextManager[None]:
    """Turn an ImportError in the block into a SettingsError that names the missing package."""
    return needing(package, "This optimizer", "or choose another optimizer in Graft Optimizer Options", "optimizer")


class Optimizer:
    """An optimizer, as the recipe and the loop use it.

    Attributes:
        learning_rate: its own default. None for the default of family and method times `rate_factor`.
        rate_factor: factor on the default of family and method.
        weight_decay, beta1, beta2: defaults. 0 for a beta that the optimizer does not have.
        per_parameter: whether the update of a parameter depends on that parameter's gradient alone, so that it can run
            before the next gradient is ready.
        slots: minimum number of state values per trained number.
        elementwise: whether the update of each number depends on that number's gradient alone.
        averages: whether the optimizer itself keeps an average of the parameters.
    """

    learning_rate: float | None = None
    rate_factor = 1.0
    weight_decay = 0.01
    beta1 = 0.9
    beta2 = 0.999
    per_parameter = True
    slots = 0
    elementwise = False
    averages = False

    def load(self, recipe: Recipe) -> type[torch.optim.Optimizer]:
        """Return the optimizer's class.

        Raises:
            SettingsError: the package is not installed. The message names it.
        """
        raise NotImplementedError

    def make(self, groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
        """Build an optimizer for the groups of `parameter_groups`."""
        return self.build(groups, recipe, betas=(recipe.beta1, recipe.beta2))

    def build(self, groups: list[dict], recipe: Recipe, **values: Any) -> torch.optim.Optimizer:
        """Build an optimizer with the recipe's rate, some values, and the user's arguments in their place."""
        return self.load(recipe)(groups, **{"lr": recipe.learning_rate, **values, **self.arguments(recipe)})

    def arguments(self, recipe: Recipe) -> dict[str, Any]:
        """Return the user's arguments for the optimizer's class."""
        return dict(recipe.optimizer_args)

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError if the recipe has settings that this optimizer cannot use."""

    def check_arguments(self, recipe: Recipe) -> None:
        """Raise SettingsError if the optimizer's class does not take an argument of the user."""
        arguments = self.arguments(recipe)
        if not arguments:
            return
        known = sorted(inspect.signature(self.load(recipe)).parameters.keys() - _RECIPE_SETS)
        for name in arguments:
            if name not in known:
                raise SettingsError(
                    f"optimizer_args has '{name}', which {recipe.optimizer} does not take.",
                    f"It takes {', '.join(known)}. learning_rate and weight_decay have inputs of their own.",
                    "optimizer_args",
                )
        self._try_step(recipe)

    def _try_step(self, recipe: Recipe) -> None:
        """Make a step with a small matrix. Raise SettingsError if the optimizer refuses the user's arguments."""
        import torch

        weight = torch.nn.Parameter(torch.ones(4, 4))
        weight.grad = torch.ones(4, 4)
        group = {"params": [weight], "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        try:
            optimizer = self.make([group], recipe)
            if hasattr(optimizer, "train"):
                optimizer.train()
            # The kernels of bitsandbytes need a GPU.
            if not type(optimizer).__module__.startswith("bitsandbytes"):
                optimizer.step()
        except Exception as error:  # the libraries have errors of their own
            raise SettingsError(
                f"{recipe.optimizer} cannot use optimizer_args: {str(error).rstrip('.')}.",
                "Correct the value, or remove it.",
                "optimizer_args",
            ) from error

    def mistaken_rate(self, rate: float) -> str:
        """Return a warning if the recipe's learning rate is far from this optimizer's range, else an empty string."""
        return ""

    def effective_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> float:
        """Return the learning rate of the next step.

        Args:
            optimizer: made by `make`.
            rate: the recipe's times the schedule's factor.
        """
        return rate

    def average(self, optimizer: torch.optim.Optimizer, parameters: list) -> ScheduleFreeAverage | None:
        """Return the average that the optimizer itself keeps, or None if it keeps none."""
        return None
