"""Tiny MODELs of the host's own classes with random weights, each as a loader passes it on."""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from .networks import ARCHITECTURES, CLASSES, FAMILIES, SIZES

__all__ = ["ARCHITECTURES", "CLASSES", "FAMILIES", "SIZES"]


def patcher(name: str, dtype=None, seed: int = 0, keys: dict | None = None):
    """Return a MODEL of a family with random weights, scaled so that every layer matters.

    Args:
        keys: further checkpoint keys by which the host tells models apart.
    """
    import torch

    dtype = dtype or torch.float32
    tiny = SIZES[name]
    config = tiny.build()
    config.set_inference_dtype(dtype, None)
    model = config.get_model(keys or {}, "", device="cpu")
    if tiny.shrink:
        tiny.shrink(model.diffusion_model)
    randomize(model.diffusion_model, seed, tiny.norms)
    return patched(model)


def patched(model):
    """Return the host's model as a MODEL."""
    import comfy.model_management
    import comfy.model_patcher
    import torch

    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def randomize(module, seed: int, norms: float = 1.0) -> None:
    """Fill a module with random weights; those of norms are near `norms`."""
    import torch

    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.12 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=source) * spread)
            if parameter.dim() == 1 and "norm" in name and name.endswith(("weight", "scale")):
                parameter.add_(norms)
        for name, buffer in module.named_buffers():
            if name == "pos_embed":  # SD3's; the host leaves it uninitialized, because the checkpoint holds it
                buffer.copy_(torch.randn(buffer.shape, generator=source) * 0.1)


def conditioning(name: str, seed: int = 0):
    """Return a random Conditioning as that family's text encoder gives it."""
    import torch
    from graft_pack.trainers.protocols import Conditioning

    tiny = SIZES[name]
    source = torch.Generator().manual_seed(seed)
    tensors = {"cross_attn": torch.randn(1, *tiny.context, generator=source)}
    if tiny.pooled:
        tensors["pooled_output"] = torch.randn(1, tiny.pooled, generator=source)
    if tiny.more:
        tensors |= tiny.more(source)
    if not all(map(torch.is_tensor, tensors.values())):
        from graft_pack.nodes.host.model.encoded_prompts import encoded_prompts

        tensors = encoded_prompts([[[tensors.pop("cross_attn"), tensors]]])[0].tensors
    return Conditioning(tensors, (640 + seed, 480), (seed, 0), (512, 512))


def _clip_config(width: int, layers: int) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
    }


_QWEN_CONFIG = {**_clip_config(48, 2), "num_key_value_heads": 2}
_T5_CONFIG = {"d_model": 48, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 2}

# Small text encoders by the host's own keys; together they fit the networks above.
TEXT = {
    "SD1": {"clip_l": _clip_config(48, 3)},
    "SD2": {"clip_h": _clip_config(48, 3)},
    "SDXL with text": {"clip_l": _clip_config(24, 3), "clip_g": _clip_config(24, 4)},
    "Flux": {"clip_l": _clip_config(32, 3), "t5xxl": _T5_CONFIG},
}
# Those that see pictures.
SEEING = {
    "QwenImage": {"qwen25_7b": _QWEN_CONFIG},
    "LongCatImage": {"qwen25_7b": _QWEN_CONFIG},
    "Boogu": {"qwen3vl_8b": _QWEN_CONFIG},
    "JoyImage": {"qwen3vl_8b": _QWEN_CONFIG},
    "MageFlow": {"qwen3vl_4b": _QWEN_CONFIG},
}


def text(name: str, seed: int = 0, dtype=None, operations=None):
    """Return a CLIP of a family with random weights, with the host's own tokenizer and its embedding folders.

    Args:
        dtype: dtype of the weights, None for float32.
        operations: classes of the layers, None for the host's. Those of other classes get no weights.
    """
    import comfy.sd
    import folder_paths
    import torch

    options = {
        "dtype": torch.float32,
        **{f"{key}_model_config": config for key, config in {**TEXT, **SEEING}[name].items()},
    }
    if operations is not None:
        options["custom_operations"] = operations
    target = SIZES[name].build().clip_target({})
    folders = folder_paths.get_folder_paths("embeddings")
    with _tokenizers_kept(), _small_eyes():
        made = comfy.sd.CLIP(target, embedding_directory=folders, model_options=options)
    if operations is None:
        randomize(made.cond_stage_model, seed)
        made.cond_stage_model.to(dtype or torch.float32)
    return made


