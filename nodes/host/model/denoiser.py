"""ComfyUI's MODEL as a denoiser for training, with its own module and conditioning and exact gradients."""

from __future__ import annotations

import functools
import gc
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import comfy.model_base
import comfy.model_management
import comfy.utils
import torch

from ....trainers.errors import ModelError
from ....trainers.families import family_of
from ....trainers.memory.autograd import own_weights, private_tree
from ....trainers.memory.offload import mark_offloaded, place
from ....trainers.memory.transfer import upload
from ....trainers.protocols import HOLE, MAX_SOURCES, SOURCE, Conditioning, Geometry, PictureRequest
from . import compat, encoded_prompts, families, placement, sampling
from .checks import check_trainable, warn_of_model
from .fingerprint import patcher_digest, sampled_patcher_digest
from .lora import classic, unread_keys
from .lora_schedule import refuse_scheduled_lora
from .quantization import gguf, quantized

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE
    from PIL import Image

    from ....trainers.families import LayerSplit
    from .text_encoder import ComfyText

# The engine's kind of conditioning by image, for the kinds in `families`; all others take a source image.
_KINDS = {"": "", families.HOLE: HOLE}
# Entries of transformer options by which patches of a UNet tell the blocks apart.
_POSITION_OPTIONS = ("block", "block_index")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ComfyDenoiser:
    """The graph's MODEL, trained through a private tree over its own weights. The graph's MODEL does not change.

    Attributes:
        module: the private tree; only within `training`.
        compute_dtype: dtype of activations; only within `training`.
        adds_in_place, position_options: as the protocol says; only within `training`.
    """

    def __init__(self, model: ModelPatcher, text: ComfyText, vae: VAE):
        refuse_scheduled_lora(model, "model", "training")
        self._model = model.clone()
        self._fingerprint = patcher_digest(model)
        self._earlier_fingerprint = sampled_patcher_digest(model)
        self._text = text
        self._vae = vae
        self._sampling = self._model.get_model_object("model_sampling")
        self.family = families.family_name(self._model)
        self._image_conditioning = families.image_conditioning(self._model)
        self.conditioning_kind = _KINDS.get(self._image_conditioning, SOURCE)
        self.takes_first_frame = families.takes_first_frame(self._model)
        self.max_sources = 1 if self._image_conditioning == families.CONCAT else MAX_SOURCES
        self.parameterization = families.parameterization_name(self._model)
        self._preserves_variance = families.preserves_variance(self._model)
        self.sigma_data = float(getattr(self._sampling, "sigma_data", 1.0))
        self.noise_scale = float(getattr(self._sampling, "noise_scale", 1.0))
        self._guidance = families.guidance(self._model)
        self.device = self._model.load_device
        self.adds_in_place = True
        self.position_options: Collection[str] = ()
        self.compute_dtype = torch.float32
        self.module: torch.nn.Module | None = None
        self._levels: tuple[torch.nn.Module, torch.Tensor] | None = None
        self._casting: list[torch.nn.Module] = []
        self._pins: placement.Pins | None = None
        self._base = None
        self._options: dict = {}
        self._sampler: sampling.PreviewSampler | None = None

    def geometry(self, resolution: int) -> Geometry:
        """Return the geometry. Its bucket sides are multiples that suit both VAE and network."""
        factor = int(self._vae.spacial_compression_encode())
        return families.geometry(self._model, factor, resolution)

    def empty_latent(self, size: tuple[int, int]) -> torch.Tensor:
        """Return an empty latent as ComfyUI's samplers start from it."""
        return sampling.empty_latent(self._model, self._vae, size)

    def check_inputs(self, latent: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> None:
        """Detect a VAE or text encoder of another family before the network fails inside.

        Raises:
            ModelError: this model takes another number of latent channels, or another text width.
        """
        name = type(self._model.model).__name__
        wanted = self._model.get_model_object("latent_format").latent_channels
        if latent.shape[1] != wanted:
            raise ModelError(
                f"The VAE makes latents of {latent.shape[1]} channels; the model ({name}) takes {wanted}.",
                "Connect the VAE that belongs to the model.",
                "vae",
            )
        config = self._model.model.model_config.unet_config
        width = config.get("context_dim") or config.get("context_in_dim")
        context = conditioning.get("cross_attn")
        if isinstance(width, int) and context is not None and context.shape[-1] != width:
            raise ModelError(
                f"The text encoder gives {context.shape[-1]} numbers per token; the model ({name}) takes {width}.",
                "Connect the text encoder that belongs to the model.",
                "clip",
            )

    def sigmas(self) -> torch.Tensor:
        """Return the noise levels of the model's own sampling object, ModelSampling nodes included."""
        if self._levels is None or self._levels[0] is not self._sampling:
            # Copy them once: each copy from a device waits until the device has finished its queued work.
            self._levels = self._sampling, self._sampling.sigmas.detach().to("cpu", torch.float32)
        return self._levels[1].clone()

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale latents by the model's own latent format."""
        # In training, use the loaded base: ComfyUI may unload the shared model meanwhile, and an upstream node's latent
        # format with it.
        return (self._base or self._model.model).process_latent_in(latents)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Add noise by the model's own sampling object."""
        with torch.no_grad():
            sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
            x_t = self._sampling.noise_scaling(sigma, noise, x0)
            return x_t / (sigma**2 + 1) ** 0.5 if self._preserves_variance else x_t

    def denoised(self, output: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Turn a raw output into x0 by the model's own sampling object."""
        return self._sampling.calculate_denoised(sigma, output, x_t)

    def predict(self, x_t: torch.Tensor, sigma: torch.Tensor, conditioning: Sequence[Conditioning]) -> torch.Tensor:
        """Return the raw output. Samples whose conditionings ComfyUI would not batch run one after the other."""
        x_t = self._with_first_frames(x_t, sigma, conditioning)
        conds = [self._conds(x_t[index : index + 1], condition) for index, condition in enumerate(conditioning)]
        groups = _joinable(conds)
        if len(groups) == 1:
            return self._forward(x_t, sigma, conds)
        parts = {}
        for group in groups:
            rows = upload(torch.tensor(group), x_t.device)
            output = self._forward(x_t[rows], sigma[rows], [conds[index] for index in group])
            parts.update(zip(group, output.split(1), strict=True))
        return torch.cat([parts[index] for index in range(len(conds))])

    def _with_first_frames(
        self, x_t: torch.Tensor, sigma: torch.Tensor, conditioning: Sequence[Conditioning]
    ) -> torch.Tensor:
        """Return x_t with the first frames that get no noise, scaled as ComfyUI's KSamplerX0Inpaint scales them."""
        if all(condition.first_frame is None for condition in conditioning):
            return x_t
        rows = []
        for row, level, condition in zip(x_t.split(1), sigma.split(1), conditioning, strict=True):
            given = _first_frame(row, condition)
            if given:
                mask = given["denoise_mask"]
                row = row * mask + self._base.scale_latent_inpaint(x=row, sigma=level, noise=row, **given) * (1 - mask)
            rows.append(row)
        return torch.cat(rows)

    def _conds(self, x_t: torch.Tensor, conditioning: Conditioning) -> dict:
        """Return one sample's inputs besides x_t and timestep, as ComfyUI's own sampler makes them."""
        values = encoded_prompts.values_of(conditioning.tensors, self.device)
        facts = {
            # A prompt that the graph has encoded may bring sizes of its own, then all of them.
            **({} if "width" in values else _sizes(conditioning)),
            **self._guidance,
            **families.image_conditioning_values(self._image_conditioning, conditioning, self.device),
            # ComfyUI passes None for text encoders without a pooled output; some models look the name up.
            "pooled_output": None,
            "latent_image": torch.zeros_like(x_t),
            **_first_frame(x_t, conditioning),
            "latent_shapes": [x_t.shape],
            "prompt_type": "positive",
        }
        # Text that was encoded with an autograd graph keeps its graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trained(values.values())):
            conds = self._base.extra_conds(**{**facts, **values, "noise": x_t, "device": self.device})
            return {name: cond.process_cond(batch_size=1, area=None) for name, cond in conds.items()}

    def _forward(self, x_t: torch.Tensor, sigma: torch.Tensor, conds: list[dict]) -> torch.Tensor:
        dtype = self.compute_dtype
        # Check at each call: a method may have put weights of another dtype into the tree.
        _cast_where_needed(self._casting, dtype)
        trained = _trained(cond.cond for sample_conds in conds for cond in sample_conds.values())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            joined = {name: conds[0][name].concat([other[name] for other in conds[1:]]) for name in conds[0]}
            x = self._sampling.calculate_input(sigma, x_t)
            concat = joined.pop("c_concat", None)
            if concat is not None:
                x = torch.cat([x, upload(concat, x.device).to(x.dtype)], dim=1)
            context = joined.pop("c_crossattn", None)
            if context is not None:
                context = upload(context, self.device).to(dtype)
            extra = {name: _cast(value, self.device, dtype) for name, value in joined.items()}
            t = self._sampling.timestep(sigma).float()
            t = self._base.process_timestep(t, x=x_t, **extra)
            shapes = extra.pop("latent_shapes", None)
        if hasattr(self.module, "clear_kv_cache"):
            # The network's text cache holds results of an earlier step's weights.
            self.module.clear_kv_cache()
        options = self._step_options(sigma, context)
        x = x.to(dtype)
        if shapes is not None:
            x = comfy.utils.unpack_latents(x, shapes)
        output = self.module(x, t, context=context, control=None, transformer_options=options, **extra)
        if isinstance(output, (list, tuple)):
            raise ModelError(
                "Cannot train a model that returns several latents at once.", "Use another model.", "model"
            )
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _step_options(self, sigma: torch.Tensor, context: torch.Tensor | None) -> dict:
        options = comfy.model_patcher.create_model_options_clone({"transformer_options": self._options})
        options = options["transformer_options"]
        options["cond_or_uncond"] = [0]
        options["sigmas"] = sigma
        for name, positions in families.token_positions(self._base, context).items():
            options[name] = {**positions, **options.get(name, {})}
        return options

    @contextmanager
    def training(self, compute_dtype: str, offloaded: bool = False) -> Iterator[None]:
        """Let ComfyUI place the weights, build the private tree, and discard it at the end in any case.

        Args:
            compute_dtype: "auto" for the dtype the model computes in, or "fp32", "bf16", "fp16".
            offloaded: keep the weights of blocks off the device, as the protocol says.
        """
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            self._model = classic(self._model)
            self._sampling = self._model.get_model_object("model_sampling")
            stack.enter_context(placement.placed(self._model, offloaded))
            self._pins = stack.enter_context(placement.pinning(self.device))
            base = self._model.model
            check_trainable(base, None if offloaded else self.device)
            warn_of_model(self._model, self.family)
            own_weights(base.diffusion_model)
            self.compute_dtype = _DTYPES.get(compute_dtype) or _inference_dtype(base)
            tree = private_tree(base.diffusion_model)
            gguf.as_plain_layers(tree)
            quantized.as_linears(tree, base.diffusion_model)
            placement.mark_plain(tree)
            if offloaded:
                mark_offloaded(tree, self.device)
            self.use_tree(tree)
            self._options = placement.transformer_options(self._model)
            is_patched = placement.is_patched(self._model)
            self.adds_in_place = family_of(self.family).adds_in_place or is_patched
            self.position_options = () if is_patched else _POSITION_OPTIONS
            try:
                with compat.training_flag(True), compat.differentiable_rope(), compat.recorded_blocks(self.module):
                    yield
            finally:
                self._sampler = None
                self._base = None
                self._casting = []
                self.module = None
                comfy.model_management.soft_empty_cache()

    @property
    def original(self) -> torch.nn.Module:
        """The graph's network, whose weights the private tree shares."""
        return self._model.model.diffusion_model

    def use_tree(self, tree: torch.nn.Module) -> None:
        """Train this tree over the graph's weights. Use it only within `training`."""
        self.module = tree
        # List the layers once: searching the tree takes longer than checking their dtypes.
        self._casting = [layer for layer in tree.modules() if hasattr(layer, "comfy_cast_weights")]
        self._base = placement.over(self._model.model, tree, self.device)
        self._sampler = sampling.PreviewSampler(self._model, self._base, self._text, self._vae)

    def preview(self, requests: Sequence[PictureRequest]) -> list[Image.Image | list[Image.Image]]:
        """Draw with ComfyUI's own sampler on the tree as trained so far."""
        _cast_where_needed(self._casting, _inference_dtype(self._base))
        try:
            with compat.training_flag(False):
                return self._sampler.draw(requests)
        finally:
            # ComfyUI may have moved the tree to make room while it sampled.
            place(self.module, self.device)

    @contextmanager
    def sharing_device(self, size: int) -> Iterator[None]:
        """Let another model use the device within the block. Keep the tree off the device if both do not fit.

        Args:
            size: bytes that the other model needs.
        """
        is_moved = self._is_in_the_way(size)
        if is_moved:
            self.make_room(weights=True)
            place(self.module, torch.device("cpu"))
        try:
            yield
        finally:
            self.make_room()
            if is_moved:
                place(self.module, self.device)

    def _is_in_the_way(self, size: int) -> bool:
        """Report whether a model of this size does not fit beside the tree, and the tree can be moved."""
        # The weights of several processes (torch's DTensor) stay: the other processes hold shards of them.
        if self.device.type == "cpu" or any(hasattr(weight, "device_mesh") for weight in self.module.parameters()):
            return False
        free = self.free_memory()
        if free is None or free >= size:
            return False
        self.make_room()
        return self.free_memory() < size

    def make_room(self, weights: bool = False) -> None:
        """Free device memory through ComfyUI. With `weights`, free also the graph's weights that the tree gave up."""
        management = comfy.model_management
        mine = [entry for entry in management.current_loaded_models if entry.model is self._model]
        gc.collect()
        management.free_memory(placement.EVERYTHING, self.device, keep_loaded=[] if weights else mine)
        management.soft_empty_cache()

    def free_memory(self) -> int | None:
        """Return ComfyUI's count of free bytes, torch's reserve included; None on DirectML, where it has none."""
        if getattr(comfy.model_management, "directml_enabled", None):
            return None
        return int(comfy.model_management.get_free_memory(self.device))

    def pin(self, weight: torch.Tensor) -> bool:
        """Pin a weight through ComfyUI and within ComfyUI's limits."""
        return self._pins.add(weight)

    def adapter_name(self, path: str) -> str:
        """Return kohya's name of a module, in diffusers' module names if the family's files use those."""
        name = self.published_name(path) if family_of(self.family).diffusers_names else None
        return "lora_unet_" + (name or path).replace(".", "_")

    def own_name(self, path: str) -> str:
        """Return the module's name in the model's own checkpoint."""
        return f"diffusion_model.{path}"

    def published_name(self, path: str) -> str | None:
        """Return the module's path in diffusers' UNet, for the families whose layout ComfyUI's map covers."""
        name = self._diffusers_names.get(f"{path}.weight")
        return None if name is None else name[: -len(".weight")]

    @functools.cached_property
    def _diffusers_names(self) -> dict[str, str]:
        names = comfy.utils.unet_to_diffusers(self._model.model.model_config.unet_config)
        # ComfyUI's map has two names for one layer, in no certain order. diffusers' UNets have either one or the other.
        other = "class_embedding." if self.family.startswith("SDXL") else "add_embedding."
        return {ours: theirs for theirs, ours in names.items() if not theirs.startswith(other)}

    def published_splits(self, path: str) -> tuple[LayerSplit, ...]:
        """Return the splits of a layer in ComfyUI's diffusers map of a transformer; none for other families."""
        return self._splits.get(f"{path}.weight", ())

    @functools.cached_property
    def _splits(self) -> dict[str, tuple[LayerSplit, ...]]:
        return families.diffusers_splits(self._model)

    def check_adapter(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """Return the keys that ComfyUI's own LoRA loader would not use on this model."""
        return unread_keys(self._model, self._text and self._text.clip, tensors)

    def fingerprint(self) -> str:
        """Return the fingerprint of the MODEL as it arrived."""
        return self._fingerprint

    def earlier_fingerprint(self) -> str:
        """Return the fingerprint that earlier versions computed from samples of the weights."""
        return self._earlier_fingerprint


def _first_frame(x_t: torch.Tensor, conditioning: Conditioning) -> dict[str, torch.Tensor]:
    """Return the sampler's latent and noise mask of a first frame, as ComfyUI's image to video nodes make them."""
    if conditioning.first_frame is None:
        return {}
    latent, mask = torch.zeros_like(x_t), torch.ones_like(x_t)
    latent[:, :, :1] = upload(conditioning.first_frame, x_t.device)
    mask[:, :, :1] = 0
    return {"latent_image": latent, "denoise_mask": mask}


def _sizes(conditioning: Conditioning) -> dict[str, int]:
    width, height = conditioning.original_size
    target_width, target_height = conditioning.target_size
    return {
        "width": width,
        "height": height,
        "crop_w": conditioning.crop[0],
        "crop_h": conditioning.crop[1],
        "target_width": target_width,
        "target_height": target_height,
    }


def _inference_dtype(base) -> torch.dtype:
    return base.manual_cast_dtype or base.get_dtype()


def _cast_where_needed(layers: list[torch.nn.Module], dtype: torch.dtype) -> None:
    """Let ComfyUI's layers cast weights that are stored in another dtype; on the private tree only."""
    for layer in layers:
        weight = layer._parameters.get("weight")
        if weight is not None and weight.dtype != dtype:
            layer.comfy_cast_weights = True


def _trained(values: Iterable) -> bool:
    parts = (part for value in values for part in (value if isinstance(value, list) else [value]))
    return any(torch.is_tensor(part) and part.requires_grad for part in parts)


def _cast(value, device, dtype):
    if isinstance(value, list):
        return [_cast(part, device, dtype) for part in value]
    if torch.is_tensor(value):
        # As in ComfyUI: integers keep their dtype, all other tensors get the dtype of the activations.
        there = upload(value, device)
        return there if value.dtype in (torch.int, torch.long) else there.to(dtype)
    return value


def _joinable(conds: list[dict]) -> list[list[int]]:
    """Return groups of sample indices that ComfyUI itself would run as one batch, by ComfyUI's own rule."""
    groups: list[list[int]] = []
    for index, cond in enumerate(conds):
        for group in groups:
            first = conds[group[0]]
            if first.keys() == cond.keys() and all(first[name].can_concat(cond[name]) for name in cond):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups
