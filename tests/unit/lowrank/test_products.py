"""Tests of the products of a frozen layer and its adapter, against autograd's own operations and finite differences."""

import pytest
import torch
from graft_pack.trainers.lowrank import products
from graft_pack.trainers.lowrank.layers import LowRankLayer, StepWeights, cast_by_block, grouping, low_rank_layers
from graft_pack.trainers.memory import compilation
from graft_pack.trainers.memory.checkpointing import checkpoint_blocks
from torch import nn
from torch.nn import functional

from tests.support import counting

SOURCE = torch.Generator()
convolve = products._convolve
CHECKPOINTED = pytest.mark.parametrize("checkpointed", [False, True], ids=["whole", "checkpointed"])
DEVICES = pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU's way", "GPU's way"])


@pytest.fixture(autouse=True)
def seeded():
    SOURCE.manual_seed(0)


def random(*shape, grad=True):
    return torch.randn(shape, generator=SOURCE, dtype=torch.float64).requires_grad_(grad)


def frozen(kind, *args, **fields):
    return kind(*args, **fields).double().requires_grad_(False)


def block_of(call, checkpointed):
    """Return the forward of a block that calls `call`."""
    block = nn.Module()
    block.forward = call
    if checkpointed:
        checkpoint_blocks([block])
    return block.forward


@DEVICES
@CHECKPOINTED
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("needs_x", [True, False])
def test_gradients_of_linear_layers_are_those_of_finite_differences(count, needs_x, checkpointed, on_cpu, monkeypatch):
    monkeypatch.setattr(products, "is_on_cpu", lambda tensor: on_cpu)
    layers = [frozen(nn.Linear, 6, 4 + number, bias=number != 1) for number in range(count)]
    x, down = random(2, 3, 6, grad=needs_x), random(2 * count, 6)
    ups = [random(4 + number, 2) for number in range(count)]
    scales = [0.5 + number for number in range(count)]

    def call(x, down, *ups):
        return tuple(products.linear(x, down, ups, scales, [layer._parameters for layer in layers]))

    for out, layer, a, b, scale in zip(call(x, down, *ups), layers, down.split(2), ups, scales, strict=True):
        assert torch.allclose(out, layer(x) + scale * functional.linear(functional.linear(x, a), b), rtol=1e-12)
    assert torch.autograd.gradcheck(block_of(call, checkpointed), (x, down, *ups))


@CHECKPOINTED
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_by_one_product_for_all_weights_are_those_of_finite_differences(count, checkpointed, monkeypatch):
    monkeypatch.setattr(products, "is_on_cpu", lambda tensor: False)
    layers = [frozen(nn.Linear, 24, 2 + number) for number in range(count)]
    x, down, ups = random(12, 24), random(8 * count, 24), [random(2 + number, 8) for number in range(count)]

    def call(x, down, *ups):
        return torch.cat(products.linear(x, down, ups, [0.5] * count, [layer._parameters for layer in layers]), -1)

    shapes = []
    product = torch.Tensor.mm
    monkeypatch.setattr(torch.Tensor, "mm", lambda one, other: shapes.append(other.shape) or product(one, other))
    assert torch.autograd.gradcheck(block_of(call, checkpointed), (x, down, *ups))
    assert (sum(len(up) for up in ups) + len(down), 24) in shapes


@CHECKPOINTED
def test_an_output_that_is_not_used_adds_no_gradient(checkpointed):
    layers = [frozen(nn.Linear, 6, 4) for _ in range(2)]
    x, down, ups = random(3, 6), random(4, 6), [random(4, 2), random(4, 2)]
    call = block_of(products.linear, checkpointed)
    first, _ = call(x, down, ups, [1.0, 1.0], [layer._parameters for layer in layers])
    first.square().sum().backward()
    alone = [one.detach().clone().requires_grad_() for one in (x, down[:2], ups[0])]
    (layers[0](alone[0]) + functional.linear(functional.linear(alone[0], alone[1]), alone[2])).square().sum().backward()
    assert torch.allclose(x.grad, alone[0].grad, rtol=1e-12)
    assert torch.allclose(down.grad[:2], alone[1].grad, rtol=1e-12)
    assert not down.grad[2:].any()
    assert ups[1].grad is None


