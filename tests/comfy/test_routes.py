"""Tests of access to a training over HTTP, and of routes on hosts with and without a server."""

import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def routes(comfy):
    from graft_pack.nodes.host.server import routes

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


def browser(host, scheme="http", site=None):
    """Return the headers of a page's POST to the address it was loaded from."""
    return {"Host": host, "Origin": f"{scheme}://{host}", **({"Sec-Fetch-Site": site} if site else {})}


OWN = [
    "127.0.0.1:8188",
    "127.0.0.1",
    "[::1]:8188",
    "localhost:8188",
    "LocalHost",
    "app.localhost:8188",
    "localhost.:8188",
]
OWN += ["192.168.1.5:8188", "10.0.0.2", "[fd00::5]:8188", "203.0.113.9:8188"]
OWN += [
    "workstation:8188",
    "Workstation.local:8188",
    "workstation.lan",
    "gpu.listen:8188",
    "cors.example",
    "comfy.box:80",
]
REBOUND = ["evil.example:8188", "evil.example", "localhost.evil.example:8188", "127.0.0.1.evil.example:8188"]
REBOUND += ["evil-localhost:8188", "workstation.evil.example:8188", "workstation.local.evil.example", "evil.local:8188"]
REBOUND += ["127.0.0.1.nip.io:8188", "evil.example:8188@localhost", "[", "[::1", "", ":8188", "evil.example#localhost"]


@pytest.fixture
def own_names(routes, monkeypatch):
    monkeypatch.setattr(routes.args, "listen", "0.0.0.0,gpu.listen")
    monkeypatch.setattr(routes.args, "enable_cors_header", "https://cors.example", raising=False)
    monkeypatch.setattr(routes.platform, "node", lambda: "Workstation")
    monkeypatch.setenv("GRAFT_HOSTS", "other.name, comfy.box")


@pytest.mark.parametrize("site", [None, "same-origin"])
@pytest.mark.parametrize("host", OWN)
def test_pages_at_this_servers_addresses_may_ask(routes, own_names, host, site):
    assert routes.is_same_origin(browser(host, site=site))


@pytest.mark.parametrize("site", [None, "same-origin"])
@pytest.mark.parametrize("host", REBOUND)
def test_pages_of_rebound_names_may_not(routes, own_names, host, site):
    assert not routes.is_same_origin(browser(host, site=site))


def test_a_proxy_with_tls_may_pass_pages_on(routes, own_names):
    """The proxy puts the page's name into Host, as most do, or the server's own."""
    assert routes.is_same_origin(browser("comfy.example.org", "https", "same-origin"))
    assert routes.is_same_origin({**browser("comfy.example.org", "https", "same-origin"), "Host": "127.0.0.1:8188"})
    assert not routes.is_same_origin(browser("comfy.example.org", "https", "cross-site"))
    # Browsers send Sec-Fetch-Site over TLS, so a request without it has not passed a proxy with TLS.
    assert not routes.is_same_origin(browser("comfy.example.org", "https"))


def test_programs_may_ask_by_any_name(routes, own_names):
    assert routes.is_same_origin({"Host": "whatever.example"})


def test_a_host_open_to_every_page_is_so_by_every_name(routes, monkeypatch):
    monkeypatch.setattr(routes.args, "enable_cors_header", "*", raising=False)
    assert routes.is_same_origin(browser("comfy.example.org:8188"))
    assert not routes.is_same_origin({**browser("a.example"), "Origin": "http://b.example"})


def test_the_routes_are_added_once(routes, monkeypatch):
    from aiohttp import web

    server = SimpleNamespace(routes=web.RouteTableDef())
    monkeypatch.setattr(routes, "prompt_server", lambda: server)
    routes.register()
    count = len(list(server.routes))
    routes.register()
    assert count == len(list(server.routes)) >= 5
    # aiohttp accepts all routes: none shadows another.
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
