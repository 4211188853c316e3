"""Tests of the host's own networks with sharded block weights: each block runs by its own call, with exact results."""

import pytest
import torch
from graft_pack.trainers.distributed.fsdp import ShardedWeights
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.recipe.options import BASE_DTYPES
from torch import distributed

from docs.build import make_families
from tests.support import models, networks

pytestmark = pytest.mark.usefixtures("comfy")


class Lone:
    """A group of one process, whose shard is the whole; a block's weights are still absent except during its call."""

    leads = True
    device = torch.device("cpu")

    def __init__(self):
        self.asked = []

    def broadcast_int(self, number):
        self.asked.append(number)

    def gather_shares(self, whole, share, processes, asynchronous):
        distributed.all_gather_single(whole, share, group=processes)


@pytest.fixture(scope="module", autouse=True)
def connected():
    """Set up torch's own process group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", networks.CLASSES)
def test_the_gradient_is_that_of_the_whole_network(name):
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    model = models.patcher(name)
    with models.in_training(model, name, spread=0.05, examples=1) as training:
        whole = models.joined(training.gradients())
    checkpointing = len(name) % 2 == 0
    with models.in_training(model, name, checkpointing=checkpointing, spread=0.05, examples=1) as training:
        ShardedWeights(training.denoiser.module, training.plan.trainables.values(), Lone(), needs_input_grad=False)
        for _ in range(2):
            assert models.distance(models.joined(training.gradients()), whole) <= 1e-6


class Odd(torch.nn.Parameter):
    """A weight that is more than its values, as quantized ones are."""


class Block(torch.nn.Module):
    def __init__(self, shared, outer):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.shared, self.outer = shared, outer
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.odd = Odd(torch.ones(8))

    def forward(self, x):
        return self.outer(self.shared(self.linear(x))) * self.scale * self.odd


class Tree(torch.nn.Module):
    def __init__(self):
        super().__init__()
        shared, self.outer = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.blocks = torch.nn.ModuleList([Block(shared, self.outer), Block(shared, self.outer)])
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.outer(x)


def test_what_is_not_a_blocks_own_plain_weight_stays_whole():
    tree = Tree()
    tree.blocks[1].linear.bias.requires_grad_()
    kept = tree.blocks[0].linear.bias
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = tree(x)
    shards = ShardedWeights(tree, [kept], Lone(), needs_input_grad=False)
    assert (shards.blocks, shards.divided) == (2, 2 * 8 * 8 * 4)
    assert {name for name, one in tree.named_parameters() if hasattr(one, "full_tensor")} == {
        "blocks.0.linear.weight",
        "blocks.1.linear.weight",
    }
    assert torch.allclose(tree(x), expected)


def test_a_model_without_blocks_is_named():
    with pytest.raises(ModelError, match="Linear. has no blocks to shard. Set shard"):
        ShardedWeights(torch.nn.Linear(8, 8), [], Lone(), needs_input_grad=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_in_half_precision_or_eight_bits_are_shared_out_as_they_are(dtype):
    """With norms and biases in another dtype beside them, as in 8-bit files."""
    model = models.patcher("Flux")
    for one in model.model.diffusion_model.parameters():
        if one.dim() > 1:
            one.data = one.data.to(dtype)
    with models.in_training(model, "Flux", spread=0.05, examples=1, compute_dtype="fp32") as training:
        whole = models.joined(training.gradients())
        shards = ShardedWeights(
            training.denoiser.module, training.plan.trainables.values(), Lone(), needs_input_grad=False
        )
        assert shards.divided > 0 == shards.whole
        assert models.distance(models.joined(training.gradients()), whole) <= 1e-6


@pytest.mark.parametrize(
    "fields",
    [*({"base_dtype": base_dtype} for base_dtype in BASE_DTYPES), {"adapter_args": (("train_norm", True),)}],
    ids=str,
)
def test_quantized_weights_and_changed_norms_are_shared_out_as_they_are(fields):
    with models.in_training(models.patcher("SD3"), "SD3", spread=0.05, examples=1, **fields) as training:
        whole = models.joined(training.gradients())
        shards = ShardedWeights(
            training.denoiser.module, training.plan.trainables.values(), Lone(), needs_input_grad=False
        )
        assert shards.divided > 0 == shards.whole
        assert models.distance(models.joined(training.gradients()), whole) <= 1e-6
