"""Routes under /graft/: the runs there are, and what can be asked of one.

GET  /graft/runs                 those that run, those on disk, and what training nodes told last (the panel's messages)
GET  /graft/history?text=&from=N&count=N   a page of the runs on disk: how their loss went, recipes, a picture of each
GET  /graft/runs/RUN?events=N    a run: its recipe, where it is, its last events and sample pictures
GET  /graft/runs/RUN/workflow    what it was queued as: the prompt, and the workflow if a page queued it
POST /graft/runs/RUN/stop        finish now; what was reached is saved and handed on
POST /graft/runs/RUN/save        save now and go on
POST /graft/runs/RUN/pause       save, end the prompt, free the device
POST /graft/runs/RUN/resume      let a stopped run go on, and give the prompt that is to be queued for it
POST /graft/runs/RUN/delete      remove its folder with its saves, unless a server trains it; what was picked stays
POST /graft/runs/RUN/describe    {"title", "note"}: what the user calls it and says of it
POST /graft/runs/RUN/pick        {"step"}: copy a save to where loaders list it; the name there, by kind
POST /graft/nodes/NODE/stop      as for a run, by the node's execution id; so for save and pause

A POST carries a JSON object, empty where nothing is said of it, and is taken from the host's own pages and from
programs alone; the page's address has to be one of this server's (`is_own_host`). Errors are {"error": text} with the
status that fits.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from comfy.cli_args import args

from ....trainers.errors import GraftError, RunError, RunHeldError, SettingsError
from ....trainers.runs import history, records
from ....trainers.runs.notes import parse_notes, read_notes, write_notes
from ....trainers.runs.run import STOPPED
from ....trainers.runs.saves import list_saves, pick_save
from .. import paths
from .control import REGISTRY, Training, UserCommand
from .messages import MESSAGES, prompt_server

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.Response]]

_PREFIX = "/graft/"
_NODE = re.compile(r"[0-9A-Za-z_.-]{1,32}(?::[0-9A-Za-z_.-]{1,32}){0,15}")
_WISHES = "|".join(wish.value for wish in UserCommand)
_MOST_SUMMARIES = 200
_MOST_EVENTS = 5000
_BODY_LIMIT = 16 * 1024
_BODY = "graft_body"
_HOST = re.compile(r"(?:(?P<name>[\w.-]+)|\[(?P<address>[0-9a-fA-F:.]+)\])(?::[0-9]{1,5})?", re.ASCII)
# Behind the machine's own name in local networks; nobody can register a name under them.
_LOCAL_ENDINGS = ("local", "lan", "home", "home.arpa", "internal", "localdomain")


class _Refusal(Exception):
    """An answer that is an error, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def register() -> None:
    """Adds the routes to the host's, where it has a server and has not got them yet."""
    server = prompt_server()
    routes = getattr(server, "routes", None)
    if routes is None or any(getattr(route, "path", "").startswith(_PREFIX) for route in routes):
        return
    routes.get(f"{_PREFIX}runs")(_answering(_list_runs))
    routes.get(f"{_PREFIX}history")(_answering(_list_history))
    routes.get(f"{_PREFIX}runs/{{run}}")(_answering(_show_run))
    routes.get(f"{_PREFIX}runs/{{run}}/workflow")(_answering(_show_graph))
    routes.post(f"{_PREFIX}runs/{{run}}/{{wish:{_WISHES}}}")(_answering(_ask_run))
    routes.post(f"{_PREFIX}runs/{{run}}/resume")(_answering(_resume_run))
    routes.post(f"{_PREFIX}runs/{{run}}/delete")(_answering(_delete_run))
    routes.post(f"{_PREFIX}runs/{{run}}/describe")(_answering(_describe_run))
    routes.post(f"{_PREFIX}runs/{{run}}/pick")(_answering(_pick_save))
    routes.post(f"{_PREFIX}nodes/{{node}}/{{wish:{_WISHES}}}")(_answering(_ask_node))


def _answering(work: Callable[[web.Request], Awaitable[dict[str, Any]]]) -> Handler:
    """A handler that answers with what the work gives, or with what it refuses."""

    async def handle(request: web.Request) -> web.Response:
        try:
            if request.method == "POST":
                await _check_post(request)
            return _answer(200, await work(request))
        except _Refusal as refusal:
            return _answer(refusal.status, {"error": str(refusal)})
        except GraftError as error:
            return _answer(500, {"error": str(error)})
        except FileNotFoundError:
            return _answer(404, {"error": "It was removed meanwhile."})

    return handle


