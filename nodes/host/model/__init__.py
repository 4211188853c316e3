"""ComfyUI models for training: denoiser, text encoder, VAE, LoRA, patches of ComfyUI."""
