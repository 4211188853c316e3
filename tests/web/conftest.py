"""Fixtures shared by the tests of ComfyUI's page."""

import shutil

import pytest

from tests.support import panel as panels
from tests.toy import world


@pytest.fixture(scope="module")
def page(server, chromium):
    """Open ComfyUI's page once for a file of tests."""
    return chromium.open(server.url)


@pytest.fixture(params=[False, True], ids=["canvas", "nodes2"])
def renderer(page, request):
    """Select each of the frontend's two renderers; yield True for the new one."""
    page.set_setting("Comfy.VueNodes.Enabled", request.param)
    yield request.param
    page.set_setting("Comfy.VueNodes.Enabled", False)


@pytest.fixture(scope="module")
def folder(server, request):
    """Return the name of the picture folder that all trainings of a file share."""
    path = server.path("input", request.path.stem)
    shutil.copytree(world.CONCEPT_FOLDER / "toy", path, dirs_exist_ok=True)
    return path.name


@pytest.fixture(scope="module")
def graph(page, folder):
    """Return a workflow of checkpoint, dataset, options, trainer and a node that saves its adapter."""
    return panels.draw_graph(page, folder)
