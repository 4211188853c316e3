"""The only place that imports ComfyUI: it meets `trainers` through the protocols there."""
