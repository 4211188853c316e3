"""The engine's three protocols over diffusers: without ComfyUI, and a second implementation for the same weights."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from graft_pack.trainers.protocols import Geometry, Host
from torch.nn import functional
from torch.overrides import TorchFunctionMode

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
TOKENS, WIDTH = 16, 16


class CastWeights(TorchFunctionMode):
    """Mode in which layers cast their weights to the dtype of their input."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        layers = (functional.linear, functional.conv2d, functional.group_norm, functional.layer_norm)
        if func in (*layers, torch.conv2d, torch.group_norm, torch.layer_norm):
            dtype = args[0].dtype
            args = [value.to(dtype) if torch.is_tensor(value) else value for value in args]
            kwargs = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


class DiffusersDenoiser:
    """A UNet2DConditionModel of the SD1 kind. Training changes the module itself, not a private tree over it."""

    noise_scale = 1.0
    sigma_data = 1.0
    family = "SD1"
    conditioning_kind = ""
    takes_first_frame = False
    adds_in_place = False
    position_options = ()

    def __init__(self, unet, prediction_type="epsilon"):
        self._unet = unet.requires_grad_(False).eval()
        self.scheduler = DDPMScheduler(prediction_type=prediction_type, **SCHEDULE)
        self.parameterization = {"epsilon": "eps", "v_prediction": "v"}[prediction_type]
        self.device = torch.device("cpu")
        self.compute_dtype = torch.float32
        self.module = None
        self.calls = 0

    def geometry(self, resolution):
        return Geometry(resolution or 64, 16)

    def empty_latent(self, size):
        return torch.zeros(1, 4, size[1] // 8, size[0] // 8)

    def check_inputs(self, latent, conditioning):
        """Accept everything, because both parts were made for each other here."""

    def sigmas(self):
        bar = self.scheduler.alphas_cumprod
        return ((1 - bar) / bar).sqrt()

    def scale_latents(self, latents):
        return latents

    def add_noise(self, x0, noise, sigma):
        return x0 + sigma.view(-1, 1, 1, 1) * noise

    def denoised(self, output, x_t, sigma):
        sigma = sigma.view(-1, 1, 1, 1)
        if self.parameterization == "eps":
            return x_t - sigma * output
        norm = (sigma**2 + 1).sqrt()
        return (x_t / norm - sigma * output) / norm

    def predict(self, x_t, sigma, conditioning):
        self.calls += 1
        scaled = x_t / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()
        context = torch.cat([one.tensors["cross_attn"] for one in conditioning])
        return self._run(scaled, self.timestep(sigma), context)

    def _run(self, x, t, context):
        # Like ComfyUI's layers: weights in another dtype than the activations are cast during the forward.
        if hasattr(self._unet, "unshard"):
            # FSDP2 puts the weights into the layers during the forward, too late for `functional_call`.
            with CastWeights():
                return self._unet(x, t, context).sample
        weights = {name: weight for name, weight in self._unet.named_parameters() if weight.is_floating_point()}
        halves = {name: weight.float() for name, weight in weights.items() if weight.dtype != x.dtype}
        return torch.func.functional_call(self._unet, halves, (x, t, context)).sample

    def timestep(self, sigma):
        """Return the index of the nearest level, [B]."""
        return (self.sigmas()[None] - sigma[:, None]).abs().argmin(1)

    def preview(self, requests):
        scheduler = EulerDiscreteScheduler(prediction_type=self.scheduler.config.prediction_type, **SCHEDULE)
        return [self._draw(request, scheduler) for request in requests]

    def _draw(self, request, scheduler):
        scheduler.set_timesteps(request.steps)
        source = torch.Generator().manual_seed(request.seed)
        x = torch.randn(1, 4, request.size[1] // 8, request.size[0] // 8, generator=source)
        x = x * scheduler.init_noise_sigma
        context = WordEncoder().encode(request.prompt)["cross_attn"]
        for t in scheduler.timesteps:
            x = scheduler.step(self._run(scheduler.scale_model_input(x, t), t, context), t, x).prev_sample
        return picture(x[0, :3].permute(1, 2, 0))

    def free_memory(self):
        return 1 << 40

    def make_room(self, weights=False):
        pass

    def pin(self, weight):
        return False

    @contextmanager
    def training(self, compute_dtype, offloaded=False):
        self.module = self._unet
        try:
            yield
        finally:
            self.module = None

    def adapter_name(self, path):
        return "lora_unet_" + path.replace(".", "_")

    def own_name(self, path):
        return f"model.{path}"

    def published_name(self, path):
        return path

    def published_splits(self, path):
        return ()

    def check_adapter(self, tensors):
        if all(key.startswith("model.") for key in tensors):
            paths = {path for path, _ in self._unet.named_modules()}
            return [key for key in tensors if key.removeprefix("model.").rpartition(".")[0] not in paths]
        names = {self.adapter_name(path.replace(".base_layer", "")) for path, _ in self._unet.named_modules()}
        return [key for key in tensors if key.split(".")[0] not in names and not key.startswith("lora_te_")]

    def fingerprint(self):
        return digest(self._unet) + self.parameterization


class WordEncoder:
    """A text encoder with a random vector for every word: captions differ, and nothing needs a download."""

    sees_pictures = False

    def encode(self, caption):
        rows = [self._vector(word, place) for place, word in enumerate(caption.split()[:TOKENS])]
        rows += [torch.zeros(WIDTH)] * (TOKENS - len(rows))
        return {"cross_attn": torch.stack(rows)[None]}

    def form(self, caption):
        return None

    # The embedding of textual inversion

    device = torch.device("cpu")
    module = None
    attached = ("", None)

    def is_word(self, name):
        return name == "dog"

    def start_vectors(self, text):
        rows = [self._vector(word, 0) for word in text.split()]
        return {"clip_l": torch.stack(rows) if rows else torch.zeros(0, WIDTH)}

    def median_norms(self):
        return {"clip_l": WIDTH**0.5}

    @contextmanager
    def training(self):
        self.module = torch.nn.Module()
        try:
            yield
        finally:
            self.module = None
            self.attached = ("", None)

    def attach(self, name, vectors):
        self.attached = (f"embedding:{name}", vectors["clip_l"])

    def encode_live(self, captions):
        return [self._encode_live(caption) for caption in captions]

    def _encode_live(self, caption):
        word, vectors = self.attached
        rows = []
        for one in (caption.replace(word, f" {word} ") if word else caption).split():
            rows += list(vectors) if one == word else [self._vector(one.strip(","), len(rows))]
        rows += [torch.zeros(WIDTH)] * (TOKENS - len(rows))
        return {"cross_attn": torch.stack(rows[:TOKENS])[None]}

    def _vector(self, word, place):
        seed = int.from_bytes(hashlib.sha256(f"{place} {word}".encode()).digest()[:4], "little")
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))

    def count_tokens(self, caption):
        return len(caption.split())

    def fingerprint(self):
        return "words"


