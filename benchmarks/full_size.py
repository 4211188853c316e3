"""Count the work of a training step on networks of their published size, without their weights and without a GPU.

    python -m benchmarks.full_size [NAME ...] [--side 1024] [--rank 16] [--targets attention "linear + conv"]

The networks are ComfyUI's own classes, built under FakeTensorMode: operations get shapes and dtypes, but no numbers.
The forward and backward run in bf16. The table gives a step's work over that of the bare network, whose backward
computes gradients of activations only:

    launches   operations that start a kernel on a GPU; views start none
    bytes      read and written by these operations
    flops      of products and attention, as torch counts them
    roofline   sum over the operations of max(flops / peak, bytes / bandwidth, launch time), by GPU
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Peak FLOP/s in bf16, bytes/s of memory, seconds of a launch.
GPUS = {"H100": (800e12, 3.35e12, 4e-6), "4090": (150e12, 1.0e12, 4e-6), "3060": (50e12, 0.36e12, 5e-6)}

# Operations that start no kernel: they change shapes or allocate.
VIEWS = frozenset(
    [
        *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "device", "expand", "flatten"),
        *("empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided"),
        "permute",
        *("reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind"),
        *("unflatten", "unsqueeze", "view"),
    ]
)

_UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True}
_TOKENS = 77
_LONG = 512


@dataclass
class Work(TorchDispatchMode):
    """Counts of all operations within the block.

    Attributes:
        names: launches by operation.
        moved: bytes by operation.
        seconds: roofline by GPU.
    """

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    names: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GPUS, 0.0))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        from torch.utils._pytree import tree_leaves
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = operation._schema.name.split("::")[1]
        if name in VIEWS or name == "_local_scalar_dense":
            return result
        tensors = [value for value in tree_leaves((args, kwargs, result)) if torch.is_tensor(value)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        count = flop_registry.get(operation._overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        self.launches += 1
        self.bytes += moved
        self.flops += flops
        self.names[name] += 1
        self.moved[name] += moved
        for gpu, (peak, bandwidth, launch) in GPUS.items():
            self.seconds[gpu] += max(flops / peak, moved / bandwidth, launch)
        return result


def network(name: str) -> torch.nn.Module:
    """Build a network in its published size in bf16, frozen. Call it under FakeTensorMode."""
    import comfy.ops

    options = {"device": "cpu", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
    module = _BUILDERS[name](options)
    for layer in module.modules():
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = False
    return module.requires_grad_(False)


def _sd1(options: dict[str, Any]) -> torch.nn.Module:
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {**comfy.supported_models.SD15.unet_config, **_UNET, "legacy": False, "num_heads": 8}
    config |= {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0, 0]}
    config |= {"transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1}
    return UNetModel(**config, **options)


def _sdxl(options: dict[str, Any]) -> torch.nn.Module:
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {**comfy.supported_models.SDXL.unet_config, **_UNET, "legacy": False, "num_head_channels": 64}
    config |= {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_classes": "sequential"}
    config |= {"transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    return UNetModel(**config, **options)


def _sd35_large(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * 38}}
    sizes = {"input_size": None, "in_channels": 16, "depth": 38, "adm_in_channels": 2048, "qk_norm": "rms"}
    sizes |= {"context_embedder_config": embedder, "pos_embed_max_size": 192, "num_patches": 192**2}
    return OpenAISignatureMMDITWrapper(**sizes, **options)


def _flux(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.flux.model import Flux

    sizes = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072}
    sizes |= {"mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56]}
    return Flux(**sizes, theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, **options)


def _z_image(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.lumina.model import NextDiT

    sizes = {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560}
    sizes |= {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "time_scale": 1000.0}
    return NextDiT(**sizes, ffn_dim_multiplier=8 / 3, qk_norm=True, z_image_modulation=True, **options)


def _qwen_image(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(**options)


_BUILDERS = {
    "SD1": _sd1,
    "SDXL": _sdxl,
    "SD3": _sd35_large,
    "Flux": _flux,
    "Lumina 2": _z_image,
    "Qwen-Image": _qwen_image,
}
# Networks whose activations exceed a usual GPU's memory: their blocks are checkpointed.
CHECKPOINTED = frozenset({"SD3", "Flux", "Lumina 2", "Qwen-Image"})
LABELS = {"SD1": "SD1.5", "SD3": "SD3.5 large", "Lumina 2": "Z-Image"}


def inputs(name: str, side: int) -> tuple[tuple, dict[str, Any]]:
    """Return the positional and keyword inputs of a network for one picture of `side` pixels."""
    half = {"dtype": torch.bfloat16}
    latent = side // 8
    timestep = torch.empty(1)
    if name in ("SD1", "SDXL"):
        keywords = {"context": torch.empty(1, _TOKENS, 768 if name == "SD1" else 2048, **half)}
        if name == "SDXL":
            keywords["y"] = torch.empty(1, 2816, **half)
        return (torch.empty(1, 4, latent, latent, **half), timestep), keywords
    x = torch.empty(1, 16, latent, latent, **half)
    if name == "SD3":
        return (x, timestep), {"context": torch.empty(1, 154, 4096, **half), "y": torch.empty(1, 2048, **half)}
    if name == "Flux":
        keywords = {"context": torch.empty(1, _LONG, 4096, **half), "y": torch.empty(1, 768, **half)}
        return (x, timestep), {**keywords, "guidance": torch.empty(1, **half)}
    if name == "Lumina 2":
        return (x, timestep), {"context": torch.empty(1, _LONG, 2560, **half), "num_tokens": _LONG}
    return (x.unsqueeze(2), timestep), {"context": torch.empty(1, _LONG, 3584, **half)}


def count(module: torch.nn.Module, name: str, side: int, bare: bool) -> Work:
    """Count a forward and backward. The bare network gets gradients of its activations, from the input on."""
    from graft_pack.trainers.memory.autograd import OutOfPlace

    args, keywords = inputs(name, side)
    if bare:
        args[0].requires_grad_(True)
    with Work() as work:
        with OutOfPlace():
            output = module(*args, **keywords, transformer_options={})
        output.float().square().mean().backward()
    return work


def rows(name: str, side: int, rank: int, targets: list[str]) -> list[tuple[str, Work]]:
    """Return (label, work) of the bare network and of a LoRA on each kind of target."""
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.lowrank.layers import PLAIN, grouping, low_rank_layers
    from graft_pack.trainers.memory.autograd import blocks_of
    from graft_pack.trainers.memory.checkpointing import checkpoint_blocks
    from graft_pack.trainers.methods import METHODS
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.support import models

    found = []
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_fixed_parameters())
        stack.enter_context(mock.patch("graft_pack.trainers.lowrank.products.is_on_cpu", lambda tensor: False))
        for kind in ["", *targets]:
            module = network(name)
            label = "bare"
            if kind:
                recipe = models.recipe(name, rank=rank, alpha=float(rank), targets=kind)
                paths = METHODS["LoRA"].targets(module, family_of(name), recipe)
                METHODS["LoRA"].inject(module, paths, recipe)
                for layer in low_rank_layers(module).values():
                    setattr(layer.base, PLAIN, True)
                args, keywords = inputs(name, side)
                with grouping([module]), torch.no_grad():
                    module(*args, **keywords, transformer_options={})
                label = f"{kind} ({len(paths)} layers)"
            if name in CHECKPOINTED:
                checkpoint_blocks(blocks_of(module))
            found.append((label, count(module, name, side, bare=not kind)))
    return found


class _fixed_parameters:
    """Keep `Module.to` from replacing fake parameters, which it cannot."""

    def __enter__(self) -> None:
        self._apply = torch.nn.Module._apply
        torch.nn.Module._apply = lambda module, function, recurse=True: module

    def __exit__(self, *error) -> None:
        torch.nn.Module._apply = self._apply


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["SDXL", "Flux"], metavar="NAME", help=", ".join(_BUILDERS))
    parser.add_argument("--side", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="*", default=["attention", "linear + conv"])
    parser.add_argument("--operations", action="store_true", help="also list the most frequent operations")
    options = parser.parse_args()

    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    print(f"| model | targets | launches | bytes | flops | {' | '.join(GPUS)} |")
    print("|---" * (5 + len(GPUS)) + "|")
    for name in options.names:
        bare = None
        for label, work in rows(name, options.side, options.rank, options.targets):
            title = f"{LABELS.get(name, name)} {options.side}" + ", checkpointed" * (name in CHECKPOINTED)
            if bare is None:
                bare = work
                figures = [f"{work.launches:,}", f"{work.bytes / 1e9:.1f} GB", f"{work.flops / 1e12:.1f} T"]
                figures += [f"{work.seconds[gpu] * 1e3:.0f} ms" for gpu in GPUS]
            else:
                pairs = [(work.launches, bare.launches), (work.bytes, bare.bytes), (work.flops, bare.flops)]
                pairs += [(work.seconds[gpu], bare.seconds[gpu]) for gpu in GPUS]
                figures = [f"{mine / theirs:.2f}" for mine, theirs in pairs]
            print(f"| {title} | {label} | {' | '.join(figures)} |", flush=True)
            if options.operations:
                print(f"<!-- {work.bytes / bare.bytes:.4f} {work.moved.most_common(14)} -->", flush=True)


if __name__ == "__main__":
    main()
