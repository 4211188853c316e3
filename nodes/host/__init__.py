"""The only package that imports ComfyUI. It implements the protocols of `trainers`."""
