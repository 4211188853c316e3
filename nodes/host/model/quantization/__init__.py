"""Layers of ComfyUI and of other packs whose weights are quantized."""
