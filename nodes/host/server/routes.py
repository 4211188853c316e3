"""HTTP routes under /graft/: the runs, and commands to one run.

GET  /graft/runs                 running trainings, runs on disk, and training nodes' last messages (for the panel)
GET  /graft/queue                the running and the waiting prompts in order, with their trainings
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
POST /graft/queue/move           {"prompt_id", "before"}: move a waiting prompt before another, or behind all with null
POST /graft/queue/remove         {"prompt_id"}: remove a waiting prompt, also one that is ending to give way
POST /graft/queue/schedule       {"prompt_id", "not_before", "pause"}: the hours of a prompt's trainings
POST /graft/nodes/NODE/stop      as for a run, by the node's execution id; save and pause likewise
POST /graft/nodes/NODE/give_way  {"to"}: the prompts that its training gives way to, one of GIVE_WAY

A POST carries a JSON object, empty if there is nothing to say. Only ComfyUI's own pages and programs may send one, and
the page's address must be one of this server's (`http.is_own_host`). Errors are {"error": text} with a fitting status.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict
from typing import Any

from aiohttp import web

from ....trainers.errors import RunError, RunHeldError, SettingsError
from ....trainers.recipe.options import GIVE_WAY
from ....trainers.runs import history, records
from ....trainers.runs.notes import parse_notes, read_notes, write_notes
from ....trainers.runs.run import STOPPED
from ....trainers.runs.saves import list_saves, pick_save
from .. import paths
from . import dataset_routes, schedule
from .control import REGISTRY, Training, UserCommand
from .http import BODY, Refusal, answering, in_thread, read_number
from .messages import MESSAGES, prompt_server
from .prompt_queue import RETURNING, list_prompts, list_trainers, move_prompt

log = logging.getLogger(__name__)

_PREFIX = "/graft/"
_NODE = re.compile(r"[0-9A-Za-z_.-]{1,32}(?::[0-9A-Za-z_.-]{1,32}){0,15}")
_COMMANDS = "|".join(command.value for command in UserCommand)
_MOST_SUMMARIES = 200
_MOST_EVENTS = 5000


def register() -> None:
    """Add the routes to ComfyUI's server, if there is one and it lacks them."""
    server = prompt_server()
    routes = getattr(server, "routes", None)
    if routes is None or any(getattr(route, "path", "").startswith(_PREFIX) for route in routes):
        return
    dataset_routes.add_routes(routes)
    routes.get(f"{_PREFIX}runs")(answering(_list_runs))
    routes.get(f"{_PREFIX}queue")(answering(_list_queue))
    routes.get(f"{_PREFIX}history")(answering(_list_history))
    routes.get(f"{_PREFIX}runs/{{run}}")(answering(_show_run))
    routes.get(f"{_PREFIX}runs/{{run}}/workflow")(answering(_show_graph))
    routes.post(f"{_PREFIX}runs/{{run}}/{{command:{_COMMANDS}}}")(answering(_command_run))
    routes.post(f"{_PREFIX}runs/{{run}}/resume")(answering(_resume_run))
    routes.post(f"{_PREFIX}runs/{{run}}/delete")(answering(_delete_run))
    routes.post(f"{_PREFIX}runs/{{run}}/describe")(answering(_describe_run))
    routes.post(f"{_PREFIX}runs/{{run}}/pick")(answering(_pick_save))
    routes.post(f"{_PREFIX}queue/move")(answering(_move_prompt))
    routes.post(f"{_PREFIX}queue/schedule")(answering(_schedule_prompt))
    routes.post(f"{_PREFIX}queue/remove")(answering(_remove_prompt))
    routes.post(f"{_PREFIX}nodes/{{node}}/{{command:{_COMMANDS}}}")(answering(_command_node))
    routes.post(f"{_PREFIX}nodes/{{node}}/give_way")(answering(_set_give_way))


async def _list_runs(request: web.Request) -> dict[str, Any]:
    listed = await in_thread(records.list_records, paths.folders(), records.MOST_RUNS)
    return {
        "running": [_training_as_json(training) for training in REGISTRY.all()],
        "runs": [_record_as_json(record) for record in listed],
        "told": MESSAGES.messages(),
    }


async def _list_queue(request: web.Request) -> dict[str, Any]:
    running, waiting = list_prompts()
    return {
        "clock": schedule.show_clock(schedule.now()),
        "prompts": [
            {"prompt_id": item[1], "running": is_running, "trainings": _trainings_of(item), **_hours_of(item[1])}
            for items, is_running in ((running, True), (waiting, False))
            for item in items
        ],
    }


