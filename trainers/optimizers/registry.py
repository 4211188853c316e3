"""The optimisers, one small class each, and their registry; a library is imported only when its optimiser is chosen."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ..errors import SettingsError, needing
from .schedule_free import ScheduleFreeAverage

if TYPE_CHECKING:
    import torch

    from ..recipe.recipe import Recipe


def needs(package: str) -> AbstractContextManager[None]:
    """Says which package an import inside the block is missing. Raises SettingsError in place of ImportError."""
    return needing(package, "This optimizer", "or choose another optimizer in Graft Optimizer Options", "optimizer")


class Optimizer:
    """An optimiser as the recipe and the loop need it.

    Attributes:
        learning_rate: its own default; None for the family's and method's times `rate_factor`.
        weight_decay, beta1, beta2: its defaults; 0 for a beta that it does not have.
        apart: whether it moves each parameter by that parameter's gradient alone, so that one can be moved before the
            next one's gradient is there.
        slots: numbers it keeps for each one that is trained, at least.
        averages: whether it keeps an average of the parameters by itself.
    """

    learning_rate: float | None = None
    rate_factor = 1.0
    weight_decay = 0.01
    beta1 = 0.9
    beta2 = 0.999
    apart = True
    slots = 0
    averages = False

    def load(self) -> type[torch.optim.Optimizer]:
        """Its class.

        Raises:
            SettingsError: the package is not installed, with what to install.
        """
        raise NotImplementedError

    def make(self, groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
        """An optimiser of `parameter_groups`."""
        return self.load()(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2))

    def check(self, recipe: Recipe) -> None:
        """Raises SettingsError for settings that it cannot go with."""

    def mistaken_rate(self, rate: float) -> str:
        """A warning about a learning rate of the recipe that is far from what this optimizer takes, empty for none."""
        return ""

    def effective_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> float:
        """The learning rate of the next step.

        Args:
            optimiser: made by `make`.
            rate: the recipe's times the schedule's factor.
        """
        return rate

    def average(self, optimizer: torch.optim.Optimizer, parameters: list) -> ScheduleFreeAverage | None:
        """The average of the parameters that it keeps by itself, None for none."""
        return None


class AdamW(Optimizer):
    """Loshchilov & Hutter 2019, by torch."""

    slots = 2

    def load(self):
        import torch

        return torch.optim.AdamW

    def make(self, groups, recipe):
        values = {
            "lr": recipe.learning_rate,
            "betas": (recipe.beta1, recipe.beta2),
            "weight_decay": recipe.weight_decay,
        }
        try:
            # One kernel for all parameters instead of a dozen each.
            return self.load()(groups, **values, fused=True)
        except RuntimeError:
            # Not on every device, nor in every version of torch.
            return self.load()(groups, **values)


class AdamW8bit(Optimizer):
    """With its moments in eight bits (Dettmers et al. 2022), by bitsandbytes."""

    def load(self):
        with needs("bitsandbytes"):
            from bitsandbytes.optim import AdamW8bit
        return AdamW8bit


class PagedAdamW8bit(Optimizer):
    """The same, with moments that leave the graphics card when memory runs short."""

    def load(self):
        with needs("bitsandbytes"):
            from bitsandbytes.optim import PagedAdamW8bit
        return PagedAdamW8bit


class Adafactor(Optimizer):
    """Moments by rows and columns (Shazeer & Stern 2018), by transformers; the rate is the recipe's, not its own."""

    weight_decay = 0.0
    beta1 = 0.0
    beta2 = 0.0

    def load(self):
        with needs("transformers"):
            from transformers.optimization import Adafactor
        return Adafactor

    def make(self, groups, recipe):
        return self.load()(
            groups,
            lr=recipe.learning_rate,
            beta1=recipe.beta1 or None,
            relative_step=False,
            scale_parameter=False,
            warmup_init=False,
        )

    def check(self, recipe):
        if recipe.beta2:
            raise SettingsError(
                "beta2 is set, but Adafactor has none: its second moment's decay follows the step.",
                "In Graft Optimizer Options leave beta2 alone, or choose another optimizer.",
                "beta2",
            )


