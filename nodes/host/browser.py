"""Messages to the browser, through the host's server where there is one."""

from __future__ import annotations

from ...trainers.records import jsonable

EVENT = "graft.progress"


def prompt_server():
    """The host's server, None where the host is used without one."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def tell(node: str, event: str, payload: dict) -> None:
    """One event of a node, to all pages that listen; pictures do not go this way."""
    server = prompt_server()
    if server is not None:
        plain = {name: value for name, value in payload.items() if name != "pictures"}
        server.send_sync(EVENT, {"node": node, "event": event, **jsonable(plain)})