@CHECKPOINTED
@pytest.mark.parametrize("count", [1, 2])
def test_outputs_may_be_written_into(count, checkpointed):
    layers = [frozen(nn.Linear, 6, 4) for _ in range(count)]
    x, down, ups = random(2, 3, 6), random(2 * count, 6), [random(4, 2) for _ in layers]

    def call(x, down, *ups):
        outputs = products.linear(x, down, ups, [1.0] * count, [layer._parameters for layer in layers])
        for output in outputs:
            output[0, :2] = output[0, :2] * 2
        return tuple(outputs)

    assert torch.autograd.gradcheck(block_of(call, checkpointed), (x, down, *ups))


@pytest.mark.parametrize("count", [1, 2])
def test_a_convolutions_output_may_be_written_into(count):
    layer, x, down, up = (
        frozen(nn.Conv2d, 3, 4, 3, 1, 1),
        random(count, 3, 4, 4),
        random(2, 3, 3, 3),
        random(4, 2, 1, 1),
    )

    def call(x, down, up):
        output = products.convolution(x, down, up, 1.0, layer)
        output[0, :2] = output[0, :2] * 2
        return output

    assert torch.autograd.gradcheck(call, (x, down, up))


@CHECKPOINTED
def test_a_second_derivative_is_refused(checkpointed):
    x, down, up = random(3, 6), random(2, 6), random(4, 2)
    call = block_of(products.linear, checkpointed)
    (out,) = call(x, down, [up], [1.0], [frozen(nn.Linear, 6, 4)._parameters])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)


@DEVICES
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("width, kernel, stride, padding", [(3, 1, 1, 0), (3, 3, 1, 1), (3, 3, 2, 1), (6, 3, 1, 1)])
def test_gradients_of_a_convolution_are_those_of_finite_differences(
    width, kernel, stride, padding, needs_x, on_cpu, monkeypatch
):
    monkeypatch.setattr(products, "is_on_cpu", lambda tensor: on_cpu)
    layer = frozen(nn.Conv2d, width, 4, kernel, stride, padding)
    x, down, up = random(2, width, 5, 5, grad=needs_x), random(2, width, kernel, kernel), random(4, 2, 1, 1)

    def call(x, down, up):
        return products.convolution(x, down, up, 0.5, layer)

    expected = layer(x) + 0.5 * functional.conv2d(functional.conv2d(x, down, None, stride, padding), up)
    assert torch.allclose(call(x, down, up), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(call, (x, down, up))


class Block(nn.Module):
    """Attention's projections as networks call them: q, k and v of one tensor, or k and v of another."""

    def __init__(self, rank=2, drop=0.0):
        super().__init__()
        for name in ("q", "k", "v", "out"):
            layer = nn.Module()
            base, down, up = (frozen(nn.Linear, *sizes) for sizes in ((6, 6), (6, rank), (rank, 6)))
            down.weight.requires_grad_(True)
            up.weight.requires_grad_(True)
            layer.low_rank = LowRankLayer(base, down, up, nn.Dropout(drop) if drop else nn.Identity(), 0.5)
            layer.forward = layer.low_rank
            setattr(self, name, layer)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.q(x), self.k(context), self.v(context)
        return self.out(q * k + v)

    def groups(self):
        layers = {vars(layer)["low_rank"]: name for name, layer in self.named_children()}
        return sorted("".join(layers[one] for one in group.layers) for group in {one.group for one in layers})


def gradients(block, *inputs):
    weights = [part.weight for layer in low_rank_layers(block).values() for part in (layer.down, layer.up)]
    return torch.autograd.grad(block(*inputs).square().sum(), weights)


def test_layers_that_read_the_same_tensor_share_products():
    block, x, context = Block(), random(3, 6), random(5, 6)[:3]
    before = gradients(block, x), gradients(block, x, context)
    with grouping([block]), torch.no_grad():
        block(x)
    assert block.groups() == ["out", "qkv"]
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(gradients(block, x), before[0], strict=True))
    # A network that calls them otherwise than observed gets the same values.
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(gradients(block, x, context), before[1], strict=True))


