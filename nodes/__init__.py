"""The pack's ComfyUI extension: the list of its nodes."""

from comfy_api.latest import ComfyExtension

from . import adapter, class_images, compare, dataset, imports, job, options, save, tools, train
from .checks import find_faults
from .host import paths
from .host.server import routes, validation

NODES = [
    *dataset.NODES,
    *save.NODES,
    *class_images.NODES,
    *train.NODES,
    *job.NODES,
    *adapter.NODES,
    *tools.NODES,
    *compare.NODES,
    *options.NODES,
    *imports.NODES,
]


class GraftExtension(ComfyExtension):
    """The extension that ComfyUI loads."""

    async def get_node_list(self) -> list[type]:
        # Register here and not in `on_load`, which older ComfyUI versions do not call.
        paths.register()
        routes.register()
        validation.register(find_faults)
        return NODES
