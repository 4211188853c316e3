"""Training without ComfyUI: data, objective, method, loop, run and file formats. Nothing here imports ComfyUI."""
