"""Readers and makers of adapter files: the makers' own libraries on tiny networks, as oracles.

A reader takes a file and returns the network's output with it. ComfyUI, LyCORIS, diffusers and peft are themselves;
sd-scripts is its documented formula on its documented names.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from tests.support import diffusers_host, models, networks
from tests.support.published import PUBLISHED, Published

# SDXL as published has two residual blocks per level, on which its names depend, and several layers per transformer,
# which tell it from SD1.
_SDXL = "SDXL with two blocks per level"
_DEPTHS = {"transformer_depth": [0, 0, 2, 2], "transformer_depth_output": [0, 0, 0, 2, 2, 2], "num_res_blocks": [2, 2]}
_DEPTHS["transformer_depth_middle"] = 2
models.SIZES.setdefault(
    _SDXL, networks.Tiny(networks._of("SDXL", **{**networks._sdxl(), **_DEPTHS}), (4, 8, 8), (77, 48), 1280)
)


class CannotReadError(Exception):
    """A reader has no place for a part of a file."""


@dataclass(frozen=True)
class Family:
    """A family's tiny network, in ComfyUI and in diffusers.

    Attributes:
        size: key of its network in `models.SIZES`.
        published: its description for diffusers, None for SD1.
        sigma: noise level of the prediction to compare.
        pipeline: returns diffusers' pipeline around a network.
        targets: choice of the targets that trainings use.
    """

    size: str
    published: Published | None
    sigma: float
    pipeline: Callable

    @property
    def point(self):
        """Return (x, sigma, conditioning) of the prediction."""
        x = torch.randn(1, *models.SIZES[self.size].latent, generator=torch.Generator().manual_seed(9))
        return x, self.sigma, models.conditioning(self.size, 9)

    def model(self):
        """Return the MODEL anew, because ComfyUI leaves the weights of an applied adapter in place."""
        with torch.inference_mode():
            return models.patcher(self.size)

    def predict(self, model):
        """Return the raw output of a MODEL."""
        x, sigma, one = self.point
        return (x - models.denoised(model, x, sigma, one)) / sigma

    def network(self):
        """Return diffusers' network with the weights of the family's MODEL."""
        model = self.model()
        if self.published is None:
            return diffusers_host.convert_sd1(model)
        return self.published.network(model)[0].requires_grad_(False)

    def predict_published(self, network):
        """Return the output of diffusers' network."""
        x, sigma, one = self.point
        if self.published is None:
            return diffusers_host.raw_output(network, x, sigma, one)
        with torch.no_grad():
            return self.published.run(network, x, torch.tensor([sigma]), [one])


def _sd1_pipeline(network):
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        None, None, None, network, DDPMScheduler(), None, None, requires_safety_checker=False
    )


def _sdxl_pipeline(network):
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(None, None, None, None, None, network, DDPMScheduler(), add_watermarker=False)


def _sd3_pipeline(network):
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(network, *[None] * 8)


def _flux_pipeline(network):
    from diffusers import FluxPipeline

    return FluxPipeline(*[None] * 6, network)


def _deep_sdxl() -> Published:
    shallow = PUBLISHED["SDXL"]
    config = {**shallow.config, "layers_per_block": 2, "transformer_layers_per_block": (1, 2)}
    return Published(_SDXL, shallow.kind, config, shallow.names, shallow.run)


FAMILIES = {
    "SD1": Family("SD1", None, 2.0, _sd1_pipeline),
    "SDXL": Family(_SDXL, _deep_sdxl(), 2.0, _sdxl_pipeline),
    "SD3": Family("SD3", PUBLISHED["SD3"], 0.6, _sd3_pipeline),
    "Flux": Family("Flux as in diffusers", PUBLISHED["Flux"], 0.6, _flux_pipeline),
}


@dataclass(frozen=True)
class Trained:
    """A short training's result.

    Attributes:
        adapter: as the training node passes it on.
        output: the network's output with the adapter, in training.
        base: the network's output without.
    """

    family: str
    adapter: object
    output: torch.Tensor
    base: torch.Tensor

    def error(self, output) -> float:
        """Return an output's error relative to the adapter's effect."""
        return float((output - self.output).norm() / (self.output - self.base).norm())


