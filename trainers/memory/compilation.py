"""Compilation of a network's repeated blocks with torch.compile: one graph for all blocks of the same shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from ..errors import in_one_line, is_out_of_memory
from ..lowrank.deferred import Deferred
from .autograd import OutOfPlace, blocks_of, out_of_place_suspended

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

BACKEND = "inductor"


def compile_blocks(tree: nn.Module, position_options: Collection[str] = ()) -> int:
    """Compile each repeated block at its first forward with gradients. Return the number of blocks.

    Forwards without gradients are computed as before. Use it only on a private tree, because it sets `forward` on the
    block instance, and before `checkpoint_blocks`, so that the recomputation calls the compiled forward too.

    Args:
        position_options: as in `Denoiser`.
    """
    blocks = repeated_blocks(tree)
    classes: dict[type, _CompiledClass] = {}
    for block in blocks:
        compiled = classes.setdefault(type(block), _CompiledClass(type(block).__name__))
        block.forward = CompiledForward(block, compiled, position_options)
    return len(blocks)


def repeated_blocks(tree: nn.Module) -> list[nn.Module]:
    """Return the blocks that are worth compiling: those of `blocks_of`, or the blocks listed inside them."""
    blocks = []
    for block in blocks_of(tree):
        if _has_layers(block):
            blocks += [inner for inner in _listed(block) if _has_layers(inner)] or [block]
    return blocks


def _listed(block: nn.Module) -> list[nn.Module]:
    return [member for child in block.children() if isinstance(child, torch.nn.ModuleList) for member in child]


def _has_layers(block: nn.Module) -> bool:
    """Report whether a module has several layers and the forward of its class."""
    layers = [layer for layer in block.modules() if any(True for _ in layer.parameters(recurse=False))]
    return len(layers) > 1 and "forward" not in vars(block)


class CompiledForward:
    """A block's forward, compiled while gradients are recorded.

    Args:
        block: a block whose trained modules may still be missing.
        compiled: the graphs of its class.
        position_options: entries to leave out of option dicts. A graph is valid only for the values that it has read.
    """

    def __init__(self, block: nn.Module, compiled: _CompiledClass, position_options: Collection[str]):
        self.forward = block.forward
        self.compiled = compiled
        self._block = block
        self._position_options = position_options
        self._shapes: tuple | None = None

    def __call__(self, *args, **kwargs):
        # torch does not compile below a dispatch mode, such as that of a memory measurement.
        if not torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
            return self.forward(*args, **kwargs)
        if self._shapes is None:
            # At the first forward, the trained modules are in the tree.
            self._shapes = tuple((name, weight.shape) for name, weight in self._block.named_parameters())
        args = tuple(self._without_position(value) for value in args)
        kwargs = {name: self._without_position(value) for name, value in kwargs.items()}
        return self.compiled.call(self._block, self._shapes, args, kwargs, self.forward)

    def _without_position(self, value: Any) -> Any:
        if isinstance(value, Deferred):
            # torch does not compile for such tensors. An operation on one gives an ordinary tensor.
            return value.view_as(value)
        if type(value) is not dict:
            return value
        return {name: entry for name, entry in value.items() if name not in self._position_options}


class _CompiledClass:
    """The graphs of all blocks of a class. Blocks whose weights have the same shapes share theirs.

    A checkpointed block must be recomputed in the way of its forward. So once a graph has run, a failure changes
    nothing for inputs that have a graph.

    Args:
        name: name of the class.
    """

    def __init__(self, name: str):
        self.name = name
        self._functions: dict[tuple, Callable] = {}
        # Sizes of the first inputs of blocks with these weights.
        self._first_sizes: dict[tuple, tuple] = {}
        self._has_run = False
        # Shapes of weights and inputs.
        self._failed: set[tuple] = set()
        self._has_warned = False

    @property
    def has_failed(self) -> bool:
        """Report whether some blocks are computed without compilation."""
        return self._has_warned

    def call(self, block: nn.Module, shapes: tuple, args: tuple, kwargs: dict, forward: Callable) -> Any:
        """Return the output of a block's graph, or that of `forward` if the block cannot be compiled."""
        tensors = [value for value in tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        kind = shapes, tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        if self._failed and (not self._has_run or kind in self._failed):
            return forward(*args, **kwargs)
        try:
            function = self._function(shapes, tuple(tensor.shape for tensor in tensors))
            # A graph is valid only below the function modes that it was made with. It has this mode in itself.
            with out_of_place_suspended():
                output = function(block, args, kwargs)
            self._has_run = True
            return output
        except _limit_errors() as error:
            # torch refuses at once, and keeps the graphs that it has.
            self._warn(error)
        except RuntimeError as error:
            # torch's compiler raises it, also where it does not support the system.
            if is_out_of_memory(error):
                raise
            self._failed.add(kind)
            self._warn(error)
        return forward(*args, **kwargs)

    def _function(self, shapes: tuple, sizes: tuple) -> Callable:
        """Return the compiled function for inputs of these sizes: one for the first sizes, one for all others.

        If torch chose, it would make a dynamic graph after the static one and use it for the first sizes too. The
        recomputation of a checkpointed block would then differ from its forward (PyTorch issue 166926).
        """
        is_dynamic = self._first_sizes.setdefault(shapes, sizes) != sizes
        if (shapes, is_dynamic) not in self._functions:
            self._functions[shapes, is_dynamic] = _compile(is_dynamic)
        return self._functions[shapes, is_dynamic]

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            cause = getattr(error, "inner_exception", error)
            reason = f"{type(cause).__name__}: {in_one_line(cause)}"
            log.warning("Graft: cannot compile %s and computes it as without compile. %s", self.name, reason)
        self._has_warned = True


def _limit_errors() -> tuple[type[Exception], ...]:
    """Return torch's errors for too many graphs of a function; the name depends on the version."""
    names = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")
    return tuple(getattr(torch._dynamo.exc, name) for name in names if hasattr(torch._dynamo.exc, name))


def _compile(is_dynamic: bool) -> Callable:
    """Return a compiled function that calls a block, for inputs of one size or of many sizes."""

    def call(block, args, kwargs):
        with OutOfPlace():
            return type(block).forward(block, *args, **kwargs)

    # torch keeps graphs, and counts them, by code object. An own copy of it takes them along when it is freed.
    call.__code__ = call.__code__.replace()
    return torch.compile(call, backend=_backend, fullgraph=True, dynamic=is_dynamic)


def _backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """Compile a graph and its backward at once, so that a failure of either is met in the forward."""
    from torch._dynamo.backends.registry import lookup_backend

    # Older versions of torch compile the backward when it runs.
    at_once = [name for name in ("force_non_lazy_backward_lowering",) if hasattr(torch._functorch.config, name)]
    # Dropout draws what it draws without compilation.
    with (
        torch._functorch.config.patch(dict.fromkeys(at_once, True)),
        torch._inductor.config.patch(fallback_random=True),
    ):
        return lookup_backend(BACKEND)(graph, inputs)
