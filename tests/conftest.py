"""Fixtures shared by all tests. A test that uses none of them starts no server and no browser."""

import contextlib
import gc
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import pack
from tests.support.base import get_tiny_base
from tests.support.collection import Collection
from tests.support.server import ComfyServer, ServerError, link

pack.hide_root()
pack.load_pack()

# Hypothesis uses the same examples in every run and fails none because the machine is busy.
settings.register_profile("graft", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graft")


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="run the long trials at their full counts")
    parser.addoption("--quick", action="store_true", help="run what needs neither ComfyUI nor several processes")
    parser.addoption("--margins", action="store_true", help="list numeric checks that are close to their bounds")


def pytest_configure(config):
    config.pluginmanager.register(Collection())
    if config.getoption("--margins"):
        from tests.support.margins import Margins

        config.pluginmanager.register(Margins())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Empty the queue of a failed test's server: a training that the test left would delay all later tests."""
    report = yield
    server = item.funcargs.get("server") if call.when == "call" and report.failed else None
    if isinstance(server, ComfyServer) and server.is_running():
        with contextlib.suppress(OSError, ServerError):
            server.clear_queue()
            server.interrupt()
    return report


@pytest.fixture(scope="module", autouse=True)
def frozen_objects():
    """Exclude all present objects from garbage collection: those of the imports alone cost half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds():
    """Seed all generators before each test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trials(request):
    """Return trials(quick, full), the number of trials: `quick` by default, `full` with --soak."""
    soak = request.config.getoption("--soak")
    return lambda quick, full: full if soak else quick


@pytest.fixture(scope="session")
def sampler_steps(trials):
    """Return the sampler steps of tests that judge many pictures; the tiny base draws as well in half of its 20."""
    return trials(10, 20)


@pytest.fixture(scope="session")
def comfy():
    """Load ComfyUI into this process, on the CPU: `comfy.path`, `.version`, `.base`. Import ComfyUI modules later."""
    return pack.use_comfy()


@pytest.fixture(scope="session")
def tiny_base():
    """Return the path of the tiny pretrained base, a checkpoint file in SD1.x layout."""
    return get_tiny_base()


@pytest.fixture(scope="session")
def server(tiny_base, tmp_path_factory):
    """Start the real server with the pack and the tiny base (`graft_tiny.safetensors`), shared by all tests."""
    server = ComfyServer(tmp_path_factory.mktemp("server"))
    link(tiny_base, server.path("models", "checkpoints", tiny_base.name))
    with server:
        yield server


@pytest.fixture
def make_server(tiny_base, tmp_path):
    """Return make_server(name="server", **ComfyServer's arguments), which makes a private server, not yet started.

    For tests that kill or restart a server. The same name gives the same base directory.
    """
    made = []

    def make(name="server", **arguments):
        made.append(ComfyServer(tmp_path / name, **arguments))
        link(tiny_base, made[-1].path("models", "checkpoints", tiny_base.name))
        return made[-1]

    yield make
    for server in made:
        server.kill()


@pytest.fixture(scope="session")
def shared_chromium(tmp_path_factory):
    """Start the one Chromium that all browser tests share."""
    from tests.support.browser import Browser

    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def chromium(shared_chromium):
    """Return the shared Chromium. It leaves its page after the file: the frontend draws without end."""
    yield shared_chromium
    shared_chromium.leave()


@pytest.fixture
def browser(chromium):
    """Return the browser; `browser.open(server.url)` gives a page with a fresh profile."""
    return chromium