async def _move_prompt(request: web.Request) -> dict[str, Any]:
    prompt, before = request[BODY].get("prompt_id"), request[BODY].get("before")
    if not isinstance(prompt, str) or not isinstance(before, str | None):
        raise Refusal(400, "'prompt_id' must be a text, and 'before' a text or null.")
    if not move_prompt(prompt, before):
        raise Refusal(409, "The prompt does not wait any more.")
    return {"prompt_id": prompt, "before": before}


async def _remove_prompt(request: web.Request) -> dict[str, Any]:
    prompt = request[BODY].get("prompt_id")
    if not isinstance(prompt, str):
        raise Refusal(400, "'prompt_id' must be a text.")
    if not RETURNING.remove(prompt):
        raise Refusal(409, "The prompt does not wait any more.")
    return {"prompt_id": prompt}


async def _schedule_prompt(request: web.Request) -> dict[str, Any]:
    body = request[BODY]
    prompt, start, pause = body.get("prompt_id"), body.get("not_before", ""), body.get("pause", ["", ""])
    try:
        if not isinstance(prompt, str):
            raise ValueError(prompt)
        first, last = pause
        daily = (schedule.parse_clock(first), schedule.parse_clock(last)) if first or last else None
        not_before = schedule.next_time(schedule.parse_clock(start), schedule.now()) if start else 0.0
    except (TypeError, ValueError) as error:
        raise Refusal(400, "'not_before' and both ends of 'pause' must be times such as 22:30, or empty.") from error
    if not RETURNING.schedule(prompt, schedule.Schedule(not_before, daily)):
        raise Refusal(409, "The prompt is no longer in the queue.")
    return {"prompt_id": prompt, **_hours_of(prompt)}


def _hours_of(prompt: str) -> dict[str, Any]:
    """Return the hours of a prompt as texts of the server's clock; `starts` is empty if it may run now."""
    hours = RETURNING.schedule_of(prompt)
    pause = [schedule.show_minute(minute) for minute in hours.pause or ()] or ["", ""]
    return {
        "not_before": schedule.show_clock(hours.not_before) if hours.not_before > schedule.now() else "",
        "pause": pause,
        "starts": hours.shown_start,
    }


def _trainings_of(item: tuple) -> list[dict[str, Any]]:
    _, prompt, nodes = item[:3]
    rows = []
    for node in list_trainers(nodes):
        returning = RETURNING.find(prompt)
        known = REGISTRY.of_prompt(prompt, node) or (returning if returning and returning.node == node else None)
        steps = nodes[node].get("inputs", {}).get("steps")
        entry = {"node": node, "name": _name_of(nodes), "run": None, "step": 0, "seconds_left": None}
        if known is not None and known.name:
            steps, left = known.steps, known.steps - known.step
            seconds = None if known.seconds is None else left * known.seconds
            entry |= {"run": known.name, "step": known.step, "seconds_left": seconds}
        rows.append({**entry, "steps": steps if isinstance(steps, int) else None, "gave_way": returning is not None})
    return rows


def _name_of(nodes: dict[str, Any]) -> str:
    """Return the name that a prompt gives to its run, else the folder of its pictures; empty if it links to both."""
    for kind, name in (("GraftRunOptions", "name"), ("GraftLoadDataset", "folder")):
        for node in nodes.values():
            value = node.get("inputs", {}).get(name) if node.get("class_type") == kind else None
            if isinstance(value, str) and value:
                return value
    return ""


async def _list_history(request: web.Request) -> dict[str, Any]:
    first = read_number(request.query.get("from", "0"), records.MOST_RUNS)
    count = read_number(request.query.get("count", "50"), _MOST_SUMMARIES)
    text = request.query.get("text", "")
    summaries, total = await in_thread(history.list_summaries, paths.folders(), text, first, count)
    return {"runs": [_summary_as_json(summary) for summary in summaries], "total": total}


async def _show_run(request: web.Request) -> dict[str, Any]:
    most = read_number(request.query.get("events", "200"), _MOST_EVENTS)
    run = await _found(request)
    record, recipe, events, notes, saves = await in_thread(_read, run, most)
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
        return await in_thread(records.read_graph, run)
    except RunError as error:
        raise Refusal(404, str(error)) from error