@contextmanager
def _small_eyes():
    """Let the host build the parts of text encoders that see pictures, which have one size each, in a small size."""
    from unittest.mock import patch

    from comfy.text_encoders import qwen_vl

    small = {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "intermediate_size": 32}
    real = qwen_vl.Qwen2VLVisionTransformer
    with ExitStack() as stack:
        stack.enter_context(patch.object(qwen_vl, real.__name__, lambda **fields: real(**{**fields, **small})))
        try:
            from comfy.text_encoders import qwen3vl
        except ImportError:
            pass
        else:
            sizes = {"hidden_size": 32, "intermediate_size": 32, "depth": 2, "deepstack_visual_indexes": [0]}
            kinds = dict.fromkeys(qwen3vl.QWEN3VL_VISION, sizes)
            stack.enter_context(patch.object(qwen3vl, "QWEN3VL_VISION", kinds))
            stack.enter_context(patch.dict(qwen3vl.QWEN3VL_VISION_COMMON, num_heads=2))
        yield


@contextmanager
def _tokenizers_kept():
    """Read a tokenizer's files once in the process: they take longer than the encoder, and no test changes one."""
    from unittest.mock import patch

    from transformers import PreTrainedTokenizerBase

    read = PreTrainedTokenizerBase.from_pretrained.__func__

    def from_pretrained(kind, *args, **kwargs):
        return _tokenizer(read, kind, args, tuple(sorted(kwargs.items())))

    with patch.object(PreTrainedTokenizerBase, "from_pretrained", classmethod(from_pretrained)):
        yield


@functools.cache
def _tokenizer(read, kind, args, kwargs):
    return read(kind, *args, **dict(kwargs))


WORD = "my-word"


@contextmanager
def learning_word(name: str, checkpointing: bool = False, model=None, clip=None, captions=None, **fields):
    """Yield a Training of the vectors of `my-word` on a family of TEXT, two for each encoder."""
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.trainers.memory import autograd
    from graft_pack.trainers.memory.checkpointing import checkpoint_blocks
    from graft_pack.trainers.methods import textual_inversion
    from graft_pack.trainers.preprocessing.items import DatasetItem
    from graft_pack.trainers.protocols import Host
    from graft_pack.trainers.runs.folders import Products
    from graft_pack.trainers.steps.plan import Plan

    encoder = ComfyText(clip or text(name))
    denoiser = ComfyDenoiser(model or patcher(name), encoder, SmallVae())
    word = {"embedding_name": WORD, "embedding_init": "a red dog", "embedding_vectors": 2}
    settings = recipe(denoiser.family, method="embedding", rank=0, embedding_learning_rate=1e-2, **word, **fields)
    captions = captions or [f"a photo of embedding:{WORD}", f"one embedding:{WORD}, on a beach"]
    with denoiser.training("auto", settings.offload == "on"), encoder.training():
        if checkpointing:
            checkpoint_blocks(autograd.blocks_of(denoiser.module), settings.keeps_attention)
            checkpoint_blocks(autograd.blocks_of(encoder.module), settings.keeps_attention)
        vectors = textual_inversion.start(encoder, settings)
        items = []
        for number, caption in enumerate(captions):
            shown = item(name, number).show(None)
            bare = replace(shown.conditioning, tensors={})
            items.append(
                DatasetItem(f"picture {number}", (64, 64), 1, functools.partial(_told, shown.latent, bare, caption))
            )
        export = lambda values, step: Products(None, textual_inversion.made_of(values, settings, {}))  # noqa: E731
        plan = Plan(
            recipe=settings,
            train=items,
            trainables=vectors,
            export=export,
            groups=[textual_inversion.group(vectors, settings)],
            renormalize=textual_inversion.renormalizing(vectors, encoder, settings),
        )
        yield Training(denoiser, Host(denoiser, encoder, None), plan)


