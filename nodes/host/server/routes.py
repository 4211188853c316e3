"""HTTP routes under /graft/: the runs, and commands to one run.

GET  /graft/runs                 running trainings, runs on disk, and training nodes' last messages (for the panel)
GET  /graft/history?text=&from=N&count=N   a page of the runs on disk: their losses, recipes, a picture of each
GET  /graft/runs/RUN?events=N    a run: its recipe, its progress, its last events and sample pictures
GET  /graft/runs/RUN/workflow    the queued graph: the prompt, and the workflow if a page queued it
POST /graft/runs/RUN/stop        finish now; save the progress and return it as the result
POST /graft/runs/RUN/save        save now and continue
POST /graft/runs/RUN/pause       save, end the prompt, free the device
POST /graft/runs/RUN/resume      let a stopped run continue, and return the prompt to queue for it
POST /graft/runs/RUN/delete      remove its folder with its saves, unless a server trains it; picked saves stay
POST /graft/runs/RUN/describe    {"title", "note"}: the user's name and note for it
POST /graft/runs/RUN/pick        {"step"}: copy a save to where loaders list it; return the name there, by kind
POST /graft/nodes/NODE/stop      as for a run, by the node's execution id; save and pause likewise

A POST carries a JSON object, empty if there is nothing to say. Only ComfyUI's own pages and programs may send one, and
the page's address must be one of this server's (`is_own_host`). Errors are {"error": text} with the fitting status.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import platform
import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from aiohttp import web
from comfy.cli_args import args
from yarl import URL

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
_COMMANDS = "|".join(command.value for command in UserCommand)
_MOST_SUMMARIES = 200
_MOST_EVENTS = 5000
_BODY_LIMIT = 16 * 1024
_BODY = "graft_body"
_HOST = re.compile(r"(?:(?P<name>[\w.-]+)|\[(?P<address>[0-9a-fA-F:.]+)\])(?::[0-9]{1,5})?", re.ASCII)
# Domains after the machine's name in local networks; nobody can register a name under them.
_LOCAL_ENDINGS = ("local", "lan", "home", "home.arpa", "internal", "localdomain")


class _Refusal(Exception):
    """An error response with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def register() -> None:
    """Add the routes to ComfyUI's server, if there is one and it lacks them."""
    server = prompt_server()
    routes = getattr(server, "routes", None)
    if routes is None or any(getattr(route, "path", "").startswith(_PREFIX) for route in routes):
        return
    routes.get(f"{_PREFIX}runs")(_answering(_list_runs))
    routes.get(f"{_PREFIX}history")(_answering(_list_history))
    routes.get(f"{_PREFIX}runs/{{run}}")(_answering(_show_run))
    routes.get(f"{_PREFIX}runs/{{run}}/workflow")(_answering(_show_graph))
    routes.post(f"{_PREFIX}runs/{{run}}/{{command:{_COMMANDS}}}")(_answering(_command_run))
    routes.post(f"{_PREFIX}runs/{{run}}/resume")(_answering(_resume_run))
    routes.post(f"{_PREFIX}runs/{{run}}/delete")(_answering(_delete_run))
    routes.post(f"{_PREFIX}runs/{{run}}/describe")(_answering(_describe_run))
    routes.post(f"{_PREFIX}runs/{{run}}/pick")(_answering(_pick_save))
    routes.post(f"{_PREFIX}nodes/{{node}}/{{command:{_COMMANDS}}}")(_answering(_command_node))


def _answering(work: Callable[[web.Request], Awaitable[dict[str, Any]]]) -> Handler:
    """Return a handler that responds with the result of the work, or with its error."""

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
            return _answer(404, {"error": "The run or one of its files was removed meanwhile."})

    return handle


def _answer(status: int, value: dict[str, Any]) -> web.Response:
    # Names of folders and files are untrusted; as JSON that no browser takes for a page they are harmless.
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    text = json.dumps(records.jsonable(value), allow_nan=False)
    return web.Response(status=status, text=text, content_type="application/json", headers=headers)


async def _check_post(request: web.Request) -> None:
    """Refuse requests that another site's page could send, and bodies that are not JSON objects."""
    if not is_same_origin(request.headers):
        raise _Refusal(
            403,
            "Only pages of this server may send this request. Open ComfyUI by its IP address or localhost, or add the "
            "host name to the environment variable GRAFT_HOSTS.",
        )
    if request.content_type != "application/json":
        raise _Refusal(415, "Send a JSON object, with the content type application/json.")
    try:
        body = json.loads(await _read_body(request) or b"{}")
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise _Refusal(400, "The body is not a JSON object.")
    request[_BODY] = body


