"""Tests of merging against peft's own, on modules of peft."""

import copy
import json

import pytest
import torch
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.formats.adapter import Adapter
from graft_pack.trainers.formats.keys import common_name, split
from graft_pack.trainers.rng import stream_seed
from graft_pack.trainers.tools import merge
from graft_pack.trainers.tools.difference import difference
from graft_pack.trainers.tools.extract import resize
from graft_pack.trainers.tools.inspect import look
from graft_pack.trainers.tools.relative import differences
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.support import models

# Name in the file: module of the tiny network.
NAMES = {"lora_unet_a": "a", "lora_unet_b": "b"}
PEFT = {
    merge.SVD: "svd",
    merge.TIES: "ties_svd",
    merge.DARE: "dare_linear_svd",
    merge.DARE_TIES: "dare_ties_svd",
    merge.PRUNE: "magnitude_prune_svd",
}


class Net(nn.Module):
    """A Linear and a convolution."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 10)
        self.b = nn.Conv2d(4, 6, 3)


@pytest.fixture(scope="module")
def trained():
    """Return peft's model with two random adapters, and the same adapters in our format."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["a", "b"])
    net = get_peft_model(Net(), config, "one")
    net.add_adapter("two", LoraConfig(r=2, lora_alpha=1, target_modules=["a", "b"]))
    ours = []
    for name, alpha in (("one", 6.0), ("two", 1.0)):
        tensors = {}
        for place, module in NAMES.items():
            layer = net.base_model.model.get_submodule(module)
            with torch.no_grad():
                layer.lora_B[name].weight.normal_()
            tensors[f"{place}.lora_down.weight"] = layer.lora_A[name].weight.detach().clone()
            tensors[f"{place}.lora_up.weight"] = layer.lora_B[name].weight.detach().clone()
            tensors[f"{place}.alpha"] = torch.tensor(alpha)
        ours.append(Adapter(tensors, {"modelspec.title": name}))
    return net, ours


def value_of(adapter, name):
    layers, _ = split(adapter)
    return difference(name, layers[name], "").value()


@pytest.mark.parametrize("method", PEFT)
def test_it_is_what_peft_makes(trained, method):
    """At full rank, peft's factors hold its whole merged matrix; DARE gets the same draws."""
    net, (a, b) = trained
    how = merge.Merging((0.7, -0.4), method, 0, 0.4)
    found = merge.merge(a, b, how)
    for place, module in NAMES.items():
        layer = net.base_model.model.get_submodule(module)
        rank = min(layer.weight.shape[0], layer.weight[0].numel())
        with torch.no_grad():
            torch.manual_seed(stream_seed("merge", how.seed, *common_name(place)))
            up, down = layer_merged(net, layer, PEFT[method], rank)
        expected = (down.flatten(1) @ up.flatten(1)).view(layer.weight.shape)
        assert models.distance(value_of(found, place), expected) <= 1e-5, place


def layer_merged(net, layer, kind, rank):
    """Return a layer's (A, B) by the function behind `LoraModel.add_weighted_adapter`."""
    shape = layer.weight.shape
    # peft elects signs before it weights: the negative weight is folded into the second adapter here.
    folded = copy.deepcopy(layer)
    folded.lora_B["two"].weight.data.neg_()
    down, up = torch.empty(rank, *shape[1:]), torch.empty(shape[0], rank, *[1] * (len(shape) - 2))
    return net.base_model._svd_generalized_task_arithmetic_weighted_adapter(
        kind, ["one", "two"], [0.7, 0.4], rank, folded, down, up, 0.4, "total", full_matrices=False
    )