@contextmanager
def with_text(name: str, checkpointing: bool = False, model=None, clip=None, spread: float = 0.0, **fields):
    """Yield a Training of adapters on the network and on the text encoders of a family of TEXT."""
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.trainers.engine.trainable_modules import TrainableModules
    from graft_pack.trainers.formats.adapter import Adapter
    from graft_pack.trainers.memory import autograd
    from graft_pack.trainers.memory.checkpointing import checkpoint_blocks
    from graft_pack.trainers.methods import METHODS
    from graft_pack.trainers.preprocessing.items import DatasetItem
    from graft_pack.trainers.protocols import Host
    from graft_pack.trainers.runs.folders import Products
    from graft_pack.trainers.steps.plan import Plan

    encoder = ComfyText(clip or text(name))
    denoiser = ComfyDenoiser(model or patcher(name), encoder, SmallVae())
    own = {"text_encoder": True, "text_encoder_rank": 2, "text_encoder_learning_rate": 1e-2}
    settings = recipe(denoiser.family, **{**own, **fields})
    host = Host(denoiser, encoder, None)
    parts = TrainableModules(METHODS[settings.method], settings, host)
    with denoiser.training("auto", settings.offload == "on"), encoder.training():
        if checkpointing:
            checkpoint_blocks(autograd.blocks_of(denoiser.module), settings.keeps_attention)
            checkpoint_blocks(autograd.blocks_of(encoder.module), settings.keeps_attention)
        trainables = parts.inject()
        if spread:
            scatter(trainables, spread)
        items = []
        for number, caption in enumerate(["a red dog", "a photo, (blue) sky"]):
            shown = item(name, number).show(None)
            bare = replace(shown.conditioning, tensors={})
            items.append(
                DatasetItem(f"picture {number}", (64, 64), 1, functools.partial(_told, shown.latent, bare, caption))
            )
        export = lambda values, step: Products(Adapter(parts.export(values), None, parts.native(values)))  # noqa: E731
        plan = Plan(
            recipe=settings,
            train=items,
            trainables=trainables,
            export=export,
            groups=parts.groups(trainables),
            switched_off=parts.switched_off,
        )
        yield Training(denoiser, host, plan)


def _told(latent, conditioning, caption, turn):
    from graft_pack.trainers.preprocessing.items import Sample

    return Sample(latent, conditioning, None, caption)


def kl_vae(channels: int):
    """Return a VAE of the host's own class with random weights: SD1's kind with 4 channels, Flux's with 16."""
    import comfy.sd
    import torch
    from comfy.ldm.models import autoencoder

    shape = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    if channels == 4:
        network = autoencoder.AutoencoderKL(ddconfig=shape, embed_dim=4)
    else:
        network = autoencoder.AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": shape},
            decoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": shape},
        )
    randomize(network, 0)
    return comfy.sd.VAE(sd=network.state_dict(), device=torch.device("cpu"), dtype=torch.float32)


def wan_vae():
    """Return a small VAE of Wan's class with random weights, 8 channels wide: it encodes and decodes clips."""
    import comfy.sd
    import torch
    from comfy.ldm.wan.vae import WanVAE

    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "dropout": 0.0}
    network = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True], **shape)
    randomize(network, 0)
    return comfy.sd.VAE(sd=network.state_dict(), device=torch.device("cpu"), dtype=torch.float32)


class SmallVae:
    """The part of a VAE that the denoiser uses when it encodes no picture."""

    def spacial_compression_encode(self) -> int:
        return 8