# Standard deviations of trained values with which an adapter changes the output by a tenth to a half.
_SPREADS = {"LoHa": 0.25, "LoKr": 0.15, "OFT": 0.05, "BOFT": 0.05, "IA3": 0.1, "PiSSA": 0.05, "DoRA": 0.1}


@functools.cache
def train(
    family: str, method: str, targets: str = "", spread: float = 0.0, adapter_args: str = "", rank: int = 4
) -> Trained:
    """Return an adapter with random values, and its exact effect.

    Args:
        method: Graft's name of the type; "LoRA with conv" has convolutions too.
        targets: choice of the targets, empty for the type's default.
        adapter_args: as in the node.
    """
    from graft_pack.trainers.formats.adapter import Adapter
    from graft_pack.trainers.methods import METHODS
    from graft_pack.trainers.recipe.parsing import parse_arguments

    known = FAMILIES[family]
    model = known.model()
    fields = {"method": method, "rank": rank, "alpha": 8.0 if METHODS[method].has_rank else 4.0}
    fields["targets"] = targets or METHODS[method].default_targets
    fields["adapter_args"] = parse_arguments(adapter_args)
    with models.in_training(model, known.size, **fields) as training, torch.no_grad():
        source = torch.Generator().manual_seed(3)
        for parameter in training.plan.trainables.values():
            noise = torch.randn(parameter.shape, generator=source) * (spread or _SPREADS.get(method, 0.15))
            parameter.add_(noise)
        x, sigma, one = known.point
        output = (x - models.trained_denoised(training, x, sigma, one)) / sigma
        made = training.plan.export(training.plan.trainables, 0).adapter
        recipe = f'{{"method": "{method}"}}'
        adapter = Adapter(dict(made), {"graft_recipe": recipe}, made.native)
    return Trained(family, adapter, output, known.predict(known.model()))


def read_by_comfyui(family: str, path):
    """Return the output with a file that ComfyUI's own loader applies."""
    import comfy.sd
    import comfy.utils
    from graft_pack.nodes.host.model.lora import unread_keys

    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    model = FAMILIES[family].model()
    unread = unread_keys(model, None, tensors)
    if unread:
        raise CannotReadError(f"ComfyUI does not read {unread[0]}")
    applied, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    return FAMILIES[family].predict(applied)


def read_by_graft(family: str, path):
    """Return the output with a file that Graft loads and applies."""
    from graft_pack.nodes.host.model.lora import apply_adapter, unread_keys
    from graft_pack.trainers.formats.adapter import load_adapter

    adapter, model = load_adapter(str(path)), FAMILIES[family].model()
    if not adapter and adapter.native is None:
        raise CannotReadError("Graft reads nothing")
    unread = unread_keys(model, None, adapter)
    if unread:
        raise CannotReadError(f"Graft does not read {unread[0]}")
    return FAMILIES[family].predict(apply_adapter(model, None, adapter, 1.0, 0.0)[0])


def _kohya_names(tree: torch.nn.Module, prefix: str = "lora_unet_") -> dict[str, torch.nn.Module]:
    """Return the modules of a network by kohya's names."""
    return {prefix + name.replace(".", "_"): module for name, module in tree.named_modules() if name}


def _kohya_network(family: str, path=None):
    """Return (layers by kohya's names, function that predicts with them as they are now).

    kohya's names are those of diffusers' network for SD1, and of the checkpoint's for the others.

    Args:
        path: of a file that may have the names of LyCORIS' wrapper around diffusers' network.
    """
    known = FAMILIES[family]
    is_wrapped = path is not None and any(name.startswith("lycoris_") for name in _layers(path))
    if family == "SD1" or is_wrapped:
        network = known.network()
        names = _kohya_names(network, "lycoris_" if is_wrapped else "lora_unet_")
        return names, lambda: known.predict_published(network)
    model = known.model()
    return _kohya_names(model.model.diffusion_model), lambda: known.predict(model)