class LayeredEncoder(WordEncoder):
    """The same encoder with a layer that can be adapted, named as in CLIP."""

    def __init__(self):
        with seeded(6):
            self._layer = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def _tree(self):
        attention = torch.nn.ModuleDict({"q_proj": self._layer})
        layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"self_attn": attention})])})
        return torch.nn.ModuleDict({"clip_l": torch.nn.ModuleDict({"encoder": layers})})

    @contextmanager
    def training(self):
        with super().training():
            self.module = LayeredTree(self._tree())
            yield

    def encoders(self):
        return ["clip_l"]

    def adapter_name(self, path):
        return "lora_te_text_model_" + path.removeprefix("clip_l.").replace(".", "_")

    def published_name(self, path):
        return path.removeprefix("clip_l.")

    def encode(self, caption):
        return {"cross_attn": self._layer(super().encode(caption)["cross_attn"])}

    def _encode_live(self, caption):
        layer = self.module.clip_l["encoder"]["layers"][0]["self_attn"]["q_proj"]
        return {"cross_attn": layer(super()._encode_live(caption)["cross_attn"])}

    def fingerprint(self):
        return digest(self._layer)


class LayeredTree(torch.nn.Module):
    """A tree of encoders by name."""

    def __init__(self, encoders):
        super().__init__()
        for name, encoder in encoders.items():
            self.add_module(name, encoder)