def test_only_layers_without_dropout_that_are_called_once_share_products():
    block = Block()
    with grouping([block]), torch.no_grad():
        block(random(3, 6), random(5, 6)[:3])
    assert block.groups() == ["kv", "out", "q"]
    dropping = Block(drop=0.5)
    with grouping([dropping]), torch.no_grad():
        dropping(random(3, 6))
    assert dropping.groups() == ["k", "out", "q", "v"]
    twice = Block()
    with grouping([twice]), torch.no_grad():
        twice(random(3, 6))
        twice(random(3, 6))
    assert twice.groups() == ["k", "out", "q", "v"]


def test_an_input_changed_in_place_is_read_again():
    block, x = Block(), random(3, 6, grad=False)
    with grouping([block]), torch.no_grad():
        block(x)
    block.q(x)
    x.add_(1.0)
    expected = block.k.low_rank.apart(x)
    assert torch.allclose(block.k(x), expected, rtol=1e-12)


def test_weights_are_cast_once_a_forward_and_gradients_back():
    block = Block()
    for layer in low_rank_layers(block).values():
        layer.base.float()
    block.register_forward_pre_hook(StepWeights(list(low_rank_layers(block).values())))
    x = random(3, 6).detach().float()
    with grouping([block]), torch.no_grad():
        block(x)
    found = gradients(block, x)
    down, ups = block.q.low_rank.group.copies
    assert down.shape == (6, 6) and down.dtype is torch.float32 and len(ups) == 3
    assert all(gradient.dtype is torch.float64 for gradient in found)
    exact = Block()
    exact.load_state_dict(block.state_dict())
    for mine, theirs in zip(low_rank_layers(exact).values(), low_rank_layers(block).values(), strict=True):
        for part in ("base", "down", "up"):
            getattr(mine, part).load_state_dict(getattr(theirs, part).state_dict())
    for a, b in zip(found, gradients(exact, x.double()), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


class Network(nn.Module):
    """Blocks in a row, adapters in float64 over a network in float32, and an adapter behind the blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.last = Block()
        for layer in low_rank_layers(self).values():
            layer.base.float()
        self.register_forward_pre_hook(StepWeights(list(low_rank_layers(self).values())))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["whole", "checkpointed"])
def test_weights_cast_by_block_have_their_gradients_with_its_backward(checkpoints, monkeypatch):
    """Other processes wait for them. The values are those of one cast for all."""
    monkeypatch.setattr("graft_pack.trainers.lowrank.layers._PART_BYTES", 1)
    network, x = Network(), random(3, 6).detach().float()
    if checkpoints:
        checkpoint_blocks(network.blocks)
    expected = gradients(network, x)
    events = []
    for number, block in enumerate(network.blocks):
        block.register_full_backward_pre_hook(lambda *given, number=number: events.append(number))
        weight = block.q.low_rank.down.weight
        weight.register_post_accumulate_grad_hook(lambda weight, number=number: events.append(f"of {number}"))
    handles = cast_by_block([network], lambda tree: tree.blocks)
    weights = [part.weight for layer in low_rank_layers(network).values() for part in (layer.down, layer.up)]
    for _ in range(2):
        events.clear()
        network(x).square().sum().backward()
        assert events == [2, "of 2", 1, "of 1", 0, "of 0"]
        assert all(torch.equal(weight.grad, other) for weight, other in zip(weights, expected, strict=True))
        for weight in weights:
            weight.grad = None
    for handle in handles:
        handle.remove()
    for found, other in zip(gradients(network, x), expected, strict=True):
        assert torch.allclose(found, other, rtol=1e-4, atol=1e-6)


@DEVICES
@pytest.mark.parametrize("keeps", [True, False], ids=["low rank", "high rank"])
def test_a_checkpointed_block_is_recomputed_without_its_last_frozen_product(keeps, on_cpu, monkeypatch):
    monkeypatch.setattr(products, "is_on_cpu", lambda tensor: on_cpu)
    # The block is narrow: q, k and v have half of its width as their ranks.
    monkeypatch.setattr(products, "_LEAST_RATIO", 2 if keeps else 7)
    block, x = Block(rank=1), random(3, 6)
    with grouping([block]), torch.no_grad():
        block(x)
    weights = [part.weight for layer in low_rank_layers(block).values() for part in (layer.down, layer.up)]
    counts, found = [], []

    def checkpointed():
        checkpoint_blocks([block])
        return block(x)

    for run in (lambda: block(x), checkpointed):
        with counting.FlopCounter() as counter:
            loss = run().square().sum()
            for _ in range(2):
                found.append(torch.autograd.grad(loss, weights, retain_graph=True))
        counts.append(counter.get_total_flops())
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    frozen_product, narrow = 2 * 3 * 6 * 6, 2 * 3 * 6
    # In each of the two backwards q, k and v. A x of a low rank is kept; otherwise also their A, and A of the last
    # layer. Products in place are not counted.
    assert counts[1] - counts[0] == 2 * (3 * frozen_product + (0 if keeps else 4) * narrow)


class Gated(nn.Module):
    """A block that adds its last layer's output as diffusion transformers do, by a gate or through an operation."""

    def __init__(self, tail):
        super().__init__()
        self.inner = Block(rank=1)
        self.gate = frozen(nn.Linear, 6, 6)
        self.tail = tail

    def forward(self, x):
        gate = self.gate(x.mean(0)).exp()
        return x + self.tail(self.inner(x), gate)


def written(out, gate):
    out[0, :2] = out[0, :2] * 2
    return out


class Cube(torch.autograd.Function):
    """A function of the host's own, which no mode of torch functions sees."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.aten.pow(x, 3)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


# Each with whether gradients need the value of the last layer's output.
TAILS = {
    "gate": (lambda out, gate: out * gate.detach(), False),
    "view": (lambda out, gate: out.view(3, 2, 3).transpose(0, 1).transpose(0, 1).flatten(1) * gate.detach(), True),
    "trained gate": (lambda out, gate: out * gate, True),
    "activation": (lambda out, gate: functional.gelu(out) * gate.detach(), True),
    "mask": (lambda out, gate: out * (out > 0) * gate.detach(), True),
    "in place": (lambda out, gate: functional.silu(out, inplace=True) * gate.detach(), True),
    "written": (written, False),
    "written, read": (lambda out, gate: written(out, gate) ** 2, True),
    "own function": (lambda out, gate: Cube.apply(out), True),
    "other dtype": (lambda out, gate: (out.float().square() * gate.detach()).double(), True),
}


@DEVICES
@pytest.mark.parametrize("name", TAILS)
def test_a_checkpointed_blocks_last_output_is_computed_where_a_gradient_needs_it(name, on_cpu, monkeypatch):
    monkeypatch.setattr(products, "is_on_cpu", lambda tensor: on_cpu)
    tail, needs = TAILS[name]
    block, x = Gated(tail), random(3, 6)
    calls = []
    compute = products._wide
    monkeypatch.setattr(products, "_wide", lambda *args: calls.extend(args[4]) or compute(*args))
    weights = [x, *(part.weight for layer in low_rank_layers(block).values() for part in (layer.down, layer.up))]
    expected = torch.autograd.grad(block(x).square().sum(), weights)
    calls.clear()
    checkpoint_blocks([block])
    loss = block(x).square().sum()
    for _ in range(2):
        found = torch.autograd.grad(loss, weights, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    last = block.inner.out.low_rank.base.weight
    assert len([weight for weight in calls if weight is last]) == 1 + 2 * needs


def test_a_compiled_block_may_read_the_last_output_of_a_checkpointed_one(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    block, x = Block(rank=1), random(3, 6)
    inner = nn.Sequential(frozen(nn.Linear, 6, 6), nn.GELU(), frozen(nn.Linear, 6, 6))
    block.forward = lambda x: inner(block.out(x))
    low_rank = block.out.low_rank
    weights = [x, low_rank.down.weight, low_rank.up.weight]
    expected = torch.autograd.grad(block(x).square().sum(), weights)
    inner.forward = compilation.CompiledForward(inner, compilation._CompiledClass("Inner"), ())
    checkpoint_blocks([block])
    found = torch.autograd.grad(block(x).square().sum(), weights)
    assert not inner.forward.compiled.has_failed
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("writes", [False, True])
def test_a_checkpointed_block_computes_outputs_of_few_rows_once(writes, monkeypatch):
    """Unless the network writes into them."""
    layer, down, up = frozen(nn.Linear, 64, 5), random(2, 64), random(5, 2)
    calls = []
    compute = products._wide
    monkeypatch.setattr(products, "_wide", lambda *args: calls.append(len(args[0])) or compute(*args))
    block = nn.Module()

    def forward(x):
        few, many = (products.linear(rows, down, [up], [0.5], [layer._parameters])[0] for rows in (x[:1], x))
        few = functional.silu(few, inplace=True) if writes else few
        return products.linear(few.exp() @ layer.weight * x, down, [up], [0.5], [layer._parameters])[0] * many

    block.forward = forward
    x = random(3, 64)
    expected = torch.autograd.grad(block.forward(x).square().sum(), (x, down, up))
    checkpoint_blocks([block])
    calls.clear()
    loss = block.forward(x).square().sum()
    for _ in range(2):
        found = torch.autograd.grad(loss, (x, down, up), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert calls.count(1) == (3 if writes else 1)
    assert calls.count(3) == 6


@pytest.mark.parametrize("width, count", [(16, 1), (15, 2)], ids=["low rank", "high rank"])
def test_a_checkpointed_convolution_computes_the_narrow_product_once(width, count, monkeypatch):
    """Unless A x would take more than an eighth of x's memory."""
    calls = []
    monkeypatch.setattr(
        products, "_convolve", lambda x, weight, *rest: calls.append(weight) or convolve(x, weight, *rest)
    )
    layer = frozen(nn.Conv2d, width, 4, 3, 1, 1)
    down, up = random(2, width, 3, 3), random(4, 2, 1, 1)
    block = nn.Module()
    block.forward = lambda x: products.convolution(x, down, up, 0.5, layer)
    x = random(1, width, 5, 5)
    expected = torch.autograd.grad(block(x).square().sum(), (x, down, up))
    checkpoint_blocks([block])
    calls.clear()
    found = torch.autograd.grad(block(x).square().sum(), (x, down, up))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len([weight for weight in calls if weight is down]) == count


def test_a_recomputed_block_reads_its_own_products_while_others_compile(monkeypatch):
    """torch's flag for it holds for all threads."""
    monkeypatch.setattr(products, "_LEAST_RATIO", 2)
    layers = [frozen(nn.Linear, 6, 6) for _ in range(2)]
    x, down, ups = random(3, 6), random(2, 1, 6), [random(6, 1), random(6, 1)]

    def call(x):
        for layer, a, b in zip(layers, down, ups, strict=True):
            (x,) = products.linear(x, a, [b], [1.0], [layer._parameters])
        return x

    expected = torch.autograd.grad(call(x).square().sum(), ups)
    out = block_of(call, True)(x)
    flags = iter([True])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: next(flags, False))
    found = torch.autograd.grad(out.square().sum(), ups)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