def _layers(path) -> dict[str, dict[str, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(str(path)).items():
        name, _, end = key.partition(".")
        layers.setdefault(name, {})[end] = tensor
    return layers


def _lycoris_modules(path, modules):
    """Yield LyCORIS' own module for each layer of a file.

    Raises:
        CannotReadError: LyCORIS has no place for a tensor.
    """
    from lycoris.modules import get_module, make_module

    tensors = load_file(str(path))
    for name, held in _layers(path).items():
        if name not in modules:
            raise CannotReadError(f"LyCORIS finds no layer {name}")
        kind, params = get_module(tensors, name)
        if kind is None or any(end not in kind.weight_list for end in held):
            raise CannotReadError(f"LyCORIS has no place for {sorted(held)}")
        yield make_module(kind, params, name, modules[name])


def read_by_lycoris(family: str, path):
    """Return the output with a file whose layers LyCORIS' own modules compute."""
    modules, predict = _kohya_network(family, path)
    with torch.no_grad():
        for module in list(_lycoris_modules(path, modules)):
            # A full difference takes the layer's weight away, which ComfyUI's loader then misses.
            _merge(module) if module.name == "full" else module.apply_to()
        return predict().clone()


def merge_by_lycoris(family: str, path):
    """Return the output with a file that LyCORIS merges into the weights."""
    modules, predict = _kohya_network(family)
    with torch.no_grad():
        for module in list(_lycoris_modules(path, modules)):
            _merge(module)
        return predict()


def _merge(module) -> None:
    layer = module.org_module[0]
    weight, bias = module.get_merged_weight(shape=layer.weight.shape)
    layer.weight = torch.nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.clone())


_SD_SCRIPTS = {"lora_down.weight", "lora_up.weight", "alpha"}


def read_by_sd_scripts(family: str, path):
    """Return the output with a file by the formula of networks/lora.py: W + alpha / rank * up @ down."""
    from graft_pack.trainers.formats.kohya import _OUTSIDE

    modules, predict = _kohya_network(family)
    for name, held in _layers(path).items():
        if name not in modules or not held.keys() <= _SD_SCRIPTS or _OUTSIDE.match(name.removeprefix("lora_unet_")):
            raise CannotReadError(f"sd-scripts has no place for {name} {sorted(held)}")
        down, up = held["lora_down.weight"], held["lora_up.weight"]
        scale = float(held.get("alpha", len(down))) / len(down)
        weight = modules[name].weight
        changed = weight + (scale * up.flatten(1) @ down.flatten(1)).view_as(weight)
        modules[name].weight = torch.nn.Parameter(changed.detach().clone())
    return predict()


def read_by_diffusers(family: str, path):
    """Return the output with a file that diffusers' pipeline loads."""
    known = FAMILIES[family]
    network = known.network()
    before = known.predict_published(network)
    known.pipeline(network).load_lora_weights(str(path))
    output = known.predict_published(network)
    if torch.equal(output, before):
        raise CannotReadError("diffusers applies nothing")
    return output


def read_by_peft(family: str, path):
    """Return the output with a folder that peft loads onto diffusers' network, with each key in its place."""
    from peft import PeftModel

    known = FAMILIES[family]
    network = known.network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`|.*CUDA extension|Setting boft_n")
        loaded = PeftModel.from_pretrained(network, str(path.parent))
    return known.predict_published(loaded.base_model.model)


READERS = {
    "ComfyUI": read_by_comfyui,
    "Graft": read_by_graft,
    "sd-scripts": read_by_sd_scripts,
    "LyCORIS": read_by_lycoris,
    "diffusers": read_by_diffusers,
    "peft": read_by_peft,
}


def save(adapter, folder, format: str):
    """Save an adapter as the node does and return the path of the file."""
    from graft_pack.trainers.formats.adapter import save_adapter

    name = "adapter_model" if format == "peft" else "adapter"
    path = folder / format / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=format != "peft")
    if format == "peft":
        path.parent.rmdir()
    save_adapter(str(path), adapter, "adapter", format)
    return path


@dataclass(frozen=True)
class Made:
    """A file of another library, and its exact effect as that library computes it.

    Attributes:
        output: the network's output with the adapter.
        base: the network's output without.
    """

    family: str
    path: object
    output: torch.Tensor
    base: torch.Tensor

    error = Trained.error


def _is_adapted(name: str, module: torch.nn.Module, with_convolutions: bool) -> bool:
    is_linear = isinstance(module, torch.nn.Linear) and "attn" in name
    is_spatial = isinstance(module, torch.nn.Conv2d) and "resnets" in name and module.kernel_size != (1, 1)
    return is_linear or (with_convolutions and is_spatial)


def _scatter(parameters, spread: float) -> None:
    """Fill parameters with random values. Magnitudes stay near their values."""
    source = torch.Generator().manual_seed(7)
    for name, parameter in parameters:
        noise = torch.randn(parameter.shape, generator=source)
        is_magnitude = "dora_scale" in name or "magnitude" in name
        parameter.data = parameter.data * (1 + 0.2 * noise) if is_magnitude else spread * noise


def make_by_lycoris(family: str, algorithm: str, folder, with_convolutions: bool = False, **options) -> Made:
    """Return a file that LyCORIS writes, with random values at alpha 2.

    Args:
        algorithm: LyCORIS' name: "lora", "loha" or "lokr".
        options: arguments of LyCORIS' module.
    """
    from lycoris.modules import LoConModule, LohaModule, LokrModule
    from safetensors.torch import save_file

    kind = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}[algorithm]
    modules, predict = _kohya_network(family)
    with torch.no_grad():
        base, tensors = predict().clone(), {}
        for name, module in modules.items():
            if _is_adapted(name, module, with_convolutions):
                adapted = kind(name, module, 1.0, lora_dim=4, alpha=2.0, **options)
                _scatter(adapted.named_parameters(), 0.3)
                adapted.apply_to()
                held = adapted.custom_state_dict()
                tensors |= {f"{name}.{end}": value.detach().clone().contiguous() for end, value in held.items()}
        output = predict().clone()
    path = folder / "made.safetensors"
    save_file(tensors, str(path))
    return Made(family, path, output, base)


def make_by_peft(family: str, config, folder) -> Made:
    """Return a folder that peft writes for diffusers' network, with random values."""
    from peft import get_peft_model

    known = FAMILIES[family]
    network = known.network()
    base = known.predict_published(network)
    config.target_modules = [name for name, module in network.named_modules() if _is_adapted(name, module, False)]
    adapted = get_peft_model(network, config)
    _scatter(((name, value) for name, value in adapted.named_parameters() if value.requires_grad), 0.3)
    adapted.save_pretrained(str(folder / "made"))
    output = known.predict_published(adapted.base_model.model)
    return Made(family, folder / "made" / "adapter_model.safetensors", output, base)


def make_by_diffusers(family: str, folder, with_metadata: bool, **options) -> Made:
    """Return a file that diffusers' pipeline writes, with random values and an alpha unlike the rank."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    known = FAMILIES[family]
    network = known.network()
    base = known.predict_published(network)
    targets = [name for name, module in network.named_modules() if _is_adapted(name, module, False)]
    alpha = 8 if with_metadata else 4
    network.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, **options))
    # Larger values amplify the rounding by which the networks of ComfyUI and diffusers differ.
    _scatter(((name, value) for name, value in network.named_parameters() if "lora" in name), 0.15)
    pipeline = known.pipeline(network)
    state = get_peft_model_state_dict(network)
    part = "unet" if family in ("SD1", "SDXL") else "transformer"
    layers = convert_state_dict_to_diffusers(state) if part == "unet" else state
    more = {f"{part}_lora_adapter_metadata": network.peft_config["default"].to_dict()} if with_metadata else {}
    pipeline.save_lora_weights(str(folder), **{f"{part}_lora_layers": layers}, weight_name="made.safetensors", **more)
    return Made(family, folder / "made.safetensors", known.predict_published(network), base)