def _answer(status: int, value: dict[str, Any]) -> web.Response:
    # Names of folders and files are anyone's: as JSON that is never taken for a page they do nothing.
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    text = json.dumps(records.jsonable(value), allow_nan=False)
    return web.Response(status=status, text=text, content_type="application/json", headers=headers)


async def _check_post(request: web.Request) -> None:
    """Refuses what another site's page could send, and what is no JSON object."""
    if not is_same_origin(request.headers):
        raise _Refusal(
            403,
            "Only pages of this server may ask this. Open ComfyUI by its IP address or localhost, or name the host in "
            "the environment variable GRAFT_HOSTS.",
        )
    if request.content_type != "application/json":
        raise _Refusal(415, "Send a JSON object, with the content type application/json.")
    if (request.content_length or 0) > _BODY_LIMIT:
        raise _Refusal(413, "The body is too long.")
    try:
        body = json.loads(await request.content.read(_BODY_LIMIT) or b"{}")
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise _Refusal(400, "The body is no JSON object.")
    request[_BODY] = body


def is_same_origin(headers) -> bool:
    """Tell whether a request comes from a page of this server, or from no page at all.

    A browser says so itself in Sec-Fetch-Site, which no page can set; without TLS it only tells the page's Origin. A
    page of another site can give its own name this server's address afterwards (DNS rebinding). It is then of the same
    origin for the browser, so the name has to be one of this server's too.
    """
    site = headers.get("Sec-Fetch-Site")
    origin = headers.get("Origin")
    host = headers.get("Host", "")
    if site is None and origin is None:
        # A program's: browsers tell at least one of them with every POST.
        return True
    if site is None:
        same = bool(host) and origin in (f"http://{host}", f"https://{host}")
    else:
        same = site == "same-origin"
    # A certificate vouches for the name: a proxy with TLS stands in between, or the host has TLS itself.
    by_tls = site is not None and (origin or "").startswith("https://")
    return same and (by_tls or is_own_host(host))


