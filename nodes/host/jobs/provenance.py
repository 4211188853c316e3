"""Provenance of a graph's model: the ComfyUI nodes that lead to it, recorded and executed again elsewhere.

A MODEL does not know its file. The graph does: it holds the nodes from the loaders to the trainer's sockets, with their
widgets. ComfyUI's own nodes are executed again as they stand, LoRA and ModelSampling nodes among them. The weights'
fingerprints then show whether the same model came out.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import comfyui_version
import folder_paths
import torch
from comfy_execution.utils import get_executing_context

import nodes

from ....trainers.errors import ModelError
from ....trainers.fingerprints import earlier_fingerprint
from ....trainers.formats.atomic import file_hash
from ..server.messages import running_prompt

if TYPE_CHECKING:
    from ....trainers.protocols import Host

SOCKETS = ("model", "clip", "vae")
PREVIEW = "preview model"

_CORE = ("nodes", "comfy_extras.")
# Limit of the nodes between a loader and a trainer; no user makes more.
_MOST_NODES = 500


def describe(node: str, host: Host, files: bool) -> dict[str, Any]:
    """Return the nodes that lead to the models, text encoder and VAE of the executing node; JSON-able.

    Args:
        host: the node's inputs. Their fingerprints are compared with those of the inputs that are loaded again.
        files: list the files with their hashes, for other machines. This reads every file whole.

    Raises:
        ModelError: the provenance is unknown, or includes nodes of other packs.
    """
    prompt = _executing_prompt()
    inputs = (prompt or {}).get(node, {}).get("inputs", {})
    links = {socket: inputs.get(socket) for socket in SOCKETS}
    if host.preview_model is not None:
        links[PREVIEW] = (prompt or {}).get(host.preview_model.node, {}).get("inputs", {}).get("model")
    if not all(_is_link(link) for link in links.values()):
        raise ModelError(
            "Cannot find out which files the model comes from: this node is not in the prompt that is running.",
            "Put the loaders and this node into the graph itself, not behind nodes that create others while they run.",
            "model",
        )
    collected: dict[str, dict] = {}
    for socket, link in links.items():
        _collect(prompt, link[0], socket, collected)
    listed = _files_of(collected) if files else []
    return {
        "nodes": collected,
        "sockets": links,
        "files": listed,
        "fingerprints": fingerprints(host),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions that decide a training's last digits."""
    return {"ComfyUI": comfyui_version.__version__, "PyTorch": torch.__version__}


def _executing_prompt() -> dict[str, Any] | None:
    context = get_executing_context()
    return running_prompt(context.prompt_id) if context is not None else None


def loader_texts(node: str) -> list[str]:
    """Return the texts on the loader that a node's `model` comes from, such as the file's name; none if unknown."""
    prompt = _executing_prompt() or {}
    seen: set[str] = set()
    while node in prompt and node not in seen:
        seen.add(node)
        inputs = prompt[node]["inputs"]
        link = inputs.get("model")
        if not _is_link(link):
            return [value for value in inputs.values() if isinstance(value, str)] if len(seen) > 1 else []
        node = link[0]
    return []


def fingerprints(host: Host) -> dict[str, str]:
    """Return the fingerprints of a host's model, text encoder and VAE, by socket."""
    return {
        "model": host.denoiser.fingerprint(),
        "clip": host.text.fingerprint(),
        "vae": host.codec.fingerprint(),
    }


def earlier_fingerprints(host: Host) -> dict[str, str]:
    """Return the same fingerprints as earlier versions computed them."""
    parts = {"model": host.denoiser, "clip": host.text, "vae": host.codec}
    return {socket: earlier_fingerprint(part) for socket, part in parts.items()}


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


def _collect(prompt: dict, start: str, socket: str, collected: dict[str, dict]) -> None:
    """Add a node and all nodes that lead to it. Raises ModelError as `describe` does."""
    pending = [start]
    while pending:
        identity = pending.pop()
        if identity in collected:
            continue
        if identity not in prompt or len(collected) >= _MOST_NODES:
            raise ModelError(f"Node {identity}, which leads to the {socket}, is not in the prompt.", "", socket)
        kind, inputs = prompt[identity]["class_type"], prompt[identity]["inputs"]
        if not _is_core(kind):
            raise ModelError(
                f"The {socket} comes through a {kind} (node {identity}). It is not one of ComfyUI's own nodes and "
                "cannot run again elsewhere.",
                "Save its output (CheckpointSave, or Graft Save Adapter and LoraLoader) and load that.",
                socket,
            )
        _refuse_writer(kind, socket)
        collected[identity] = {"class_type": kind, "inputs": inputs}
        pending += [value[0] for value in inputs.values() if _is_link(value)]


def _refuse_writer(kind: str, socket: str = "") -> None:
    """Refuse a node that writes files: a job executes only nodes that lead to a model. Raises ModelError."""
    if getattr(nodes.NODE_CLASS_MAPPINGS[kind], "OUTPUT_NODE", False):
        raise ModelError(
            f"The job's model comes through a {kind}, which writes files.",
            "Connect the node before it, and export the job again.",
            socket,
        )


def _is_core(kind: str) -> bool:
    node_class = nodes.NODE_CLASS_MAPPINGS.get(kind)
    return node_class is not None and getattr(node_class, "RELATIVE_PYTHON_MODULE", "nodes").startswith(_CORE)