class TinyCodec:
    """diffusers' AutoencoderTiny, random and small, eight pixels per latent position."""

    pixels_at_once = 0

    def __init__(self):
        with seeded(5):
            self._vae = AutoencoderTiny(
                encoder_block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                num_encoder_blocks=(1, 1, 1, 1),
                num_decoder_blocks=(1, 1, 1, 1),
            ).eval()
        self.calls = 0

    def encode(self, pixels):
        self.calls += 1
        with torch.no_grad():
            return self._vae.encode(pixels.permute(0, 3, 1, 2) * 2 - 1).latents, None

    def fingerprint(self):
        return digest(self._vae)


class PosteriorCodec(TinyCodec):
    """diffusers' AutoencoderKL, random and small, with a posterior."""

    def __init__(self, seed=5):
        with seeded(seed):
            self._vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8, 8, 8, 8),
                norm_num_groups=4,
                latent_channels=4,
            ).eval()
        self.calls = 0

    def encode(self, pixels):
        self.calls += 1
        with torch.no_grad():
            posterior = self._vae.encode(pixels.permute(0, 3, 1, 2) * 2 - 1).latent_dist
        return posterior.mean, posterior.logvar


def make_unet():
    """Return a UNet of the SD1 kind with random weights: two attention blocks, 0.2 M parameters."""
    with seeded(3):
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=8,
        )


def make_host(report=None, text=None):
    """Return a Host without ComfyUI; two of them are bit-identical."""
    denoiser = DiffusersDenoiser(make_unet())
    return Host(denoiser, text or WordEncoder(), TinyCodec(), report or (lambda event, payload: None))


def convert_sd1(model):
    """Return the network of a tiny SD1 MODEL as diffusers' UNet, by diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    settings = model.model.model_config.unet_config
    widths = tuple(settings["model_channels"] * factor for factor in settings["channel_mult"])
    config = {
        "sample_size": 8,
        "block_out_channels": widths,
        "layers_per_block": settings["num_res_blocks"][0],
        "down_block_types": ("CrossAttnDownBlock2D",) * len(widths),
        "up_block_types": ("CrossAttnUpBlock2D",) * len(widths),
        "cross_attention_dim": settings["context_dim"],
        "attention_head_dim": settings["num_heads"],
    }
    weights = model.model.diffusion_model.state_dict()
    weights = {f"model.diffusion_model.{name}": value.detach().clone() for name, value in weights.items()}
    unet = UNet2DConditionModel(**config)
    unet.load_state_dict(convert_ldm_unet_checkpoint(weights, config))
    return unet.requires_grad_(False).eval()


def raw_output(unet, x, sigma, one):
    """Return the network's output for x [1, C, h, w] at sigma on one Conditioning, without gradients."""
    with torch.no_grad():
        return DiffusersDenoiser(unet).predict(x, torch.tensor([sigma]), [one])


def digest(module):
    """Return a hash of all weights."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode() + value.detach().numpy().tobytes())
    return total.hexdigest()


def picture(values):
    """Convert [H, W, 3] of any range to PIL."""
    from PIL import Image

    return Image.fromarray((values.clamp(0, 1) * 255).byte().numpy().astype(np.uint8))


@contextmanager
def seeded(seed):
    """Seed torch's generator for constructors that draw their weights, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


COLORS = ("red", "green", "blue", "white", "grey", "black")


