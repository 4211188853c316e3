"""Tests that kohya's metadata of a network agrees with the tensors of the file."""

import json

import pytest
import torch
from graft_pack.trainers.formats.kohya import network_fields

from tests.support import diffusers_host

CONV = {"targets": "linear + conv"}
# (method, other fields, module, arguments, rank, alpha) at rank 2 and alpha 4.
CASES = {
    "LoRA": ({}, "networks.lora", {}, 2, 4.0),
    "rsLoRA": ({}, "networks.lora", {}, 2, 4.0 * 2**0.5),
    "PiSSA": ({}, "networks.lora", {}, 4, 8.0),
    "DoRA": ({}, "networks.lora", {"dora_wd": "True"}, 2, 4.0),
    "LoRA with conv": (CONV, "lycoris.kohya", {"algo": "lora", "conv_dim": "2", "conv_alpha": "4.0"}, 2, 4.0),
    "LoHa": ({}, "lycoris.kohya", {"algo": "loha"}, 2, 4.0),
    "LoKr": ({}, "lycoris.kohya", {"algo": "lokr"}, 2, 2.0),
    "OFT": ({"alpha": 2.0}, "lycoris.kohya", {"algo": "full"}, 2, 2.0),
    "BOFT": ({"alpha": 2.0}, "lycoris.kohya", {"algo": "full"}, 2, 2.0),
}


@pytest.mark.parametrize("method", CASES)
def test_metadata_names_what_the_file_holds(method, tmp_path):
    fields, module, args, rank, alpha = CASES[method]
    fields = {"rank": 2, "alpha": 4.0, "steps": 1, **fields}
    adapter = diffusers_host.run_session(tmp_path, method=method, **fields).adapter
    assert adapter.metadata["ss_network_module"] == module
    assert json.loads(adapter.metadata["ss_network_args"]) == args
    assert int(adapter.metadata["ss_network_dim"]) == rank
    assert float(adapter.metadata["ss_network_alpha"]) == pytest.approx(alpha)
    downs = [value for name, value in adapter.items() if name.endswith("lora_down.weight")]
    assert all(down.shape[0] == rank for down in downs)
    if method == "LoKr":
        layers = {name.partition(".")[0] for name in adapter}
        assert all(float(adapter[f"{layer}.alpha"]) == rank for layer in layers), "LyCORIS cannot load it without"


def lora(name, rank, shape=(3,)):
    down, up = torch.zeros(rank, *shape), torch.zeros(5, rank, *[1] * (len(shape) - 1))
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}


@pytest.mark.parametrize(
    "outside", ["conv_in", "input_blocks_0_0", "time_embedding_linear_1", "out_2", "final_layer_1"]
)
def test_layers_that_sd_scripts_cannot_hold_make_a_file_of_lycoris(outside):
    inside = lora("lora_unet_down_blocks_0_resnets_0_conv1", 2, (3, 3, 3))
    assert network_fields(inside)["network_module"] == "networks.lora"
    fields = network_fields({**inside, **lora(f"lora_unet_{outside}", 2)})
    assert fields["network_module"] == "lycoris.kohya" and fields["network_args"]["algo"] == "lora"


def test_the_most_common_rank_of_the_denoiser_counts_and_convolutions_have_their_own():
    tensors = {}
    for number, rank in enumerate([2, 2, 8]):
        tensors |= lora(f"lora_unet_double_blocks_{number}_img_attn_qkv", rank)
    for number in range(9):
        tensors |= lora(f"lora_te1_text_model_encoder_layers_{number}_mlp_fc1", 16)
    tensors |= lora("lora_unet_down_blocks_0_resnets_0_conv1", 4, (3, 3, 3))
    fields = network_fields(tensors)
    assert (fields["network_dim"], fields["network_alpha"]) == (2, 1.0)
    assert fields["network_args"] == {"conv_dim": "4", "conv_alpha": "1.0"}
