"""Conversion of a saved workflow (UI format) into a prompt for the server (API format).

The frontend does the same when the user presses Run. The demo and the tests have no browser, and this lets them queue
the same files that users open. A test compares it with the frontend's own `graphToPrompt`.
"""

import json
from pathlib import Path

# Node modes of the editor.
MUTED = 2
BYPASSED = 4

# Nodes that exist only in the editor.
NOTES = {"Note", "MarkdownNote"}
REROUTE = "Reroute"

# Input types that the editor draws as widgets, unless the input asks for a socket only.
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}
UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload")


class WorkflowError(ValueError):
    """The workflow cannot be queued as it is; the message names the node and the reason."""


def read_workflow(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def to_prompt(workflow, object_info, overrides=None):
    """Convert a UI-format workflow to an API-format prompt.

    object_info is the server's. overrides, {node: {input: value}} with a node's id, title or type, replaces widget
    values. An override without a matching node or input is an error.
    """
    graph = _Graph(workflow)
    prompt = {}
    for node in graph.nodes.values():
        if _is_active(node):
            prompt[str(node["id"])] = _convert(node, graph, object_info)
    for name, values in (overrides or {}).items():
        _override(prompt, graph, object_info, name, values)
    return prompt


def find_nodes(workflow, name):
    """Return the nodes whose id, title or type is `name`."""
    return [node for node in workflow["nodes"] if name in (str(node["id"]), node.get("title"), node["type"])]


class _Graph:
    """A workflow's nodes and links by id, and the real source of each link."""

    def __init__(self, workflow):
        self.workflow = workflow
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {}
        for link in workflow["links"]:
            if isinstance(link, dict):
                self.links[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self.links[link[0]] = (link[1], link[2])

    def find_source(self, link_id):
        """Return [node id, slot] of the output that a link carries, or None if no node runs there."""
        while link_id is not None:
            origin, slot = self.links[link_id]
            node = self.nodes[origin]
            if _is_active(node):
                return [str(origin), slot]
            link_id = _pass_through(node, slot)
        return None


def _is_active(node):
    return node.get("mode", 0) not in (MUTED, BYPASSED) and node["type"] not in NOTES | {REROUTE}


def _pass_through(node, slot):
    """Return the link that a reroute or a bypassed node passes on at an output, or None."""
    inputs = node.get("inputs") or []
    if node["type"] == REROUTE:
        return inputs[0].get("link")
    if node.get("mode") != BYPASSED:
        return None
    wanted = node["outputs"][slot]["type"]
    same_place = inputs[slot : slot + 1]
    for socket in [*same_place, *inputs]:
        if socket["type"] == wanted:
            return socket.get("link")
    return None


def _convert(node, graph, object_info):
    """Return one node's entry in the prompt: its widget values, then its links."""
    if node["type"] not in object_info:
        raise WorkflowError(f"node {node['id']}: the server has no node type {node['type']!r}; is its pack installed?")
    schema = object_info[node["type"]]
    inputs = _read_widgets(node, schema)
    for socket in node.get("inputs") or []:
        if socket.get("link") is None:
            continue
        inputs.pop(socket["name"], None)
        source = graph.find_source(socket["link"])
        if source:
            inputs[socket["name"]] = source
    title = node.get("title") or schema.get("display_name") or node["type"]
    return {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}


def _read_widgets(node, schema):
    """Return {input: value} from `widgets_values`, which holds the widgets in the schema's order."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return {name: saved[name] for name, _ in _list_widgets(schema) if name in saved}
    values = {}
    place = 0
    for name, companions in _list_widgets(schema):
        if place < len(saved):
            values[name] = _wrap(saved[place])
        else:
            values[name] = _find_default(schema, name)
        place += 1 + companions
    return {name: value for name, value in values.items() if value is not None}


def _list_widgets(schema):
    """Return [(input, n)] in the editor's order of widgets; n counts the widgets that it adds after each."""
    found = []
    for name, spec in _list_inputs(schema):
        kind, options = _split(spec)
        is_combo = isinstance(kind, list) or kind.startswith("COMBO")
        if (is_combo or kind in WIDGETS) and not options.get("forceInput"):
            found.append((name, _count_companions(name, kind, options)))
    return found


def _count_companions(name, kind, options):
    """Count widgets after this one that are saved but not sent: `control_after_generate`, the upload button."""
    control = options.get("control_after_generate")
    if control is None:
        control = kind == "INT" and name in SEEDS
    return int(bool(control)) + int(any(options.get(key) for key in UPLOADS))


def _list_inputs(schema):
    for group in ("required", "optional"):
        names = schema.get("input_order", {}).get(group) or schema["input"].get(group, {})
        for name in names:
            yield name, schema["input"][group][name]


def _find_default(schema, name):
    """Return the value that the editor shows in a widget that the workflow does not set."""
    kind, options = _split(dict(_list_inputs(schema))[name])
    choices = kind if isinstance(kind, list) else options.get("options")
    if "default" in options:
        return options["default"]
    if choices:
        return choices[0]
    return {"INT": 0, "FLOAT": 0, "STRING": "", "BOOLEAN": False}.get(kind)


def _split(spec):
    """Split an input's spec into (type or list of choices, options)."""
    return spec[0], (spec[1] if len(spec) > 1 else {})


def _wrap(value):
    # The server would read a bare list as a link.
    return {"__value__": value} if isinstance(value, list) else value


def _override(prompt, graph, object_info, name, values):
    nodes = [node for node in find_nodes(graph.workflow, name) if str(node["id"]) in prompt]
    if not nodes:
        raise WorkflowError(f"no node with the id, title or type {name!r} runs in this workflow")
    for node in nodes:
        known = dict(_list_inputs(object_info[node["type"]]))
        for field, value in values.items():
            if field not in known:
                raise WorkflowError(f"node {node['id']} ({node['type']}) has no input {field!r}")
            prompt[str(node["id"])]["inputs"][field] = _wrap(value)
