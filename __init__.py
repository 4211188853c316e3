"""Graft: fine-tuning as nodes in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI once; imported here so that the pack can be read without ComfyUI."""
    from .nodes import GraftExtension

    return GraftExtension()
