"""Messages to the browser through ComfyUI's server, if there is one."""

import hashlib
import json
import threading
from typing import Any

from ....trainers.recipe.options import OPTIONS
from ....trainers.runs.records import jsonable

EVENT = "graft.progress"
BEGIN = "begin"

# Limit of the nodes whose messages are kept for pages that open later; the nodes that ran last stay.
_MOST_NODES = 64
_ID_LIMIT = 64
# Limits of nodes and characters; larger prompts are not sent to the pages.
_MOST_SOURCES = 500
_SOURCES_LIMIT = 256 * 1024

TRAINERS = (
    "GraftTrainLoRA",
    "GraftTrainEmbedding",
    "GraftTrainDreamBooth",
    "GraftFineTune",
    "GraftTrainPreference",
    "GraftTrainSlider",
)
_OPTIONS = {f"Graft{kind.title()}Options": declared for kind, declared in OPTIONS.items()}
# Inputs that do not affect a run's identity, by node class. A run resumes with other values of them. `name` and
# `on_existing` do not affect the identity either, but they choose the run.
_NEUTRAL: dict[str, set[str]] = {
    **{trainer: {"steps"} for trainer in TRAINERS},
    **{
        node: {name for name, option in _OPTIONS[node].items() if not option.decides} - {"name", "on_existing"}
        for node in ("GraftRunOptions", "GraftPreviewOptions", "GraftMemoryOptions")
    },
}
# Its model is no option of a recipe.
_NEUTRAL["GraftPreviewOptions"].add("model")


class MessageStore:
    """The last message of each kind of each training, for pages that open later.

    Workflow, node and inputs identify a training: templates have fixed workflow ids.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._nodes: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}

    def note(self, message: dict[str, Any]) -> None:
        """Store a message; a BEGIN message replaces all earlier messages of the same training."""
        key = (message["workflow"], message["node"], message.get("inputs", ""))
        with self._lock:
            kept = self._nodes.pop(key, {})
            if message["event"] == BEGIN:
                kept = {}
            # Move the event to the end, to keep the order of arrival.
            kept.pop(message["event"], None)
            kept[message["event"]] = message
            self._nodes[key] = kept
            while len(self._nodes) > _MOST_NODES:
                del self._nodes[next(iter(self._nodes))]

    def messages(self) -> list[dict[str, Any]]:
        """Return the stored messages, in the order of the nodes' last messages and of each node's."""
        with self._lock:
            return [message for kept in self._nodes.values() for message in kept.values()]


# The routes of the one server and the nodes that it executes share this store.
MESSAGES = MessageStore()


def prompt_server():
    """Return ComfyUI's server, or None if ComfyUI runs without one."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def _running(prompt: str) -> tuple | None:
    """Return a running prompt as (number, id, prompt, extra data, outputs, ...), or None if it does not run."""
    running = getattr(getattr(prompt_server(), "prompt_queue", None), "currently_running", {})
    return next((item for item in list(running.values()) if item[1] == prompt), None)


def workflow_of(prompt: str) -> str:
    """Return the id of the workflow that a running prompt was queued from; empty if no page queued it."""
    workflow_id = graph_of(prompt).get("workflow", {}).get("id")
    return workflow_id if isinstance(workflow_id, str) and len(workflow_id) <= _ID_LIMIT else ""


def graph_of(prompt: str) -> dict[str, dict[str, Any]]:
    """Return a running prompt under ComfyUI's own names: `prompt`, and `workflow` if a page queued it."""
    item = _running(prompt)
    # The extra data is untrusted.
    extra: Any = item[3] if item is not None else None
    for name in ("extra_pnginfo", "workflow"):
        extra = extra.get(name) if isinstance(extra, dict) else None
    graph = {"prompt": running_prompt(prompt), "workflow": extra}
    return {name: value for name, value in graph.items() if isinstance(value, dict)}


def running_prompt(prompt: str) -> dict[str, Any] | None:
    """Return the nodes of a running prompt, by id; None if it does not run on this server."""
    item = _running(prompt)
    return item[2] if item is not None else None


def neutral_inputs(kind: str) -> set[str]:
    """Return the inputs of a node class that do not affect the run of a training."""
    return _NEUTRAL.get(kind, set())


def sources_of(prompt: str, node: str) -> dict[str, dict[str, Any]] | None:
    """Collect the inputs that decide a node's result in a running prompt: the node and those before it, by id.

    Each is {"class_type", "inputs"} without the inputs that do not affect the run. Links lead past option nodes that
    set nothing. Return None if the prompt does not run here, or is too large for the pages.
    """
    nodes = running_prompt(prompt) or {}
    sources: dict[str, dict[str, Any]] = {}
    pending = [node]
    while pending and len(sources) <= _MOST_SOURCES:
        name = pending.pop()
        entry = nodes.get(name)
        if name in sources or not isinstance(entry, dict):
            continue
        inputs = _deciding_inputs(entry, nodes, is_asked=name == node)
        sources[name] = {"class_type": entry.get("class_type"), "inputs": inputs}
        pending += [value[0] for value in inputs.values() if _is_link(value, nodes)]
    if not sources or len(sources) > _MOST_SOURCES or len(json.dumps(sources)) > _SOURCES_LIMIT:
        return None
    return sources


def _deciding_inputs(entry: dict[str, Any], nodes: dict[str, Any], is_asked: bool) -> dict[str, Any]:
    """Return the inputs of a prompt's node that affect the run.

    Args:
        is_asked: the run is this node's. The steps of a trainer before it decide what the run starts from.
    """
    kind = entry.get("class_type", "")
    neutral = neutral_inputs(kind) if is_asked or kind not in TRAINERS else set()
    inputs = {name: value for name, value in entry.get("inputs", {}).items() if name not in neutral}
    links = {name: _past_unset_options(value, nodes) for name, value in inputs.items() if _is_link(value, nodes)}
    return {name: value for name, value in {**inputs, **links}.items() if value is not None or name not in links}


def _past_unset_options(link: list, nodes: dict[str, Any]) -> list | None:
    """Return the source of a link past option nodes that set nothing; None if nothing precedes them."""
    seen = set()
    while _is_link(link, nodes) and link[0] not in seen and _sets_nothing(nodes[link[0]]):
        seen.add(link[0])
        link = nodes[link[0]]["inputs"].get("options")
    return link


def _sets_nothing(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("class_type") not in _OPTIONS:
        return False
    declared = _OPTIONS[entry["class_type"]]
    ignored = neutral_inputs(entry["class_type"]) | {"options"}
    rest = {name: value for name, value in entry.get("inputs", {}).items() if name not in ignored}
    return all(name in declared and value == declared[name].unset for name, value in rest.items())


def _is_link(value: Any, nodes: dict[str, Any]) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in nodes


def digest_of(sources: dict[str, dict[str, Any]] | None) -> str:
    """Return the digest of the result of `sources_of`; empty for None."""
    return "" if sources is None else hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16]


def send(message: dict[str, Any]) -> None:
    """Send a message of a training node to all open pages, and keep it for pages that open later.

    Args:
        message: holds at least node, prompt_id, workflow and event.
    """
    plain = jsonable(message)
    MESSAGES.note(plain)
    server = prompt_server()
    if server is not None:
        server.send_sync(EVENT, plain)
