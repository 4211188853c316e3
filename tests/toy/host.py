"""The real host in this process: ComfyUI's own loader, text encoder, sampler and VAE, on the CPU.

COMFYUI_PATH names the folder of an unmodified ComfyUI. Importing this module changes nothing; `use_comfyui` puts the
folder at the end of sys.path.
"""

import os
import sys

import numpy as np
import torch


def use_comfyui(folder=None):
    """Make `comfy` importable and set it to the CPU; if there is none, raise an error that names the cure."""
    folder = folder or os.environ.get("COMFYUI_PATH")
    if not folder or not os.path.isdir(os.path.join(folder, "comfy")):
        raise FileNotFoundError(f"no ComfyUI in {folder!r}: set COMFYUI_PATH to the folder that holds main.py")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True


def load(path, folder=None):
    """Load a checkpoint file as (model, clip, vae), like CheckpointLoaderSimple."""
    use_comfyui(folder)
    import comfy.sd

    return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]


@torch.no_grad()
def encode(clip, prompt):
    """Return a prompt's context [1, 77, 768], like CLIPTextEncode."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0]


@torch.no_grad()
def generate(model, clip, vae, prompts, seed=0, steps=20, cfg=4.0, batch=16):
    """Draw one 64x64 picture per prompt, euler on the normal schedule: [n, 64, 64, 3] uint8.

    Picture i depends on its prompt, the seed and i. Prompts of a batch are sampled side by side.
    """
    import comfy.sample

    contexts = {prompt: encode(clip, prompt) for prompt in {"", *prompts}}
    pictures = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        noise = torch.cat([draw_noise(seed * 10_000 + first + i) for i in range(len(part))])
        positive = [[torch.cat([contexts[prompt] for prompt in part]), {}]]
        negative = [[contexts[""], {}]]
        latents = comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", positive, negative,
            torch.zeros_like(noise), disable_pbar=True, seed=seed,
        )  # fmt: skip
        pictures.append((vae.decode(latents) * 255).round().numpy().astype(np.uint8))
    return np.concatenate(pictures)


def draw_noise(seed):
    """Return standard normal noise for one 64x64 picture: [1, 4, 8, 8]."""
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
