"""Every class of models that the host loads: it trains with exact gradients, or it is named with the reason."""

import math

import pytest
import torch
from graft_pack.trainers.check import check_gradient
from graft_pack.trainers.errors import ModelError

from tests.support import make_families, models, networks

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def row(name):
    """What was measured on a class, once for all tests here."""
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    return make_families.measure(name)


every_class = pytest.mark.parametrize("name", networks.CLASSES)


def test_no_class_of_the_host_is_left_out_silently(comfy):
    """A class of a newer host fails here until it is trained or named."""
    here = set(make_families.list_classes())
    groups = [set(networks.CLASSES), set(networks.ALIKE), set(networks.LEFT_OUT)]
    assert here - set.union(*groups) == set()
    assert sum(map(len, groups)) == len(set.union(*groups)), "named twice"
    assert set(networks.REFUSED) <= set(networks.LEFT_OUT)


@pytest.mark.parametrize("name", networks.ALIKE)
def test_what_is_said_to_differ_in_sizes_only_does(name, comfy):
    """The host makes the same model of it, with the same objective and the same latents."""
    import comfy.supported_models

    one = getattr(comfy.supported_models, name)
    other = getattr(comfy.supported_models, networks.ALIKE[name])
    for part in ("get_model", "model_type", "latent_format", "sampling_settings", "unet_extra_config"):
        assert getattr(one, part) == getattr(other, part), part


@every_class
def test_gradients_are_those_of_finite_differences(name, row):
    bar = 1e-5 if networks.CLASSES[name].double else 1e-3
    assert row.plain <= bar
    assert row.checkpointed <= bar
    assert row.apart <= 1e-6


@every_class
def test_it_learns_three_steps_and_core_applies_what_was_trained(name, row):
    assert len(row.losses) == 3
    assert all(map(math.isfinite, row.losses))
    assert row.effect >= 1e-2
    assert row.applied <= 1e-3
    assert row.unread == []


@pytest.mark.parametrize("name", networks.REFUSED)
def test_what_cannot_be_trained_is_refused(name):
    """Before the first step: when it is loaded, or by the self-check, which runs on what is not described."""
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    with pytest.raises(ModelError, match="IMG_TO_IMG|LongCatImage does more around|No gradient can be had"):
        with models.in_training(make_families.load(name, torch.float32), name) as training:
            check_gradient(training.losses, training.plan.trainables)


def test_readme_has_the_table_of_exactly_these_classes():
    page = make_families.README.read_text(encoding="utf-8")
    assert list(make_families.read_rows(page)) == list(networks.CLASSES)
    for name in (*networks.ALIKE, *networks.LEFT_OUT):
        assert f"`{name}`" in page, name
