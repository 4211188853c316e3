"""Assemble the tiny base: one SD1.x file that an unmodified ComfyUI loads as a checkpoint.

    python -m tests.toy.assemble OUT.safetensors

The shipped thin weights are zero-padded into the full layout (UNet of width 320, TAESD of width 64), and the text
encoder is rebuilt from its seed. The same inputs give the same bytes.
"""

import argparse
import hashlib
import logging
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from . import text, thin

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).with_name("weights")
MARKER = "graft_toy_base"
LATENT_SCALE = 0.18215


def assemble(path, weights=WEIGHTS):
    """Write the checkpoint to path unless it is there already; return the path.

    weights is the folder of unet.safetensors and vae.safetensors. A file made from other weights, or by other code, is
    replaced. The file appears complete or not at all.
    """
    path = Path(path)
    fingerprint = compute_fingerprint(weights)
    if read_marker(path) == fingerprint:
        log.info("%s is up to date", path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.stem) as folder:
        partial = Path(folder) / path.name
        save_file(build_state(weights), partial, metadata={MARKER: fingerprint})
        os.replace(partial, path)
    return path


def compute_fingerprint(weights=WEIGHTS):
    """Return a hash of everything that decides the checkpoint's content: both weight files and the code."""
    digest = hashlib.sha256()
    sources = [Path(weights) / "unet.safetensors", Path(weights) / "vae.safetensors"]
    sources += [Path(module) for module in (__file__, text.__file__, thin.__file__)]
    for source in sources:
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()


def read_marker(path):
    """Return the fingerprint in a checkpoint's header, or None for a missing, broken or foreign file."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(MARKER)
    except (OSError, SafetensorError):
        return None


def build_state(weights=WEIGHTS):
    """Return all tensors of the checkpoint by their SD1.x names: UNet and VAE float32, text encoder float16."""
    unet = thin.pad_unet(_load(weights, "unet"))
    vae = thin.pad_vae(_load(weights, "vae"))
    vae["vae_scale"] = torch.tensor(LATENT_SCALE)
    vae["vae_shift"] = torch.tensor(0.0)
    clip = {name: value.half() for name, value in text.build_clip().items()}
    state = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    state.update({f"first_stage_model.{k}": v for k, v in vae.items()})
    state.update({f"cond_stage_model.transformer.{k}": v for k, v in clip.items()})
    return {name: value.contiguous() for name, value in state.items()}


def _load(weights, name):
    return {k: v.float() for k, v in load_file(Path(weights) / f"{name}.safetensors").items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    print(assemble(args.out, args.weights))


if __name__ == "__main__":
    main()