@pytest.mark.parametrize("method", merge.METHODS)
def test_a_rank_keeps_the_best_of_it(trained, method):
    _, (a, b) = trained
    whole = merge.merge(a, b, merge.Merging((1.0, 0.5), method, 0, 0.5, 3))
    small = merge.merge(a, b, merge.Merging((1.0, 0.5), method, 2, 0.5, 3))
    for place in NAMES:
        u, s, v = torch.linalg.svd(value_of(whole, place).flatten(1), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        assert small[f"{place}.lora_down.weight"].shape[0] == 2
        assert models.distance(value_of(small, place).flatten(1), best) <= 1e-4
    # Factors of a convolution have its kernel shape, as readers expect.
    assert small["lora_unet_b.lora_down.weight"].shape[1:] == (4, 3, 3)
    assert small["lora_unet_b.lora_up.weight"].shape == (6, 2, 1, 1)


def test_lora_and_lora_lie_side_by_side(trained):
    """Only the weight and the scale are computed anew."""
    _, (a, b) = trained
    found = merge.merge(a, b, merge.Merging((1.0, 0.5)))
    for place in NAMES:
        down = found[f"{place}.lora_down.weight"]
        assert torch.equal(down, torch.cat([one[f"{place}.lora_down.weight"] for one in (a, b)]))
        assert float(found[f"{place}.alpha"]) == 5.0
        expected = value_of(a, place) + 0.5 * value_of(b, place)
        assert models.distance(value_of(found, place), expected) <= 1e-6
    assert found.metadata["ss_network_dim"] == "5"


def test_svd_has_the_smallest_rank(trained):
    """Shared directions appear once: an adapter merged with itself keeps its rank."""
    _, (a, b) = trained
    twice = merge.merge(a, a, merge.Merging((0.5, 0.25), merge.SVD))
    apart = merge.merge(a, b, merge.Merging((0.5, 0.25), merge.SVD))
    for place in NAMES:
        assert twice[f"{place}.lora_down.weight"].shape[0] == 3
        assert apart[f"{place}.lora_down.weight"].shape[0] == 5
        assert models.distance(value_of(twice, place), 0.75 * value_of(a, place)) <= 1e-5


def test_a_layer_of_one_alone_is_taken_at_its_weight(trained):
    _, (a, b) = trained
    only = Adapter({name: value for name, value in b.items() if name.startswith("lora_unet_b")})
    for method in (merge.SUM, merge.TIES):
        found = merge.merge(a, only, merge.Merging((2.0, 1.0), method, density=1.0))
        assert models.distance(value_of(found, "lora_unet_a"), 2.0 * value_of(a, "lora_unet_a")) <= 1e-6


def test_dare_draws_by_its_seed(trained):
    _, (a, b) = trained
    made = [merge.merge(a, b, merge.Merging((1.0, 1.0), merge.DARE, 0, 0.5, seed)) for seed in (1, 1, 2)]
    state = torch.random.get_rng_state()
    merge.merge(a, b, merge.Merging((1.0, 1.0), merge.DARE))
    assert torch.equal(torch.random.get_rng_state(), state)
    one, again, other = (models.joined(found[name] for name in sorted(found)) for found in made)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_names_of_one_layer_are_the_same_layer():
    """kohya, ComfyUI, diffusers and peft name layers differently; merged by name, the host would apply one of two."""
    alike = [
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ]
    assert len({common_name(name) for name in alike}) == 1
    text = [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    ]
    assert len({common_name(name) for name in text}) == 1
    oldest = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out"
    newest = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert common_name(oldest) == common_name(newest)
    down, up = torch.randn(2, 4), torch.randn(3, 2)
    a = Adapter({f"{alike[0]}.lora_down.weight": down, f"{alike[0]}.lora_up.weight": up})
    b = Adapter({f"{alike[1]}.lora_A.weight": down, f"{alike[1]}.lora_B.weight": up})
    found = differences(merge.merge(a, b, merge.Merging((1.0, 1.0))), "")
    assert list(found) == alike[:1]
    assert models.distance(found[alike[0]].value(), 2 * up @ down) <= 1e-6


def test_where_it_comes_from_is_in_its_metadata(trained):
    _, (a, b) = trained
    said = {"modelspec.trigger_phrase": "dog", "modelspec.architecture": "flux-1/lora", "graft_recipe": "{}"}
    a = Adapter(a, {**a.metadata, **said, "ss_steps": "100"})
    b = Adapter(b, {**b.metadata, **said, "modelspec.trigger_phrase": "cat", "ss_steps": "200"})
    found = merge.merge(a, b, merge.Merging((1.0, 0.5), merge.TIES, 0, 0.3)).metadata
    assert found["modelspec.trigger_phrase"] == "dog, cat"
    assert found["modelspec.architecture"] == "flux-1/lora"
    assert not {"ss_steps", "graft_recipe", "modelspec.title"} & found.keys()
    made = json.loads(found["graft_made"])
    assert (made["tool"], made["method"], made["weights"], made["density"]) == ("merge", "TIES", [1.0, 0.5], 0.3)
    assert [one["title"] for one in made["of"]] == ["one", "two"]


def layer(name, out, inputs):
    return {f"{name}.lora_down.weight": torch.ones(2, inputs), f"{name}.lora_up.weight": torch.ones(out, 2)}


@pytest.mark.parametrize(
    "a, b, named",
    [
        (
            layer("lora_unet_x", 4, 3),
            layer("lora_unet_x", 4, 5),
            r"layer lora_unet_x has the shape \[4, 3\] in adapter_a and \[4, 5\] in adapter_b",
        ),
        ({"x.diff_b": torch.ones(3)}, {"x.diff_b": torch.ones(4)}, r"layer x has the shape \[3\] in adapter_a"),
        (layer("lora_unet_input_blocks_1_q", 4, 3), layer("lora_unet_double_blocks_1_q", 4, 3), "Flux's own"),
        (
            layer("lora_unet_input_blocks_1_q", 4, 3),
            layer("lora_unet_down_blocks_1_q", 4, 3),
            "different ways .adapter_a as the UNet's own, adapter_b as a UNet in diffusers",
        ),
        ({**layer("x", 4, 3), "x.dora_scale": torch.ones(4, 1)}, layer("x", 4, 3), "layer x holds DoRA magnitudes"),
        (layer("x", 4, 3), {"x.oft_blocks": torch.ones(2, 2, 2)}, "x holds rotations.*Graft Extract Adapter"),
        (layer("x", 4, 3), {"x.lora_down.weight": torch.ones(2, 2)}, "layer x is incomplete"),
        (layer("x", 4, 3), {**layer("x", 4, 3), "x.lora_up.weight": torch.ones(4, 3)}, "layer x is incomplete"),
        (layer("x", 4, 3), {"x.what": torch.ones(2)}, "has unknown keys, such as x.what"),
        (layer("x", 4, 3), {}, "The adapter is empty"),
    ],
    ids=["size", "bias", "family", "layout", "DoRA", "OFT", "half", "torn", "key", "empty"],
)
def test_what_cannot_be_merged_is_refused_by_name(a, b, named):
    with pytest.raises(ModelError, match=named) as caught:
        merge.merge(Adapter(a), Adapter(b), merge.Merging((1.0, 1.0)))
    assert caught.value.input in ("adapter_a", "adapter_b")
    assert caught.value.cure


def test_adapters_that_say_what_they_are_for_are_believed():
    a, b = (Adapter(layer("x", 4, 3), {"modelspec.architecture": f"{kind}/lora"}) for kind in ("flux-1", "sd-v1"))
    with pytest.raises(ModelError, match="adapter_a was made for flux-1, adapter_b for sd-v1"):
        merge.merge(a, b, merge.Merging((1.0, 1.0)))


def test_settings_that_leave_nothing_are_refused():
    with pytest.raises(SettingsError, match="Both weights are 0"):
        merge.Merging((0.0, 0.0))
    with pytest.raises(SettingsError, match="density is 0"):
        merge.Merging((1.0, 1.0), merge.TIES, density=0.0)


@pytest.mark.parametrize("method", [merge.TIES, merge.DARE_TIES])
@pytest.mark.parametrize("weights", [(1.0, -1.0), (-0.5, 0.75), (-1.0, -2.0)])
def test_negative_weights_take_part_in_the_election(trained, method, weights):
    """The result equals that of a positive weight on the negated adapter."""
    a, b = trained[1]
    turned = [
        Adapter({name: -value if weight < 0 and ".lora_up" in name else value for name, value in one.items()})
        for one, weight in zip((a, b), weights, strict=True)
    ]
    found = merge.merge(a, b, merge.Merging(weights, method, 0, 0.6, 3))
    expected = merge.merge(*turned, merge.Merging(tuple(map(abs, weights)), method, 0, 0.6, 3))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    if weights == (1.0, -1.0) and method == merge.TIES:
        same = merge.merge(a, a, merge.Merging(weights, method, 0, 1.0, 3))
        for name in NAMES:
            whole = value_of(a, name)
            # The sum of x and -x is 0, and a tie goes to the positive value.
            torch.testing.assert_close(value_of(same, name), whole.abs())


LARGE = 60_000


@pytest.mark.parametrize("method", [merge.TIES, merge.DARE, merge.DARE_TIES, merge.PRUNE])
def test_products_larger_than_any_layer_are_refused(method):
    given = Adapter({"x.lora_up.weight": torch.ones(LARGE, 1), "x.lora_down.weight": torch.ones(1, LARGE)})
    with pytest.raises(ModelError, match=r"layer x has the shape \[60000, 60000\]: its difference would take 14.4 GB"):
        merge.merge(given, given, merge.Merging((1.0, 1.0), method))


@pytest.mark.parametrize(
    "tensors",
    [
        {
            "hada_w1_a": (LARGE, 1),
            "hada_w1_b": (1, LARGE),
            "hada_w2_a": (LARGE, 1),
            "hada_w2_b": (1, LARGE),
        },
        {"lokr_w1": (300, 300), "lokr_w2": (200, 200)},
        {"lokr_w1": (1, 1), "lokr_w2_a": (LARGE, 1), "lokr_w2_b": (1, LARGE)},
        {
            "hada_t1": (LARGE, 1, 1, 1),
            "hada_w1_a": (LARGE, 1),
            "hada_w1_b": (1, LARGE),
            "hada_t2": (1, 1, 1, 1),
            "hada_w2_a": (1, 1),
            "hada_w2_b": (1, LARGE),
        },
        {
            "lokr_w1": (1, 1),
            "lokr_w2_a": (LARGE, 1),
            "lokr_w2_b": (1, LARGE),
            "lokr_t2": (LARGE, 1, 1, 1),
        },
        {"lora_up.weight": (4, 4), "lora_mid.weight": (LARGE, 1, 1, 1), "lora_down.weight": (1, LARGE)},
    ],
)
def test_large_products_of_every_layout_are_refused(tensors):
    given = {f"x.{end}": torch.ones(shape) for end, shape in tensors.items()}
    with pytest.raises(ModelError, match=r"\[60000, 60000.*\]: its difference would take 14.4 GB"):
        differences(given, "adapter")


def test_a_norm_takes_no_more_memory_than_factors_and_product():
    """A rank far above the layer's sides gives small products of large factors."""
    source = torch.Generator().manual_seed(0)
    up, down = torch.randn(1, LARGE, generator=source), torch.randn(LARGE, 1, generator=source)
    (row,) = look({"x.lora_up.weight": up, "x.lora_down.weight": down}).rows
    assert row.norm == pytest.approx(float((up.double() @ down.double()).abs()), rel=1e-3)


def test_large_factors_are_resized_without_their_product():
    given = Adapter({"x.lora_up.weight": torch.ones(LARGE, 2), "x.lora_down.weight": torch.ones(2, LARGE)})
    assert resize(given, 1, 1.0)["x.lora_up.weight"].shape == (LARGE, 1)