@dataclass(frozen=True)
class Training:
    """A MODEL within `ComfyDenoiser.training`, with an injected LoRA.

    Attributes:
        host: the engine's Host around `denoiser`, without text encoder and VAE.
        plan: the loop's plan.
    """

    denoiser: Any
    host: Any
    plan: Any

    def losses(self):
        """Return the mean loss of the first batch, with its graph."""
        from graft_pack.trainers.steps.step import batch_loss

        return batch_loss(self.plan, self.host)

    def gradients(self) -> list:
        """Return the gradients of that loss, in the order of the trainable parameters."""
        import torch

        parameters = list(self.plan.trainables.values())
        # If the encoder's second-last layer is its output, the last layer has no gradient.
        found = torch.autograd.grad(self.losses(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def recipe(family: str, **fields):
    """Return a recipe of a family's defaults with some fields set; unchecked, so that tests can try odd values."""
    from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
    from graft_pack.trainers.families import family_of

    made = resolve(Options(), family_of(family), RecipeInputs("LoRA", 10, 0.0, 4, 2, 0, 64, ""))
    return replace(made, **fields)


def item(name: str, seed: int, dtype=None, side: int = 0):
    """Return a dataset item with a random latent and conditioning from the seed; side 0 takes the family's own."""
    import torch
    from graft_pack.trainers.preprocessing.items import DatasetItem, Sample

    shape = SIZES[name].latent
    if side:
        shape = (*shape[:-2], side, side)

    def latent():
        source = torch.Generator().manual_seed(seed)
        return torch.randn(1, *shape, generator=source).to(dtype or torch.float32)

    return DatasetItem(f"picture {seed}", (64, 64), 1, lambda turn: Sample(latent(), conditioning(name, seed)))


@contextmanager
def in_training(
    model,
    name: str,
    checkpointing: bool = False,
    spread: float = 0.0,
    examples: int = 2,
    side: int = 0,
    report=None,
    **fields,
):
    """Yield a Training of a MODEL.

    Args:
        name: key in SIZES.
        spread: standard deviation of random trainable values; 0 leaves their initial values.
        side: side of the latents, 0 for the family's.
        fields: fields of the recipe.
    """
    import torch
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.trainers.engine.base_dtype import quantize_base
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.memory import autograd
    from graft_pack.trainers.memory.checkpointing import checkpoint_blocks
    from graft_pack.trainers.memory.compilation import compile_blocks
    from graft_pack.trainers.methods import METHODS
    from graft_pack.trainers.protocols import Host
    from graft_pack.trainers.recipe.options import AS_IT_IS
    from graft_pack.trainers.steps.plan import Plan

    denoiser = ComfyDenoiser(model, None, SmallVae())
    host = Host(denoiser, None, None, report or (lambda event, payload: None))
    settings = recipe(denoiser.family, **fields)
    method = METHODS[settings.method]
    offloaded = settings.offload == "on"
    with denoiser.training(settings.compute_dtype, offloaded or settings.base_dtype != AS_IT_IS):
        dtype = denoiser.compute_dtype
        quantize_base(settings, host, (), offloaded)
        if settings.compile == "on":
            compile_blocks(denoiser.module, denoiser.position_options)
        if checkpointing:
            checkpoint_blocks(autograd.blocks_of(denoiser.module), settings.keeps_attention)
        targets = method.targets(denoiser.module, family_of(denoiser.family), settings)
        trainables = method.inject(denoiser.module, targets, settings)
        if spread:
            scatter(trainables, spread, settings.seed, torch.promote_types(dtype, torch.float32))
        items = [item(name, seed, dtype, side) for seed in range(examples)]
        export = exporter(method, settings, method.names(denoiser)[0], denoiser)
        plan = Plan(
            recipe=settings,
            train=items,
            trainables=trainables,
            export=export,
            switched_off=functools.partial(method.switched_off, denoiser.module),
            scaled=functools.partial(method.scaled, denoiser.module),
            constants=method.constants(denoiser.module),
            in_backward=method.in_backward,
        )
        yield Training(denoiser, host, plan)


def exporter(method, settings, name_of, denoiser=None):
    """Return a function from trainable values to a run's products, as the loop needs it; without metadata.

    Args:
        denoiser: within training; needed for types whose files depend on the weights, and for peft's own form.
    """
    from graft_pack.trainers.formats.adapter import Adapter, LazyAdapter
    from graft_pack.trainers.formats.diffusers_split import with_splits
    from graft_pack.trainers.formats.full_diff import FullDiff
    from graft_pack.trainers.runs.folders import Products

    def export(values, step):
        module = denoiser.module if denoiser else None
        native = method.native(values, settings, denoiser.published_name, module) if denoiser else None
        native = native and with_splits(native, denoiser.published_splits)
        tensors = method.export(values, settings, name_of, module)
        if isinstance(tensors, FullDiff):
            return Products(LazyAdapter(tensors, {}))
        return Products(Adapter(tensors, None, native))

    return export


def exported(training, values):
    """Return the adapter of the values with what a file of a run says about it: its recipe."""
    import json

    from graft_pack.trainers.formats.adapter import Adapter

    adapter = training.plan.export(values, 0).adapter
    if isinstance(adapter, Adapter):
        metadata = {"graft_recipe": json.dumps({"method": training.plan.recipe.method})}
        adapter = Adapter(adapter, metadata, adapter.native)
    return adapter


def scatter(trainables: dict, spread: float, seed: int = 0, dtype=None) -> None:
    """Set random values, for A and B alike, so that neither gradient vanishes."""
    import torch

    source = torch.Generator().manual_seed(seed)
    for parameter in trainables.values():
        value = torch.randn(parameter.shape, generator=source) * spread
        parameter.data = value.to(dtype or parameter.dtype)


@contextmanager
def float64_throughout(training):
    """Compute everything in float64, so that finite differences see no rounding on any CPU.

    The model is built in float64. The trainable parameters become float64. A cast to float32 on the way, such as that
    of rotary embeddings, casts to float64 instead.
    """
    from unittest.mock import patch

    import torch

    cast = torch.Tensor.to

    def widened(value):
        return torch.float64 if value is torch.float32 else value

    # Patched on the class, because a mode has ended when the backward recomputes a checkpointed block.
    def to(tensor, *args, **kwargs):
        return cast(tensor, *map(widened, args), **{key: widened(value) for key, value in kwargs.items()})

    for parameter in training.plan.trainables.values():
        parameter.data = parameter.data.double()
    norm = torch.linalg.vector_norm

    def vector_norm(tensor, *args, dtype=None, **kwargs):
        return norm(tensor, *args, dtype=widened(dtype), **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.enter_context(patch.object(torch.Tensor, "to", to))
        stack.enter_context(patch.object(torch.linalg, "vector_norm", vector_norm))
        yield


def denoised(model, x, sigma: float, one):
    """Return the host's own x0 for x [1, C, ...] at sigma on one Conditioning, as a sampler node in the graph does."""
    import comfy.model_management
    import comfy.sampler_helpers
    import comfy.samplers
    import torch
    from graft_pack.nodes.host.model import encoded_prompts, families

    network = model.model.diffusion_model
    if hasattr(network, "clear_kv_cache"):
        # The host does not clear a prompt's key-value cache when other weights are applied.
        network.clear_kv_cache()
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        facts = {
            "width": one.original_size[0],
            "height": one.original_size[1],
            "crop_w": one.crop[0],
            "crop_h": one.crop[1],
            "target_width": one.target_size[0],
            "target_height": one.target_size[1],
            **families.guidance(model),
            "pooled_output": None,
        }
        # A host's own conditioning may hold lists, such as of reference latents.
        lists = {name: value for name, value in one.tensors.items() if isinstance(value, list)}
        others = {name: value for name, value in one.tensors.items() if name not in lists}
        tensors = {**encoded_prompts.values_of(others, x.device), **lists}
        conds = comfy.sampler_helpers.convert_cond([[tensors.pop("cross_attn"), {**facts, **tensors}]])
        shapes = {"latent_shapes": [x.shape], "latent_image": torch.zeros_like(x)}
        conds = comfy.samplers.encode_model_conds(model.model.extra_conds, conds, x, x.device, "positive", **shapes)
        level = torch.full((1,), sigma)
        model.pre_run()
        found = comfy.samplers.calc_cond_batch(model.model, [conds], x, level, model.model_options)
        model.cleanup()
        return found[0].clone()


def trained_denoised(training: Training, x, sigma: float, one):
    """Return the same x0 from the model within a Training."""
    import torch

    level = torch.full((1,), sigma)
    with torch.no_grad():
        raw = training.denoiser.predict(x, level, [one])
        sampling = training.denoiser._sampling
        return sampling.calculate_denoised(level, raw, x)


@contextmanager
def inputs_of(module):
    """Yield the (args, kwargs) of every call of a module within the block."""
    calls = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    yield calls
    hook.remove()


def distance(a, b) -> float:
    """Return |a - b| / |b|, in fp64."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def joined(tensors) -> Any:
    """Return tensors of any shapes as one vector, fp64."""
    import torch

    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def train(training: Training, folder, resume: bool = False, **fields):
    """Run the loop to its end in a folder; return the final State.

    Args:
        resume: resume from the state that an earlier training left in the folder.
        fields: recipe fields that replace the plan's.
    """
    from graft_pack.trainers.engine import loop
    from graft_pack.trainers.engine.oom_fallback import offload_blocks
    from graft_pack.trainers.methods import METHODS
    from graft_pack.trainers.runs.checkpoint import State
    from graft_pack.trainers.runs.run import Run

    settings = replace(training.plan.recipe, **fields)
    groups = METHODS[settings.method].groups(training.plan.trainables, settings) or training.plan.groups
    plan = replace(training.plan, recipe=settings, groups=groups)
    run = Run(str(folder / "run"), str(folder / "adapters"), str(folder / "embeddings"))
    run.write_recipe(plan.recipe, "test", {})
    state = run.load(settings.steps) if resume else State()
    if settings.offload == "on":
        # A session does the same.
        offload_blocks(plan, run, training.host)
    return loop.train(plan, run, training.host, state)


class Words:
    """A text encoder of a family; a caption's number is its seed."""

    sees_pictures = False

    def __init__(self, name):
        self._name = name

    def encode(self, caption):
        return conditioning(self._name, sum(map(ord, caption))).tensors

    def form(self, caption):
        return None

    def count_tokens(self, caption):
        return len(caption.split())

    def fingerprint(self):
        return "words"
