"""Options of the objective: timesteps, noise, weighting and loss that differ from the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SettingsError
from .losses import HUBER_SCHEDULES, LOSSES
from .timesteps import TIMESTEPS
from .weighting import WEIGHTINGS

# The value that means "not set", per field.
UNSET: dict[str, Any] = {
    "timesteps": "auto",
    "min_timestep": 0,
    "max_timestep": 0,
    "weighting": "auto",
    "min_snr_gamma": 0.0,
    "loss": "auto",
    "noise_offset": 0.0,
    "input_perturbation": 0.0,
    "pyramid_discount": 0.0,
    "timestep_mean": 0.0,
    "timestep_std": 0.0,
    "timestep_shift": 0.0,
    "huber_c": 0.0,
    "huber_schedule": "auto",
}

RANGES: dict[str, tuple[float, float]] = {
    "min_timestep": (0, 1000),
    "max_timestep": (1, 1000),
    "min_snr_gamma": (0.0, 1000.0),
    "noise_offset": (0.0, 1.0),
    "input_perturbation": (0.0, 1.0),
    "pyramid_discount": (0.0, 0.99),
    "timestep_mean": (-10.0, 10.0),
    "timestep_std": (0.01, 10.0),
    "timestep_shift": (0.01, 100.0),
    "huber_c": (1e-4, 1.0),
}


_REGISTRIES = {
    "timesteps": TIMESTEPS,
    "weighting": WEIGHTINGS,
    "loss": LOSSES,
    "huber_schedule": HUBER_SCHEDULES,
}

# Fields that have an effect only with certain values of another field.
_NEEDED = {
    "min_snr_gamma": ("weighting", ("min-SNR",)),
    "timestep_mean": ("timesteps", ("logit-normal", "shifted", "resolution-shifted")),
    "timestep_std": ("timesteps", ("logit-normal", "shifted", "resolution-shifted")),
    "timestep_shift": ("timesteps", ("shifted",)),
    "huber_c": ("loss", ("Huber",)),
    "huber_schedule": ("loss", ("Huber",)),
}


def check_range(name: str, value: Any) -> None:
    """Raise SettingsError if a number is out of its field's range."""
    if name in RANGES and not RANGES[name][0] <= value <= RANGES[name][1]:
        low, high = RANGES[name]
        raise SettingsError(f"{name} is {value}.", f"It must lie between {low} and {high}.", name)


@dataclass(frozen=True)
class Objective:
    """A training objective. The defaults are the model's own loss.

    Attributes:
        timesteps, weighting, loss, huber_schedule: keys of TIMESTEPS, WEIGHTINGS, LOSSES and HUBER_SCHEDULES.
        min_timestep, max_timestep: bounds of t, 0 to 1000 over the model's levels.
        timestep_mean, timestep_std: of the normal distribution whose sigmoid gives the timesteps.
        timestep_shift: factor on the odds of noise, for "shifted".
        min_snr_gamma: upper bound of the signal-to-noise ratio, for "min-SNR".
        huber_c: the error at which Huber turns from square to absolute, at the lowest point of the schedule.
        noise_offset: standard deviation of a value that is added to a whole channel (Guttenberg 2023).
        pyramid_discount: factor on each coarser noise (Whitaker 2023), 0 for none.
        input_perturbation: standard deviation of noise that the target does not contain (Ning et al. 2023).

    Raises:
        SettingsError: a value is out of range, or two values contradict each other.
    """

    timesteps: str = "uniform"
    min_timestep: int = 0
    max_timestep: int = 1000
    weighting: str = "native"
    min_snr_gamma: float = 5.0
    loss: str = "MSE"
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    pyramid_discount: float = 0.0
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    timestep_shift: float = 3.0
    huber_c: float = 0.1
    huber_schedule: str = "auto"

    def __post_init__(self):
        for name, known in _REGISTRIES.items():
            if getattr(self, name) not in known:
                raise SettingsError(
                    f"Unknown {name} '{getattr(self, name)}'.", f"Choose one of {', '.join(known)}.", name
                )
        for name in RANGES:
            check_range(name, getattr(self, name))
        if self.min_timestep >= self.max_timestep:
            raise SettingsError(
                f"min_timestep {self.min_timestep} is not below max_timestep {self.max_timestep}.",
                "Widen the range in Graft Objective Options; 0 and 0 select all of it.",
                "min_timestep",
            )
        if self.pyramid_discount and self.noise_offset:
            raise SettingsError(
                "pyramid_discount and noise_offset are both set.",
                "Use one of them in Graft Objective Options: the pyramid's coarsest noise already is an offset.",
                "noise_offset",
            )

    def set_fields(self) -> dict[str, Any]:
        """Return the fields that change the result, JSON-able. Empty for the model's own loss."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value != getattr(NATIVE, name) or (name in _NEEDED and self._uses(name))
        }

    def kohya_metadata(self) -> dict[str, Any]:
        """Return the fields that kohya's metadata has, by its names without `ss_`. Fields not in use are None."""
        huber = self.loss == "Huber"
        return {
            "noise_offset": self.noise_offset or None,
            "multires_noise_discount": self.pyramid_discount or None,
            "ip_noise_gamma": self.input_perturbation or None,
            "min_snr_gamma": self.min_snr_gamma if self.weighting == "min-SNR" else None,
            "debiased_estimation": True if self.weighting == "debiased" else None,
            "loss_type": {"MSE": "l2", "L1": "l1", "Huber": "huber"}[self.loss],
            "huber_c": self.huber_c if huber else None,
            "huber_schedule": self.huber_schedule if huber else None,
        }

    def _uses(self, name: str) -> bool:
        """Return True if the field that `name` depends on has one of the required values."""
        other, choices = _NEEDED[name]
        return getattr(self, other) in choices

    def check(self, parameterization: str) -> None:
        """Refuse options that have no meaning for a model of that parameterization.

        Raises:
            SettingsError: signal-to-noise weights on a flow model, or flow weights on another model.
        """
        flow = parameterization == "flow"
        other = [name for name, known in WEIGHTINGS.items() if known.fits("flow" if flow else "eps")]
        if not WEIGHTINGS[self.weighting].fits(parameterization):
            raise SettingsError(
                f"The weighting '{self.weighting}' is made for {'noise and velocity' if flow else 'flow'} models; "
                f"this one predicts {'flow' if flow else parameterization}.",
                f"In Graft Objective Options choose the weighting {' or '.join(other)}.",
                "weighting",
            )
        if flow and self.huber_schedule == "snr":
            raise SettingsError(
                "The huber_schedule 'snr' needs a signal-to-noise ratio, which flow models do not have.",
                "In Graft Objective Options choose exponential or constant.",
                "huber_schedule",
            )


# The model's own loss, uniform over all its levels.
NATIVE = Objective()


def objective_of(chosen: Mapping[str, Any]) -> Objective:
    """Build the objective from the fields that the user set.

    Raises:
        SettingsError: as Objective does, and for a field that would have no effect.
    """
    objective = Objective(**chosen)
    for name, (other, choices) in _NEEDED.items():
        if name in chosen and not objective._uses(name):
            raise SettingsError(
                f"{name} is set, but {other} is {getattr(objective, other)}: it would have no effect.",
                f"In Graft Objective Options set {other} to {' or '.join(choices)}, or leave {name} unset.",
                name,
            )
    return objective