class Prodigy(Optimizer):
    """Finds the learning rate by itself; the recipe's is a factor on it (Mishchenko & Defazio 2023)."""

    learning_rate = 1.0
    # The rate it finds is one for all.
    apart = False
    # Factors that its users set, with some room.
    least, most = 0.1, 10.0

    def load(self):
        with needs("prodigyopt"):
            from prodigyopt import Prodigy
        return Prodigy

    def check(self, recipe):
        others = {recipe.embedding_learning_rate, recipe.text_encoder_learning_rate} - {0.0, recipe.learning_rate}
        if recipe.lora_plus_ratio != 1 or recipe.block_learning_rates or others:
            raise SettingsError(
                "Prodigy finds one learning rate for all that is trained; here parts of it have rates of their own.",
                "Leave the other learning rates alone, or choose another optimizer.",
                "optimizer",
            )

    def mistaken_rate(self, rate):
        if self.least <= rate <= self.most:
            return ""
        return (
            f"learning_rate is {rate:g}, but Prodigy finds the rate itself and multiplies it by that. "
            "Set learning_rate to 1, or to 0 for the default."
        )

    def effective_rate(self, optimizer, rate):
        return rate * float(optimizer.param_groups[0]["d"])

    def make(self, groups, recipe):
        # As its authors advise for diffusion models. The decay is the groups'.
        return self.load()(
            groups,
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            use_bias_correction=True,
            safeguard_warmup=True,
        )


class Lion(Optimizer):
    """The sign of a momentum (Chen et al. 2023), by lion-pytorch.

    Its steps are larger than AdamW's: a third of the rate and three times the decay, which is their advice's mild end.
    """

    rate_factor = 1 / 3
    weight_decay = 0.03
    beta2 = 0.99

    def load(self):
        with needs("lion-pytorch"):
            from lion_pytorch import Lion
        return Lion


class CAME(Optimizer):
    """Adafactor with a confidence in its steps (Luo et al. 2023), by came-pytorch."""

    weight_decay = 0.0

    def load(self):
        with needs("came-pytorch"):
            from came_pytorch import CAME
        return CAME

    def make(self, groups, recipe):
        # The third is of the confidence; its authors' value.
        return self.load()(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2, 0.9999))


class AdamWScheduleFree(Optimizer):
    """AdamW that averages in place of a falling schedule (Defazio et al. 2024), by schedulefree."""

    # Its average is asked of the one that moves all.
    apart = False
    averages = True

    def load(self):
        with needs("schedulefree"):
            from schedulefree import AdamWScheduleFree
        return AdamWScheduleFree

    def make(self, groups, recipe):
        made = super().make(groups, recipe)
        made.train()
        return made

    def check(self, recipe):
        name = "AdamWScheduleFree averages the weights in place of a falling learning rate"
        if recipe.schedule != "constant":
            raise SettingsError(
                f"{name}; the schedule '{recipe.schedule}' would undo that.",
                "In Graft Optimizer Options set schedule to constant; warmup_steps may stay.",
                "schedule",
            )
        if recipe.ema_decay:
            raise SettingsError(
                f"{name}; ema_decay would average a second time.",
                "In Graft Optimizer Options set ema_decay to 0.",
                "ema_decay",
            )
        if recipe.embedding_name:
            raise SettingsError(
                f"{name}; of a word, whose vectors are kept at their length, that makes another vector.",
                "Choose another optimizer in Graft Optimizer Options, such as AdamW.",
                "optimizer",
            )
        if not recipe.beta1:
            raise SettingsError(
                "AdamWScheduleFree needs a beta1 above 0.", "In Graft Optimizer Options leave beta1 alone.", "beta1"
            )

    def average(self, optimizer, parameters):
        return ScheduleFreeAverage(optimizer, parameters)


OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": AdamW(),
    "AdamW8bit": AdamW8bit(),
    "PagedAdamW8bit": PagedAdamW8bit(),
    "Adafactor": Adafactor(),
    "Prodigy": Prodigy(),
    "Lion": Lion(),
    "CAME": CAME(),
    "AdamWScheduleFree": AdamWScheduleFree(),
}


def default_learning_rate(name: str, usual: float) -> float:
    """The rate of an optimiser where the user gave none.

    Args:
        usual: of the family and the method, for AdamW.
    """
    optimizer = OPTIMIZERS.get(name, OPTIMIZERS["AdamW"])
    return optimizer.learning_rate or usual * optimizer.rate_factor


def finds_its_rate(name: str) -> bool:
    """Whether an optimiser's learning rate is a factor on one that it finds itself (Prodigy)."""
    return name in OPTIMIZERS and OPTIMIZERS[name].learning_rate is not None