async def _command_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    return _send_command(REGISTRY.of_run(run.name), request)


async def _command_node(request: web.Request) -> dict[str, Any]:
    return _send_command(_training_of_node(request), request)


async def _set_give_way(request: web.Request) -> dict[str, Any]:
    training = _running(_training_of_node(request))
    to = request[BODY].get("to")
    if to not in GIVE_WAY:
        raise Refusal(400, f"'to' must be one of: {', '.join(GIVE_WAY)}.")
    training.give_way = to
    training.send("give way", {"to": to})
    return {"to": to, **_training_as_json(training)}


def _training_of_node(request: web.Request) -> Training | None:
    node = request.match_info["node"]
    if _NODE.fullmatch(node) is None:
        raise Refusal(404, "This is not a valid node id.")
    return REGISTRY.of_node(node)


def _running(training: Training | None) -> Training:
    if training is None:
        raise Refusal(409, "The training is not running.")
    return training


def _send_command(training: Training | None, request: web.Request) -> dict[str, Any]:
    training = _running(training)
    command = UserCommand(request.match_info["command"])
    if not training.submit(command):
        raise Refusal(409, "The training is ending and saves its progress: the command comes too late.")
    training.send("asked", {"wish": command.value, "step": training.step})
    return {"asked": command.value, **_training_as_json(training)}


async def _resume_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    if REGISTRY.of_run(run.name) is not None:
        raise Refusal(409, "The run is training already.")
    if RETURNING.of_run(run.name) is not None:
        raise Refusal(409, "The run waits in ComfyUI's queue already.")
    halt = run.halt()
    if halt is not None and halt.how == STOPPED:
        try:
            await in_thread(REGISTRY.resume, run)
        except RunHeldError as error:
            raise Refusal(409, str(error)) from error
    prompt_id = REGISTRY.prompt_of(run.name)
    prompt = _prompt(prompt_id)
    graph = await in_thread(_saved_graph, run)
    if prompt is not None:
        graph["prompt"] = prompt
    return {"run": run.name, "prompt_id": prompt_id, "prompt": None, **graph}


async def _delete_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    if REGISTRY.of_run(run.name) is not None:
        raise Refusal(409, "The run is training. Stop it first.")
    if RETURNING.of_run(run.name) is not None:
        raise Refusal(409, "The run waits in ComfyUI's queue. Remove it there first.")
    try:
        await in_thread(history.delete_run, run)
    except RunError as error:
        raise Refusal(409, str(error)) from error
    REGISTRY.forget(run.name)
    return {"deleted": run.name}


async def _describe_run(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    body = request[BODY]
    try:
        notes = parse_notes(body.get("title", ""), body.get("note", ""))
    except SettingsError as error:
        raise Refusal(400, str(error)) from error
    await in_thread(write_notes, run, notes)
    return {"run": run.name, **asdict(notes)}


async def _pick_save(request: web.Request) -> dict[str, Any]:
    run = await _found(request)
    step = request[BODY].get("step")
    if type(step) is not int:
        raise Refusal(400, "The step is not a number.")
    try:
        return {"run": run.name, "step": step, **await in_thread(pick_save, paths.folders(), run, step)}
    except RunError as error:
        raise Refusal(409, str(error)) from error


def _prompt(prompt_id: str) -> dict[str, Any] | None:
    queue = getattr(prompt_server(), "prompt_queue", None)
    if queue is None or not prompt_id:
        return None
    entry = queue.get_history(prompt_id=prompt_id).get(prompt_id)
    if entry is None:
        return None
    # (number, id, prompt, extra data, outputs, ...); newer versions append more.
    prompt = entry["prompt"][2]
    return prompt if isinstance(prompt, dict) else None


def _saved_graph(run) -> dict[str, Any]:
    try:
        return records.read_graph(run)
    except RunError:
        return {}


async def _found(request: web.Request):
    try:
        return await in_thread(records.find_run, paths.folders(), request.match_info["run"])
    except RunError as error:
        raise Refusal(404, str(error)) from error


def _record_as_json(record: records.Record) -> dict[str, Any]:
    status = record.status
    if REGISTRY.of_run(record.name) is not None:
        status = "running"
    elif RETURNING.of_run(record.name) is not None:
        status = "waiting"
    return {**asdict(record), "status": status}


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
        "asked": None if training.end is None or training.gives_way else training.end.value,
        "give_way": training.give_way,
    }
