"""Tests of access to a training over HTTP, and of routes on hosts with and without a server."""

import asyncio
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def routes(comfy):
    from graft_pack.nodes.host.server import routes

    return routes


@pytest.fixture
def http(comfy):
    from graft_pack.nodes.host.server import http

    return http


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
def test_only_pages_of_the_server_and_programs(http, headers, allowed):
    assert http.is_same_origin({**HOST, **headers}) is allowed


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
def own_names(http, monkeypatch):
    monkeypatch.setattr(http.args, "listen", "0.0.0.0,gpu.listen")
    monkeypatch.setattr(http.args, "enable_cors_header", "https://cors.example", raising=False)
    monkeypatch.setattr(http.platform, "node", lambda: "Workstation")
    monkeypatch.setenv("GRAFT_HOSTS", "other.name, comfy.box")


@pytest.mark.parametrize("site", [None, "same-origin"])
@pytest.mark.parametrize("host", OWN)
def test_pages_at_this_servers_addresses_may_ask(http, own_names, host, site):
    assert http.is_same_origin(browser(host, site=site))


@pytest.mark.parametrize("site", [None, "same-origin"])
@pytest.mark.parametrize("host", REBOUND)
def test_pages_of_rebound_names_may_not(http, own_names, host, site):
    assert not http.is_same_origin(browser(host, site=site))


def test_a_proxy_with_tls_may_pass_pages_on(http, own_names):
    """The proxy puts the page's name into Host, as most do, or the server's own."""
    assert http.is_same_origin(browser("comfy.example.org", "https", "same-origin"))
    assert http.is_same_origin({**browser("comfy.example.org", "https", "same-origin"), "Host": "127.0.0.1:8188"})
    assert not http.is_same_origin(browser("comfy.example.org", "https", "cross-site"))
    # Browsers send Sec-Fetch-Site over TLS, so a request without it has not passed a proxy with TLS.
    assert not http.is_same_origin(browser("comfy.example.org", "https"))


def test_programs_may_ask_by_any_name(http, own_names):
    assert http.is_same_origin({"Host": "whatever.example"})


def test_a_host_open_to_every_page_is_so_by_every_name(http, monkeypatch):
    monkeypatch.setattr(http.args, "enable_cors_header", "*", raising=False)
    assert http.is_same_origin(browser("comfy.example.org:8188"))
    assert not http.is_same_origin({**browser("a.example"), "Origin": "http://b.example"})


@pytest.mark.parametrize(
    "headers, allowed",
    [
        ({"Host": "127.0.0.1:8188"}, True),
        ({"Host": "localhost:8188", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Host": "proxy.example", "Sec-Fetch-Site": "none"}, True),
        ({"Host": "localhost:8188", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Host": "localhost:8188", "Sec-Fetch-Site": "same-site"}, False),
        ({"Host": "evil.example:8188"}, False),
        ({}, False),
    ],
)
def test_pictures_of_a_dataset_are_for_pages_of_this_server(http, headers, allowed):
    assert http.may_read(headers) is allowed


def test_the_bodies_of_all_requests_are_bounded_together(http, monkeypatch):
    """Each is within its own limit, and arrives slowly."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    monkeypatch.setattr(http, "_ALL_BODIES", 1000)

    async def echo(request):
        return {"read": len(request[http.BODY]["text"])}

    async def run():
        app = web.Application()
        app.router.add_post("/", http.answering(echo, 800))
        async with TestClient(TestServer(app)) as client:
            go_on = asyncio.Event()

            async def slow():
                yield b'{"text": "' + b"x" * 600
                await go_on.wait()
                yield b'"}'

            def post(body):
                return client.post("/", data=body, headers={"Content-Type": "application/json"})

            first = asyncio.create_task(post(slow()))
            while not http._held_bodies:
                await asyncio.sleep(0.01)
            whole = b'{"text": "' + b"x" * 600 + b'"}'
            second = await post(whole)
            go_on.set()
            return second.status, (await first).status, (await post(whole)).status

    assert asyncio.run(run()) == (503, 200, 200)
    assert http._held_bodies == {}


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
