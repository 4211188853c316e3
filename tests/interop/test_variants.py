"""Tests that LyCORIS' own loader computes the variants of adapter types as they were trained."""

import pytest
from graft_pack.trainers.errors import ModelError
from safetensors import safe_open

from tests.interop import makers

pytestmark = pytest.mark.usefixtures("comfy")

VARIANTS = [
    ("LoRA", "use_tucker=true", 4),
    ("LoHa", "use_tucker=true", 4),
    ("LoKr", "factor=2 full_matrix=true", 4),
    ("LoKr", "decompose_both=true", 1),
    ("LoKr", "use_tucker=true factor=2", 4),
    ("GLoRA", "", 4),
    ("LoRA", "train_norm=true", 4),
    ("GLoRA", "train_norm=true", 4),
    ("LoKr", "train_norm=true", 4),
]


@pytest.mark.parametrize("kind, arguments, rank", VARIANTS)
@pytest.mark.parametrize("format", ["kohya", "LyCORIS"])
def test_lycoris_applies_what_was_trained(kind, arguments, rank, format, tmp_path):
    trained = makers.train("SD1", kind, "linear + conv", adapter_args=arguments, rank=rank)
    path = makers.save(trained.adapter, tmp_path, format)
    assert trained.error(makers.read_by_lycoris("SD1", path)) <= 1e-3


@pytest.mark.parametrize(
    "family, arguments, named",
    [
        ("SD1", "train_bias=true", "changes a bias, for which LyCORIS has no place"),
        ("SD3", "train_norm=true", "is a norm without a bias, which LyCORIS does not know"),
        ("Flux", "train_norm=true", "is a norm without a bias, which LyCORIS does not know"),
    ],
)
def test_what_lycoris_has_no_place_for_is_refused_by_name(family, arguments, named, tmp_path):
    """Its norms are LayerNorm and GroupNorm."""
    trained = makers.train(family, "LoRA", adapter_args=arguments)
    with pytest.raises(ModelError, match=f"as 'LyCORIS': its layer .* {named}"):
        makers.save(trained.adapter, tmp_path, "LyCORIS")
    for format in ("peft", "diffusers"):
        with pytest.raises(ModelError, match=f"as '{format}': .* peft has (no form|one for all or none)"):
            makers.save(trained.adapter, tmp_path, format)
    path = makers.save(trained.adapter, tmp_path, "kohya")
    assert trained.error(makers.read_by_comfyui(family, path)) <= 1e-3
    assert trained.error(makers.read_by_graft(family, path)) <= 1e-3


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_peft_has_biases_of_all_layers(format, tmp_path):
    """It scales them as B."""
    trained = makers.train("Flux", "LoRA", "attention + feed-forward", adapter_args="train_bias=true")
    path = makers.save(trained.adapter, tmp_path, format)
    assert trained.error(makers.READERS[format]("Flux", path)) <= 1e-3


def test_a_file_with_norms_says_that_lycoris_reads_it(tmp_path):
    """Layers within the blocks alone would be for sd-scripts' own network, which leaves norms out."""
    trained = makers.train("SD1", "LoRA", "attention", adapter_args="train_norm=true")
    with safe_open(str(makers.save(trained.adapter, tmp_path, "kohya")), "pt") as file:
        assert file.metadata()["ss_network_module"] == "lycoris.kohya"


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
