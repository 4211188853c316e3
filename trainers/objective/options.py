"""Options of the objective: timesteps, noise, weighting and loss that differ from the model's own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SettingsError
from ..option import Option, option, options_of
from .losses import HUBER, HUBER_SCHEDULES, LOSSES
from .timesteps import TIMESTEPS
from .weighting import WEIGHTINGS

_NORMAL = ("timesteps", ("logit-normal", "shifted", "resolution-shifted"))
_BETA = ("timesteps", ("beta",))
_HUBER = ("loss", HUBER)


def _choice(default: str, choices: Mapping[str, Any] | tuple[str, ...], **more: Any) -> Any:
    more = {"before": default, **more}
    return option("objective", unset="auto", choices=tuple(choices), default=default, **more)


def _number(default: float, low: float, high: float, **more: Any) -> Any:
    more = {"before": default, **more}
    return option("objective", unset=type(low)(0), range=(low, high), default=default, **more)


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
        timestep_mode_scale: for "mode", from more at the ends to more in the middle.
        timestep_alpha, timestep_beta: exponents plus 1 of t and 1 - t in the density, for "beta".
        stratified: "on" to draw each of a batch's B timesteps from another B-th of the distribution.
        p2_gamma: exponent, for "P2".
        l1_fraction: part of the absolute error, for "MSE + L1".
        noise_offset_random_strength: "on" to draw each sample's offset strength between 0 and noise_offset, as kohya's
            sd-scripts do for each batch.
        adaptive_noise_scale: factor on the size of a channel's mean, which is added to noise_offset (sd-scripts).
        masked_prior_weight: weight of the distance from the frozen base's prediction outside the mask (OneTrainer).

    Raises:
        SettingsError: a value is out of range, or two values contradict each other.
    """

    timesteps: str = _choice("uniform", TIMESTEPS)
    min_timestep: int = _number(0, 0, 1000)
    max_timestep: int = _number(1000, 1, 1000)
    weighting: str = _choice("native", WEIGHTINGS)
    min_snr_gamma: float = _number(5.0, 0.0, 1000.0, needs=("weighting", ("min-SNR", "soft min-SNR")))
    loss: str = _choice("MSE", LOSSES)
    noise_offset: float = _number(0.0, 0.0, 1.0)
    input_perturbation: float = _number(0.0, 0.0, 1.0)
    pyramid_discount: float = _number(0.0, 0.0, 0.99)
    timestep_mean: float = _number(0.0, -10.0, 10.0, needs=_NORMAL)
    timestep_std: float = _number(1.0, 0.01, 10.0, needs=_NORMAL)
    timestep_shift: float = _number(3.0, 0.01, 100.0, needs=("timesteps", ("shifted",)))
    huber_c: float = _number(0.1, 1e-4, 1.0, needs=_HUBER)
    huber_schedule: str = _choice("auto", HUBER_SCHEDULES, needs=_HUBER)
    timestep_mode_scale: float = _number(1.29, -1.0, 1.75, needs=("timesteps", ("mode",)))
    timestep_alpha: float = _number(2.0, 0.01, 100.0, needs=_BETA)
    timestep_beta: float = _number(2.0, 0.01, 100.0, needs=_BETA)
    stratified: str = _choice("off", ("on", "off"))
    p2_gamma: float = _number(1.0, 0.01, 10.0, needs=("weighting", ("P2",)))
    l1_fraction: float = _number(0.5, 0.0, 1.0, needs=("loss", ("MSE + L1",)))
    noise_offset_random_strength: str = _choice("off", ("on", "off"))
    adaptive_noise_scale: float = _number(0.0, -10.0, 10.0)
    masked_prior_weight: float = _number(0.0, 0.0, 100.0)

    def __post_init__(self):
        for name, declared in OBJECTIVE_OPTIONS.items():
            value = getattr(self, name)
            if declared.choices and value not in declared.choices:
                raise SettingsError(f"Unknown {name} '{value}'.", f"Choose one of {', '.join(declared.choices)}.", name)
        for name, declared in OBJECTIVE_OPTIONS.items():
            declared.check_range(getattr(self, name), name)
        if self.min_timestep >= self.max_timestep:
            raise SettingsError(
                f"min_timestep {self.min_timestep} is not below max_timestep {self.max_timestep}.",
                "Widen the range in Graft Objective Options; 0 and 0 select all of it.",
                "min_timestep",
            )
        for name in ("noise_offset_random_strength", "adaptive_noise_scale"):
            if getattr(self, name) not in (0.0, "off") and not self.noise_offset:
                raise SettingsError(
                    f"{name} is set, but noise_offset is 0: it would have no effect.",
                    f"In Graft Objective Options set noise_offset, or leave {name} unset.",
                    name,
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
            if value != OBJECTIVE_OPTIONS[name].before or self._has(OBJECTIVE_OPTIONS[name].needs)
        }

    def kohya_metadata(self) -> dict[str, Any]:
        """Return the fields that kohya's metadata has, by its names without `ss_`. Fields not in use are None."""
        huber = self.loss in HUBER
        return {
            "noise_offset": self.noise_offset or None,
            "noise_offset_random_strength": True if self.noise_offset_random_strength == "on" else None,
            "adaptive_noise_scale": self.adaptive_noise_scale or None,
            "multires_noise_discount": self.pyramid_discount or None,
            "ip_noise_gamma": self.input_perturbation or None,
            "min_snr_gamma": self.min_snr_gamma if self.weighting == "min-SNR" else None,
            "debiased_estimation": True if self.weighting == "debiased" else None,
            "loss_type": {"MSE": "l2", "L1": "l1", "Huber": "huber", "smooth L1": "smooth_l1"}.get(self.loss),
            "huber_c": self.huber_c if huber else None,
            "huber_schedule": self.huber_schedule if huber else None,
        }

    def _has(self, needs: tuple[str, tuple[str, ...]] | None) -> bool:
        return needs is not None and getattr(self, needs[0]) in needs[1]

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


# Options by field.
OBJECTIVE_OPTIONS: dict[str, Option] = options_of(Objective)

# The model's own loss, uniform over all its levels.
NATIVE = Objective()


def objective_of(chosen: Mapping[str, Any]) -> Objective:
    """Build the objective from the fields that the user set.

    Raises:
        SettingsError: as Objective does, and for a field that would have no effect.
    """
    objective = Objective(**chosen)
    for name, declared in OBJECTIVE_OPTIONS.items():
        if declared.needs and name in chosen and not objective._has(declared.needs):
            other, choices = declared.needs
            raise SettingsError(
                f"{name} is set, but {other} is {getattr(objective, other)}: it would have no effect.",
                f"In Graft Objective Options set {other} to {' or '.join(choices)}, or leave {name} unset.",
                name,
            )
    return objective
