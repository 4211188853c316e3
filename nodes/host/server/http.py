"""Shared parts of the pack's HTTP routes: checks of a request, error responses, work in threads."""

import asyncio
import ipaddress
import json
import os
import platform
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web
from comfy.cli_args import args
from yarl import URL

from ....trainers.errors import GraftError
from ....trainers.runs import records

Handler = Callable[[web.Request], Awaitable[web.Response]]

BODY = "graft_body"
_BODY_LIMIT = 16 * 1024
# Most bytes of the bodies of all requests that are not answered yet, and those of each, by the request's id.
_ALL_BODIES = 128 * 1024 * 1024
_held_bodies: dict[int, int] = {}
_JSON = "application/json"
_HOST = re.compile(r"(?:(?P<name>[\w.-]+)|\[(?P<address>[0-9a-fA-F:.]+)\])(?::[0-9]{1,5})?", re.ASCII)
_STRANGER = (
    "Only pages of this server may send this request. Open ComfyUI by its IP address or localhost, or add the host "
    "name to the environment variable GRAFT_HOSTS."
)
# Domains after the machine's name in local networks; nobody can register a name under them.
_LOCAL_ENDINGS = ("local", "lan", "home", "home.arpa", "internal", "localdomain")


class Refusal(Exception):
    """An error response with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def answering(
    work: Callable[[web.Request], Awaitable[dict[str, Any] | web.Response]],
    limit: int = _BODY_LIMIT,
    content_type: str = _JSON,
    is_private: bool = False,
) -> Handler:
    """Return a handler that responds with the result of the work, or with its error.

    Args:
        work: returns a value for JSON, or a response.
        limit: most bytes of a POST's body.
        content_type: of a POST's body. A JSON object is parsed, any other content stays bytes.
        is_private: a GET answers with the user's files, so only pages of this server may read it.
    """

    async def handle(request: web.Request) -> web.Response:
        try:
            if is_private and request.method == "GET" and not may_read(request.headers):
                raise Refusal(403, _STRANGER)
            if request.method == "POST":
                await _check_post(request, limit, content_type)
            result = await work(request)
            return result if isinstance(result, web.Response) else _answer(200, result)
        except Refusal as refusal:
            return _answer(refusal.status, {"error": str(refusal)})
        except GraftError as error:
            return _answer(500, {"error": str(error)})
        except FileNotFoundError:
            return _answer(404, {"error": "The files were removed meanwhile."})
        finally:
            _held_bodies.pop(id(request), None)

    return handle


def _answer(status: int, value: dict[str, Any]) -> web.Response:
    # Names of folders and files are untrusted; as JSON that no browser takes for a page they are harmless.
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    text = json.dumps(records.jsonable(value), allow_nan=False)
    return web.Response(status=status, text=text, content_type="application/json", headers=headers)


async def _check_post(request: web.Request, limit: int, content_type: str) -> None:
    """Refuse requests that another site's page could send, and bodies that are not as expected."""
    if not is_same_origin(request.headers):
        raise Refusal(403, _STRANGER)
    if request.content_type != content_type:
        what = "a JSON object, with" if content_type == _JSON else "a picture, with"
        raise Refusal(415, f"Send {what} the content type {content_type}.")
    content = await _read_body(request, limit)
    if content_type != _JSON:
        request[BODY] = content
        return
    try:
        body = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, "The body is not a JSON object.")
    request[BODY] = body


async def _read_body(request, limit: int) -> bytes:
    """Return the whole body, which may arrive in several parts and without its length in the headers."""
    data = bytearray()
    while chunk := await request.content.read(limit + 1 - len(data)):
        data += chunk
        if len(data) > limit:
            raise Refusal(413, f"The body is longer than {limit} bytes.")
        _held_bodies[id(request)] = len(data)
        if sum(_held_bodies.values()) > _ALL_BODIES:
            raise Refusal(503, "The server is busy with other requests. Try again.")
    return bytes(data)


def is_same_origin(headers) -> bool:
    """Report whether a request comes from a page of this server, or from no page at all.

    A browser sends this in Sec-Fetch-Site, which no page can set; without TLS it sends the page's Origin only. A page
    of another site can point its own name to this server's address later (DNS rebinding). The browser then treats it
    as same origin, so the name must also be one of this server's.
    """
    site = headers.get("Sec-Fetch-Site")
    origin = headers.get("Origin")
    host = headers.get("Host", "")
    if site is None and origin is None:
        # A program sent it: browsers send at least one of them with every POST.
        return True
    if site is None:
        same = bool(host) and origin in (f"http://{host}", f"https://{host}")
    else:
        same = site == "same-origin"
    # A certificate vouches for the name: a TLS proxy is in front, or ComfyUI has TLS itself.
    by_tls = site is not None and (origin or "").startswith("https://")
    return same and (by_tls or is_own_host(host))


def may_read(headers) -> bool:
    """Report whether a GET for the user's files may come from a page of this server.

    A browser sends no Origin with it, and Sec-Fetch-Site only to localhost or with TLS. Without the latter the name
    must be one of this server's, or a page of another site could read the files after DNS rebinding.
    """
    site = headers.get("Sec-Fetch-Site")
    return site in ("same-origin", "none") or (site is None and is_own_host(headers.get("Host", "")))


def is_own_host(host: str) -> bool:
    """Report whether a Host header names this server: by address, by a loopback name, or by a configured name.

    Configured names are those of ComfyUI's --listen and --enable-cors-header, the machine's own, and those in
    GRAFT_HOSTS. Any address is accepted, because a browser asks no name server for it.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = (match["name"] or match["address"]).lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost") or _is_address(name):
        return True
    cors = getattr(args, "enable_cors_header", None) or ""
    if cors == "*":
        # ComfyUI itself then answers every page.
        return True
    given = [*(args.listen or "").split(","), *os.environ.get("GRAFT_HOSTS", "").split(","), _host_of(cors)]
    machine = platform.node().lower()
    known = {item.strip().lower() for item in given} | {machine} | {f"{machine}.{ending}" for ending in _LOCAL_ENDINGS}
    return bool(name) and name in known


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False


def _host_of(origin: str) -> str:
    try:
        return URL(origin).host or ""
    except ValueError:
        return ""


async def in_thread(work: Callable, *values) -> Any:
    """Run file access in a thread, so that the server can do other work."""
    return await asyncio.get_running_loop().run_in_executor(None, partial(work, *values))


def read_number(text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Refusal(400, "The query has a value that is not a number.")
    return min(int(text), most)