async def _read_body(request) -> bytes:
    """Return the whole body, which may arrive in several parts and without its length in the headers."""
    data = b""
    while chunk := await request.content.read(_BODY_LIMIT + 1 - len(data)):
        data += chunk
        if len(data) > _BODY_LIMIT:
            raise _Refusal(413, f"The body is longer than {_BODY_LIMIT} bytes.")
    return data


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
        return URL(origin).host or ""
    except ValueError:
        return ""


async def _list_runs(request: web.Request) -> dict[str, Any]:
    found = await _in_thread(records.list_records, paths.folders(), records.MOST_RUNS)
    return {
        "running": [_training_as_json(one) for one in REGISTRY.all()],
        "runs": [_record_as_json(record) for record in found],
        "told": MESSAGES.messages(),
    }


async def _list_history(request: web.Request) -> dict[str, Any]:
    first = _number(request.query.get("from", "0"), records.MOST_RUNS)
    count = _number(request.query.get("count", "50"), _MOST_SUMMARIES)
    text = request.query.get("text", "")
    found, total = await _in_thread(history.list_summaries, paths.folders(), text, first, count)
    return {"runs": [_summary_as_json(one) for one in found], "total": total}


async def _show_run(request: web.Request) -> dict[str, Any]:
    most = _number(request.query.get("events", "200"), _MOST_EVENTS)
    run = await _found(request)
    record, recipe, events, notes, saves = await _in_thread(_read, run, most)
    running = REGISTRY.of_run(run.name)
    return {
        **_record_as_json(record),
        "running": None if running is None else _training_as_json(running),
        "recipe": recipe,
        "events": events,
        "samples": [paths.ui_image(path) for path in run.samples()],
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
        return await _in_thread(records.read_graph, run)
    except RunError as error:
        raise _Refusal(404, str(error)) from error


async def _command_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    return _send_command(REGISTRY.of_run(run.name), request)


async def _command_node(request: web.Request) -> dict[str, Any]:
    node = request.match_info["node"]
    if _NODE.fullmatch(node) is None:
        raise _Refusal(404, "This is not a valid node id.")
    return _send_command(REGISTRY.of_node(node), request)


def _send_command(training: Training | None, request: web.Request) -> dict[str, Any]:
    if training is None:
        raise _Refusal(409, "The training is not running.")
    command = UserCommand(request.match_info["command"])
    training.submit(command)
    training.send("asked", {"wish": command.value, "step": training.step})
    return {"asked": command.value, **_training_as_json(training)}


async def _resume_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    if REGISTRY.of_run(run.name) is not None:
        raise _Refusal(409, "The run is training already.")
    halt = run.halt()
    if halt is not None and halt.how == STOPPED:
        try:
            await _in_thread(REGISTRY.resume, run)
        except RunHeldError as error:
            raise _Refusal(409, str(error)) from error
    prompt_id = REGISTRY.prompt_of(run.name)
    return {"run": run.name, "prompt_id": prompt_id, "prompt": _prompt(prompt_id)}


async def _delete_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    if REGISTRY.of_run(run.name) is not None:
        raise _Refusal(409, "The run is training. Stop it first.")
    try:
        await _in_thread(history.delete_run, run)
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
    await _in_thread(write_notes, run, notes)
    return {"run": run.name, **asdict(notes)}


async def _pick_save(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    step = request[_BODY].get("step")
    if type(step) is not int:
        raise _Refusal(400, "The step is not a number.")
    try:
        return {"run": run.name, "step": step, **await _in_thread(pick_save, paths.folders(), run, step)}
    except RunError as error:
        raise _Refusal(409, str(error)) from error


def _prompt(prompt_id: str) -> dict[str, Any] | None:
    """Return a prompt as it was queued, for POST /prompt; None if ComfyUI has forgotten it."""
    queue = getattr(prompt_server(), "prompt_queue", None)
    if queue is None or not prompt_id:
        return None
    entry = queue.get_history(prompt_id=prompt_id).get(prompt_id)
    if entry is None:
        return None
    # (number, id, prompt, extra data, outputs, ...); newer versions append more.
    prompt = entry["prompt"][2]
    return prompt if isinstance(prompt, dict) else None


async def _found(request: web.Request):
    try:
        return await _in_thread(records.find_run, paths.folders(), request.match_info["run"])
    except RunError as error:
        raise _Refusal(404, str(error)) from error


async def _in_thread(work: Callable, *values) -> Any:
    """Run file access in a thread, so that the server can do other work."""
    return await asyncio.get_running_loop().run_in_executor(None, partial(work, *values))


def _number(text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise _Refusal(400, "The query has a value that is not a number.")
    return min(int(text), most)


def _record_as_json(record: records.Record) -> dict[str, Any]:
    return {**asdict(record), "status": "running" if REGISTRY.of_run(record.name) else record.status}


def _summary_as_json(summary: history.Summary) -> dict[str, Any]:
    return {
        **_record_as_json(summary.record),
        **asdict(summary.losses),
        "picture": None if summary.picture is None else paths.ui_image(summary.picture),
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
