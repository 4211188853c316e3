"""What the graph sees: the list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from . import adapter, dataset, dreambooth, options, train
from .host import paths

NODES = [*dataset.NODES, *train.NODES, *dreambooth.NODES, *adapter.NODES, *options.NODES]


class GraftExtension(ComfyExtension):
    """The pack, as ComfyUI asks for it."""

    async def on_load(self) -> None:
        paths.register()

    async def get_node_list(self) -> list[type]:
        return NODES
