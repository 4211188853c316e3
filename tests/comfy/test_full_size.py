"""Work of a LoRA's step on networks of their published size, over the bare network's: counted without weights."""

from functools import partial

import pytest
import torch
from graft_pack.trainers.lowrank.deferred import Deferred
from torch.nn import functional

from benchmarks import full_size

pytestmark = pytest.mark.usefixtures("comfy")

# Most launches and bytes.
BARS = {
    ("SDXL", "attention"): (1.80, 1.15),
    ("SDXL", "linear + conv"): (2.30, 1.45),
    ("Flux", "attention"): (1.12, 1.10),
    ("Flux", "linear + conv"): (1.32, 1.18),
}
# The lists of equal blocks, by their attribute and length.
LISTS = {
    "SDXL": {"transformer_blocks": 10},
    "Flux": {"double_blocks": 19, "single_blocks": 38},
}


def shortened(module, name, count):
    """Cut a network's lists to `count` times the blocks that come to each block of the shortest list."""
    for part in list(module.modules()):
        for attribute, length in LISTS[name].items():
            blocks = getattr(part, attribute, ())
            if len(blocks) == length:
                setattr(part, attribute, blocks[: count * length // min(LISTS[name].values())])
    return module


def measure(name, count, monkeypatch):
    """Return (launches, bytes) by target of a network that is `shortened`."""
    network = full_size.network
    with monkeypatch.context() as patch:
        patch.setattr(full_size, "network", lambda *args: shortened(network(*args), name, count))
        rows = full_size.rows(name, 1024, 16, ["attention", "linear + conv"], torch.bfloat16)
        return {label.split(" (")[0]: (work.launches, work.bytes) for label, work in rows if "whole" not in label}


@pytest.mark.parametrize("name", LISTS)
def test_a_step_at_full_size_is_within_its_bars(name, monkeypatch):
    """The blocks of a list are alike: the counts with few of them give those with all."""
    one, two = (measure(name, count, monkeypatch) for count in (1, 2))
    steps = min(LISTS[name].values()) - 1
    whole = {row: [a + steps * (b - a) for a, b in zip(one[row], two[row], strict=True)] for row in one}
    for target in ("attention", "linear + conv"):
        launches, moved = (mine / bare for mine, bare in zip(whole[target], whole["bare"], strict=True))
        print(f"{name} {target}: {launches:.4f} launches, {moved:.4f} bytes")
        most_launches, most_bytes = BARS[name, target]
        assert launches <= most_launches
        assert moved <= most_bytes


@pytest.mark.parametrize("bias", [None, torch.randn(4)], ids=["matrix", "with a bias"])
def test_a_deferred_product_counts_as_any_other(bias):
    product = partial(functional.linear, torch.randn(2, 3, 5), torch.randn(4, 5), bias)
    with full_size.Work() as plain:
        product() * 2
    with full_size.Work() as work:
        Deferred(product, (2, 3, 4), torch.float32, torch.device("cpu")) * 2
    assert (work.launches, work.bytes, work.flops) == (plain.launches, plain.bytes, plain.flops) != (0, 0, 0)
