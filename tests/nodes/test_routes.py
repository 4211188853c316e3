"""Who may ask something of a training, and routes on hosts with and without a server."""

import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def routes(comfy):
    from graft_pack.nodes.host import routes

    return routes


HOST = {"Host": "127.0.0.1:8188"}


@pytest.mark.parametrize(
    "headers, allowed",
    [
        ({}, True),
        ({"Origin": "http://127.0.0.1:8188"}, True),
        ({"Origin": "https://127.0.0.1:8188"}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:8188"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Sec-Fetch-Site": ""}, False),
        ({"Origin": ""}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://127.0.0.1"}, False),
        ({"Origin": "http://127.0.0.1:8188.evil.example"}, False),
        ({"Origin": "http://127.0.0.1:8188@evil.example"}, False),
        ({"Origin": "http://["}, False),
        ({"Origin": "file://127.0.0.1:8188"}, False),
    ],
)
def test_only_pages_of_the_server_and_programs(routes, headers, allowed):
    assert routes.is_same_origin({**HOST, **headers}) is allowed


def test_the_routes_are_added_once(routes, monkeypatch):
    from aiohttp import web

    server = SimpleNamespace(routes=web.RouteTableDef())
    monkeypatch.setattr(routes, "prompt_server", lambda: server)
    routes.register()
    count = len(list(server.routes))
    routes.register()
    assert count == len(list(server.routes)) >= 5
    # aiohttp takes them: none hides another.
    web.Application().add_routes(server.routes)


@pytest.mark.parametrize("there", ["no module", "no instance", "no routes"])
def test_a_host_without_a_server_is_left_alone(routes, monkeypatch, there):
    modules = {
        "no module": None,
        "no instance": SimpleNamespace(PromptServer=SimpleNamespace()),
        "no routes": SimpleNamespace(PromptServer=SimpleNamespace(instance=object())),
    }
    monkeypatch.setitem(sys.modules, "server", modules[there])
    routes.register()
