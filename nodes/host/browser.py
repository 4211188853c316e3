"""Messages to the browser, through the host's server where there is one."""

from __future__ import annotations

import threading
from typing import Any

from ...trainers.records import jsonable

EVENT = "graft.progress"
BEGIN = "begin"

# So many nodes' messages are kept for pages that are opened later, those of the nodes that ran last.
_MOST_NODES = 64
_ID_LIMIT = 64


class Board:
    """The last message of each kind that each training node sent: what a page that is opened later has to know."""

    def __init__(self):
        self._lock = threading.Lock()
        self._nodes: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}

    def note(self, message: dict[str, Any]) -> None:
        """Keeps a message; one that begins a training takes the place of all of its node's."""
        key = (message["workflow"], message["node"])
        with self._lock:
            kept = self._nodes.pop(key, {})
            if message["event"] == BEGIN:
                kept = {}
            # At the end again: the order is the one they came in.
            kept.pop(message["event"], None)
            kept[message["event"]] = message
            self._nodes[key] = kept
            while len(self._nodes) > _MOST_NODES:
                del self._nodes[next(iter(self._nodes))]

    def messages(self) -> list[dict[str, Any]]:
        """What is kept, in the order of the nodes' last messages and of each node's."""
        with self._lock:
            return [message for kept in self._nodes.values() for message in kept.values()]


# The routes of the one server and the nodes that it executes have to meet somewhere.
BOARD = Board()


def prompt_server():
    """The host's server, None where the host is used without one."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def _running(prompt: str) -> tuple | None:
    """(number, id, prompt, extra data, outputs) of a running prompt, on newer hosts with more behind; None for none."""
    running = getattr(getattr(prompt_server(), "prompt_queue", None), "currently_running", {})
    return next((item for item in list(running.values()) if item[1] == prompt), None)


def workflow_of(prompt: str) -> str:
    """Id of the workflow that a running prompt was queued from; empty where it came from no page."""
    found = graph_of(prompt).get("workflow", {}).get("id")
    return found if isinstance(found, str) and len(found) <= _ID_LIMIT else ""


def graph_of(prompt: str) -> dict[str, dict[str, Any]]:
    """What a running prompt was queued as, under the host's own names: `prompt`, and `workflow` if a page queued it."""
    item = _running(prompt)
    # Anyone may have written the extra data.
    found: Any = item[3] if item is not None else None
    for name in ("extra_pnginfo", "workflow"):
        found = found.get(name) if isinstance(found, dict) else None
    graph = {"prompt": running_prompt(prompt), "workflow": found}
    return {name: value for name, value in graph.items() if isinstance(value, dict)}


def running_prompt(prompt: str) -> dict[str, Any] | None:
    """The nodes of a running prompt, by id; None where it does not run on this server."""
    item = _running(prompt)
    return item[2] if item is not None else None


def tell(message: dict[str, Any]) -> None:
    """A message of a training node to all pages that listen, and to those that are opened later.

    Args:
        message: with at least node, prompt_id, workflow and event.
    """
    plain = jsonable(message)
    BOARD.note(plain)
    server = prompt_server()
    if server is not None:
        server.send_sync(EVENT, plain)
