"""Tests that LyCORIS' own loader computes the variants of adapter types as they were trained."""

import pytest
from graft_pack.trainers.errors import ModelError

from tests.interop import makers

pytestmark = pytest.mark.usefixtures("comfy")

VARIANTS = [
    ("LoRA", "use_tucker=true", 4),
    ("LoHa", "use_tucker=true", 4),
    ("LoKr", "factor=2 full_matrix=true", 4),
    ("LoKr", "decompose_both=true", 1),
    ("LoKr", "use_tucker=true factor=2", 4),
    ("GLoRA", "", 4),
]


@pytest.mark.parametrize("kind, arguments, rank", VARIANTS)
@pytest.mark.parametrize("format", ["kohya", "LyCORIS"])
def test_lycoris_applies_what_was_trained(kind, arguments, rank, format, tmp_path):
    trained = makers.train("SD1", kind, "linear + conv", adapter_args=arguments, rank=rank)
    path = makers.save(trained.adapter, tmp_path, format)
    assert trained.error(makers.read_by_lycoris("SD1", path)) <= 1e-3


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_magnitudes_are_for_lycoris_if_the_model_is_known(kind, tmp_path):
    """A kohya file has magnitudes for ComfyUI's formula."""
    from graft_pack.nodes.host.actions.adapter_tools import restore_magnitudes

    trained = makers.train("SD1", kind, "linear + conv", adapter_args="dora_wd=true")
    with pytest.raises(ModelError, match="'LyCORIS'.*Connect the model"):
        makers.save(trained.adapter, tmp_path, "LyCORIS")
    restored = restore_magnitudes(trained.adapter, makers.FAMILIES["SD1"].model(), "LyCORIS")
    path = makers.save(restored, tmp_path, "LyCORIS")
    assert trained.error(makers.read_by_lycoris("SD1", path)) <= 1e-3
    assert trained.error(makers.read_by_graft("SD1", path)) <= 1e-3