def is_own_host(host: str) -> bool:
    """Tell whether a Host header names this server: by address, by a loopback name, or by a name it was given.

    Names are those of ComfyUI's --listen and --enable-cors-header, the machine's own, and those in GRAFT_HOSTS. An
    address is always right: who types one asks no name server.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = (match["name"] or match["address"]).lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost") or _is_address(name):
        return True
    cors = getattr(args, "enable_cors_header", None) or ""
    if cors == "*":
        # The host itself answers every page then.
        return True
    given = [*(args.listen or "").split(","), *os.environ.get("GRAFT_HOSTS", "").split(","), _host_of(cors)]
    machine = socket.gethostname().lower()
    known = {one.strip().lower() for one in given} | {machine} | {f"{machine}.{ending}" for ending in _LOCAL_ENDINGS}
    return bool(name) and name in known


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


async def _list_runs(request: web.Request) -> dict[str, Any]:
    found = await _aside(records.list_records, paths.folders(), records.MOST_RUNS)
    return {
        "running": [_training_as_json(one) for one in REGISTRY.all()],
        "runs": [_record_as_json(record) for record in found],
        "told": MESSAGES.messages(),
    }


async def _list_history(request: web.Request) -> dict[str, Any]:
    first = _number(request.query.get("from", "0"), records.MOST_RUNS)
    count = _number(request.query.get("count", "50"), _MOST_SUMMARIES)
    text = request.query.get("text", "")
    found, total = await _aside(history.list_summaries, paths.folders(), text, first, count)
    return {"runs": [_summary_as_json(one) for one in found], "total": total}


async def _show_run(request: web.Request) -> dict[str, Any]:
    most = _number(request.query.get("events", "200"), _MOST_EVENTS)
    run = await _found(request)
    record, recipe, events, notes, saves = await _aside(_read, run, most)
    running = REGISTRY.of_run(run.name)
    return {
        **_record_as_json(record),
        "running": None if running is None else _training_as_json(running),
        "recipe": recipe,
        "events": events,
        "samples": [paths.shown_output(path) for path in run.samples()],
        **asdict(notes),
        "saves": saves,
        "prompt": REGISTRY.prompt_of(run.name),
    }


def _read(run, most: int):
    saves = list(list_saves(paths.folders(), run))
    return records.record_of(run), records.read_recipe(run), records.read_events(run, most), read_notes(run), saves


async def _show_graph(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    try:
        return await _aside(records.read_graph, run)
    except RunError as error:
        raise _Refusal(404, str(error)) from error


async def _ask_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    return _ask(REGISTRY.of_run(run.name), request)


async def _ask_node(request: web.Request) -> dict[str, Any]:
    node = request.match_info["node"]
    if _NODE.fullmatch(node) is None:
        raise _Refusal(404, "That is no node's id.")
    return _ask(REGISTRY.of_node(node), request)


def _ask(training: Training | None, request: web.Request) -> dict[str, Any]:
    if training is None:
        raise _Refusal(409, "It does not run.")
    wish = UserCommand(request.match_info["wish"])
    training.ask(wish)
    training.send("asked", {"wish": wish.value, "step": training.step})
    return {"asked": wish.value, **_training_as_json(training)}


async def _resume_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    if REGISTRY.of_run(run.name) is not None:
        raise _Refusal(409, "It runs already.")
    halt = run.halt()
    if halt is not None and halt.how == STOPPED:
        try:
            await _aside(REGISTRY.resume, run)
        except RunHeldError as error:
            raise _Refusal(409, str(error)) from error
    prompt_id = REGISTRY.prompt_of(run.name)
    return {"run": run.name, "prompt_id": prompt_id, "prompt": _prompt(prompt_id)}


async def _delete_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    if REGISTRY.of_run(run.name) is not None:
        raise _Refusal(409, "It runs: stop it first.")
    try:
        await _aside(history.delete_run, run)
    except RunError as error:
        raise _Refusal(409, str(error)) from error
    REGISTRY.forget(run.name)
    return {"deleted": run.name}


async def _describe_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    body = request[_BODY]
    try:
        notes = parse_notes(body.get("title", ""), body.get("note", ""))
    except SettingsError as error:
        raise _Refusal(400, str(error)) from error
    await _aside(write_notes, run, notes)
    return {"run": run.name, **asdict(notes)}


async def _pick_save(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    step = request[_BODY].get("step")
    if type(step) is not int:
        raise _Refusal(400, "The step is no number.")
    try:
        return {"run": run.name, "step": step, **await _aside(pick_save, paths.folders(), run, step)}
    except RunError as error:
        raise _Refusal(409, str(error)) from error


def _prompt(prompt_id: str) -> dict[str, Any] | None:
    """A prompt as it was queued, for POST /prompt; None when the host has forgotten it."""
    queue = getattr(prompt_server(), "prompt_queue", None)
    if queue is None or not prompt_id:
        return None
    entry = queue.get_history(prompt_id=prompt_id).get(prompt_id)
    if entry is None:
        return None
    # (number, id, prompt, extra data, outputs), on newer hosts with more behind.
    prompt = entry["prompt"][2]
    return prompt if isinstance(prompt, dict) else None


async def _found(request: web.Request):
    try:
        return await _aside(records.find_run, paths.folders(), request.match_info["run"])
    except RunError as error:
        raise _Refusal(404, str(error)) from error


async def _aside(work: Callable, *values) -> Any:
    """Reads files without keeping the server from everything else."""
    return await asyncio.get_running_loop().run_in_executor(None, partial(work, *values))


def _number(text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _Refusal(400, "That is no number.")
    return min(int(text), most)


def _record_as_json(record: records.Record) -> dict[str, Any]:
    return {**asdict(record), "status": "running" if REGISTRY.of_run(record.name) else record.status}


def _summary_as_json(summary: history.Summary) -> dict[str, Any]:
    return {
        **_record_as_json(summary.record),
        **asdict(summary.losses),
        "picture": None if summary.picture is None else paths.shown_output(summary.picture),
        "recipe": summary.recipe,
        "facts": summary.facts,
        "has_graph": summary.has_graph,
        "size": summary.size,
        **asdict(summary.notes),
        "saves": summary.saves,
    }


def _training_as_json(training: Training) -> dict[str, Any]:
    return {
        "node": training.node,
        "prompt_id": training.prompt,
        "workflow": training.workflow,
        "inputs": training.inputs,
        "run": None if training.run is None else training.run.name,
        "step": training.step,
        "steps": training.steps,
        "saved": training.saved,
        "asked": None if training.end is None else training.end.value,
    }
