"""Tests of the options of an objective, and of refusals that name the input."""

import re
from dataclasses import fields

import pytest
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.objective.losses import LOSSES
from graft_pack.trainers.objective.options import NATIVE, OBJECTIVE_OPTIONS, Objective, objective_of
from graft_pack.trainers.objective.timesteps import TIMESTEPS
from graft_pack.trainers.objective.weighting import WEIGHTINGS

from tests.support.host import ROOT


def test_nothing_chosen_is_native():
    assert objective_of({}) == NATIVE
    assert NATIVE.set_fields() == {}
    for kind in ("eps", "v", "edm", "x0", "flow"):
        NATIVE.check(kind)


def test_every_field_is_declared_as_an_option_with_a_range_or_choices():
    assert list(OBJECTIVE_OPTIONS) == [field.name for field in fields(Objective)]
    assert all(option.choices or option.range for option in OBJECTIVE_OPTIONS.values())
    assert all(option.default == option.before for option in OBJECTIVE_OPTIONS.values())


@pytest.mark.parametrize("name", [name for name, option in OBJECTIVE_OPTIONS.items() if option.range])
def test_what_is_out_of_range_is_refused_by_name(name):
    low, high = OBJECTIVE_OPTIONS[name].range
    for value in (low - 1, high + 1):
        with pytest.raises(SettingsError, match=f"{name} is {value}") as caught:
            Objective(**{name: value})
        assert caught.value.input == name


@pytest.mark.parametrize("name", ["timesteps", "weighting", "loss", "huber_schedule", "stratified"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(SettingsError, match=f"Unknown {name} 'odd'") as caught:
        Objective(**{name: "odd"})
    assert caught.value.input == name


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(SettingsError, match="min_timestep 500 is not below max_timestep 500"):
        Objective(min_timestep=500, max_timestep=500)


def test_a_pyramid_with_an_offset_is_refused():
    with pytest.raises(SettingsError, match="pyramid_discount and noise_offset") as caught:
        objective_of({"pyramid_discount": 0.3, "noise_offset": 0.05})
    assert caught.value.input == "noise_offset"


@pytest.mark.parametrize("field", [{"noise_offset_random_strength": "on"}, {"adaptive_noise_scale": 0.1}])
def test_a_change_of_an_offset_that_is_not_there_is_refused(field):
    with pytest.raises(SettingsError, match="noise_offset is 0: it would have no effect") as caught:
        objective_of(field)
    assert caught.value.input == next(iter(field))
    assert objective_of({**field, "noise_offset": 0.05}).set_fields() == {**field, "noise_offset": 0.05}


@pytest.mark.parametrize("weighting", ["min-SNR", "debiased", "soft min-SNR", "P2", "EDM"])
def test_signal_to_noise_weights_are_refused_on_flow_and_right_on_the_rest(weighting):
    objective = Objective(weighting=weighting)
    for kind in ("eps", "v", "edm", "x0"):
        objective.check(kind)
    with pytest.raises(SettingsError, match="this one predicts flow.*native or sigma_sqrt or cosmap") as caught:
        objective.check("flow")
    assert caught.value.input == "weighting"


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_weights_of_flow_are_refused_on_the_rest(weighting):
    Objective(weighting=weighting).check("flow")
    with pytest.raises(SettingsError, match="made for flow models; this one predicts v.*min-SNR"):
        Objective(weighting=weighting).check("v")


def test_every_weighting_fits_some_model():
    assert all(known.fits("flow") or known.fits("eps") for known in WEIGHTINGS.values())


def test_hubers_width_by_signal_to_noise_is_refused_on_flow():
    Objective(loss="Huber", huber_schedule="snr").check("v")
    Objective(loss="Huber").check("flow")
    with pytest.raises(SettingsError, match="which flow models do not have") as caught:
        Objective(loss="Huber", huber_schedule="snr").check("flow")
    assert caught.value.input == "huber_schedule"


def test_the_page_of_sources_has_a_test_for_every_choice():
    page = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| .+? \| `(\w+\.py)`: `(\w+)` \|$", page, re.M)
    named = [name for entry, _, _ in rows for name in re.findall(r"`(.+?)`", entry)]
    # cosmap is a distribution and a weighting.
    for registry in (TIMESTEPS, WEIGHTINGS, LOSSES):
        assert not [name for name in registry if name not in named]
    assert len(named) == len(set(named)) + 1
    for _, file, name in rows:
        assert f"def {name}(" in (ROOT / "tests/unit/objective" / file).read_text(encoding="utf-8"), name
