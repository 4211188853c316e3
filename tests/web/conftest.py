"""The fixtures that the tests of ComfyUI's page share."""

import shutil

import pytest

from tests.support import panel as panels
from tests.toy import world


@pytest.fixture(scope="module")
def page(server, chromium):
    """ComfyUI's page, opened once for a file of tests."""
    return chromium.open(server.url)


@pytest.fixture(params=[False, True], ids=["canvas", "nodes2"])
def renderer(page, request):
    """Each of the frontend's two renderers; whether it is the new one."""
    page.set_setting("Comfy.VueNodes.Enabled", request.param)
    yield request.param
    page.set_setting("Comfy.VueNodes.Enabled", False)


@pytest.fixture(scope="module")
def folder(server, request):
    """Name of the folder of pictures that all trainings of a file share."""
    path = server.path("input", request.path.stem)
    shutil.copytree(world.CONCEPT_FOLDER / "toy", path, dirs_exist_ok=True)
    return path.name


@pytest.fixture(scope="module")
def graph(page, folder):
    """A workflow: checkpoint, dataset, options, trainer and what saves its adapter."""
    return panels.draw_graph(page, folder)