def make_dataset(count=6, resolution=64):
    """Return pictures of one color each with some grain, in two shapes, each with its own caption."""
    from graft_pack.trainers.data.arrays import from_arrays

    rng = np.random.RandomState(0)
    arrays = []
    for index in range(count):
        shape = (64, 64, 3) if index % 3 else (48, 96, 3)
        arrays.append((rng.rand(*shape) * 60 + 30 * index).astype(np.uint8))
    captions = [f"a {COLORS[index % 6]} picture {index}" for index in range(count)]
    return from_arrays(arrays, captions, "sks", resolution)


def run_session(folder, report=None, host=None, dataset=None, **fields):
    """Run a whole training over diffusers with run, cache and adapters below a folder; return the engine's Result.

    Args:
        fields: fields of the recipe.
    """
    from graft_pack.trainers.engine.session import run_recipe
    from graft_pack.trainers.runs.folders import Folders

    from tests.support import models

    recipe = models.recipe("SD1", **{"steps": 4, "learning_rate": 1e-2, **fields})
    folders = Folders(str(folder / "runs"), str(folder / "cache"), str(folder / "loras"), str(folder / "emb"))
    return run_recipe(recipe, dataset or make_dataset(), host or make_host(report), folders)


def make_item(index, weight=None):
    """Return a dataset item with its own latent and caption."""
    from graft_pack.trainers.preprocessing.items import DatasetItem, Sample
    from graft_pack.trainers.protocols import Conditioning

    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(index))
    conditioning = Conditioning(WordEncoder().encode(f"picture {index}"))
    return DatasetItem(f"picture {index}", (64, 64), 1, lambda turn: Sample(latent, conditioning, weight))


@contextmanager
def planned(items, spread=0.1, **fields):
    """Return (plan, host) of a method, by default LoRA, on random trainable parameters; spread 0 leaves them."""
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.methods import METHODS
    from graft_pack.trainers.steps.plan import Plan

    from tests.support import models

    recipe = models.recipe("SD1", **fields)
    host = make_host()
    with host.denoiser.training("auto"):
        module = host.denoiser.module
        method = METHODS[recipe.method]
        trainables = method.inject(module, method.targets(module, family_of("SD1"), recipe), recipe)
        if spread and method.ranked:
            models.scatter(trainables, spread)
        export = models.exporter(method, recipe, host.denoiser.adapter_name)
        plan = Plan(
            recipe=recipe,
            train=items,
            trainables=trainables,
            export=export,
            switched_off=lambda: method.switched_off(module),
        )
        yield plan, host


def gradient_of(plan, host, batches, step=0):
    """Return (loss, gradient as one vector, names) of a step's batches."""
    from graft_pack.trainers.engine import loop
    from graft_pack.trainers.engine.updater import ParameterUpdater
    from graft_pack.trainers.steps.plan import Window
    from graft_pack.trainers.steps.step import fetch_batch

    from tests.support import models

    for parameter in plan.trainables.values():
        parameter.grad = None
    window = Window.of(step, batches, host.group)
    updater = ParameterUpdater(plan, host)
    losses = loop.accumulate_gradients(plan, host, window, updater, partial(fetch_batch, plan, host))
    return losses.mean, models.joined(p.grad for p in plan.trainables.values()), losses.names


def state_of(result):
    """Return a run's last saved state, as read from its file."""
    return result.run.load(10**9)


def same_state(a, b):
    """Report whether two states are bit-identical, optimizer and average included."""
    plain = ("step", "batches", "losses", "validation", "scaler", "groups", "loss_by_timestep", "loss_by_picture")
    if any(getattr(a, name) != getattr(b, name) for name in plain):
        return False
    slots = [(a.trainables, b.trainables), (a.ema, b.ema)]
    slots += [(a.optimizer[index], b.optimizer.get(index, {})) for index in a.optimizer]
    return len(a.optimizer) == len(b.optimizer) and all(same_tensors(one, other) for one, other in slots)


def same_tensors(a, b):
    """Report whether two dicts of tensors are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