def _files_of(graph: dict[str, dict]) -> list[dict[str, Any]]:
    """Return the files that the nodes' widgets name, each with its ComfyUI list, its size and its hash."""
    rows = {}
    for node in graph.values():
        for name, value in node["inputs"].items():
            kind = _list_of(node["class_type"], name, value)
            if kind is not None:
                path = folder_paths.get_full_path(kind, value)
                row = {"list": kind, "name": value, "bytes": os.path.getsize(path), "sha256": file_hash(path)}
                rows[kind, value] = row
    return list(rows.values())


def _list_of(kind: str, name: str, value: Any) -> str | None:
    """Return the ComfyUI file list that a widget chooses from, or None."""
    if not isinstance(value, str):
        return None
    declared = nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
    given = next((declared[group][name] for group in ("required", "optional") if name in declared.get(group, {})), ())
    choices = given[0] if given and isinstance(given[0], list) else None
    if choices is None and len(given) > 1 and isinstance(given[1], dict):
        choices = given[1].get("options")
    if not choices or value not in choices:
        return None
    holding = [folder for folder in folder_paths.folder_names_and_paths if folder_paths.get_full_path(folder, value)]
    whole = [folder for folder in holding if set(folder_paths.get_filename_list(folder)) <= set(choices)]
    return (whole or [None])[0]


def check_files(base: dict[str, Any]) -> None:
    """Check that the files of a base exist here and are the same.

    Raises:
        ModelError: a file is missing or differs; the message gives its name and the expected hash.
    """
    for error in _file_problems(base):
        raise error


def problems(base: dict[str, Any]) -> Iterator[ModelError]:
    """Yield an error for each file and each node of a base that this ComfyUI lacks, or has another one of."""
    try:
        yield from _file_problems(base)
        _load_core_nodes(base)
        for kind in sorted({node["class_type"] for node in base["nodes"].values()}):
            if not _is_core(kind):
                yield _no_node(kind)
        # The worker reads these too.
        for name in ("sockets", "fingerprints"):
            dict(base[name])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        yield ModelError(f"The job's base is damaged: {error!r:.100}.", "Export the job again.")


def _file_problems(base: dict[str, Any]) -> Iterator[ModelError]:
    for row in base["files"]:
        name, kind, wanted = row["name"], row["list"], row["sha256"]
        path = folder_paths.get_full_path(kind, name) if kind in folder_paths.folder_names_and_paths else None
        if path is None:
            yield ModelError(
                f"ComfyUI's {kind} folders do not contain '{name}' ({row['bytes'] / 1e6:.0f} MB, SHA-256 {wanted}).",
                "Copy the file there, under this name.",
            )
        elif os.path.getsize(path) != row["bytes"] or file_hash(path) != wanted:
            yield ModelError(
                f"The file '{path}' differs from the one that the job was made with (SHA-256 {wanted}).",
                "Copy the job's file there, or export the job again.",
            )


def _load_core_nodes(base: dict[str, Any]) -> None:
    """Load those of ComfyUI's own nodes that it loads late, if the base names nodes that are not there yet."""
    if any(node["class_type"] not in nodes.NODE_CLASS_MAPPINGS for node in base["nodes"].values()):
        asyncio.run(nodes.init_builtin_extra_nodes())


def _no_node(kind: str) -> ModelError:
    return ModelError(f"This ComfyUI has no node {kind} of its own.", "Update ComfyUI.")


def load(base: dict[str, Any], sockets: Iterable[str] = SOCKETS) -> dict[str, Any]:
    """Return the model, text encoder and VAE of a base, by socket; or those of other sockets, as far as it has them.

    Raises:
        ModelError: the base names a node that is missing from it, or that this ComfyUI does not have as its own.
    """
    _load_core_nodes(base)
    done: dict[str, tuple] = {}
    links = {socket: base["sockets"][socket] for socket in sockets if socket in base["sockets"]}
    return {socket: _output(base["nodes"], link, done, ()) for socket, link in links.items()}


def _output(graph: dict[str, dict], link: list, done: dict[str, tuple], path: tuple[str, ...]) -> Any:
    identity, place = link
    if identity in path or identity not in graph:
        raise ModelError(f"The job's node {identity} is missing, or depends on itself.", "Export the job again.")
    if identity not in done:
        kind, inputs = graph[identity]["class_type"], graph[identity]["inputs"]
        if not _is_core(kind):
            raise _no_node(kind)
        _refuse_writer(kind)
        node_class = nodes.NODE_CLASS_MAPPINGS[kind]
        declared = node_class.INPUT_TYPES()
        values = {
            name: _output(graph, value, done, (*path, identity)) if _is_link(value) else value
            for name, value in inputs.items()
            # ComfyUI also ignores inputs that a node does not declare.
            if any(name in declared.get(group, {}) for group in ("required", "optional"))
        }
        done[identity] = _executed(node_class, values)
    return done[identity][place]


def _executed(node_class: type, values: dict[str, Any]) -> tuple:
    """Return a node's outputs, for both of ComfyUI's kinds of node classes."""
    runs = getattr(node_class if hasattr(node_class, "define_schema") else node_class(), node_class.FUNCTION)
    result = runs(**values)
    if inspect.isawaitable(result):
        result = asyncio.run(_waited(result))
    return tuple(getattr(result, "result", result))


async def _waited(result: Any) -> Any:
    return await result
