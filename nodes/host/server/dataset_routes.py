"""HTTP routes of the dataset page: what a folder holds, its pictures, and edits of it.

`folder` is the value of the node's input of that name; `name` is a picture's, relative to it, with forward slashes.

GET  /graft/dataset?folder=F&trigger=T&resolution=N&upscale=0|1&masks=&mask_folder=&validation_folder=
         &control_folder=&control_folder_2=&control_folder_3=&sources_optional=0|1&worse_folder=
         &frames=&frame_rate=&clips=
GET  /graft/dataset/alike?...      as above: pairs of pictures that look alike; decodes new pictures, which takes time
GET  /graft/dataset/losses?folder=F   the loss of its pictures in the last run on it
GET  /graft/dataset/folders        the folders that the node can name, and those that take uploads
GET  /graft/dataset/thumbnail?folder=F&name=N&mark=M   WebP, at most 256 pixels a side; M makes the address unique,
                                                        &moving=1 gives the first seconds of a clip
GET  /graft/dataset/picture?folder=F&name=N&mark=M     JPEG, full size, upright
GET  /graft/dataset/mask?folder=F&name=N&masks=&mask_folder=   PNG of one channel: white is learned
POST /graft/dataset/captions       {folder, edits: [{name, text, was}]}
POST /graft/dataset/exclude        {folder, names, excluded}
POST /graft/dataset/center         {folder, name, center: [x, y] or null}, in fractions of width and height
POST /graft/dataset/repeats        {folder, subfolder, repeats: N or null}
POST /graft/dataset/trash          {folder, names}: move to FOLDER/.trash, with captions and masks
POST /graft/dataset/restore        {folder, names}: move back
POST /graft/dataset/rotate         {folder, name, degrees: 90, 180 or 270, mask_folder, control_folder, ...}, clockwise
POST /graft/dataset/added          {folder, names}: remove new files that the folder holds already, name unreadable ones
POST /graft/dataset/mask?folder=F&name=N&masks=&mask_folder=   body: PNG of the picture's size; empty: remove the mask

Requests are checked as in `routes`. Only files in the named folder are written.
"""

import asyncio
import functools
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from aiohttp import web

from ....trainers.curation import caption_edits, picture_edits, uploads
from ....trainers.curation.caption_edits import CaptionEdit
from ....trainers.curation.folder import one_clip, one_picture
from ....trainers.curation.page import (
    PageOptions,
    find_alike,
    full_picture,
    moving_thumbnail,
    read_mask,
    read_page,
    thumbnail,
)
from ....trainers.data.scan import MASKS, ScanOptions
from ....trainers.data.source_images import CONTROL_FOLDERS, WORSE_FOLDER
from ....trainers.errors import DatasetError, GraftError
from ....trainers.runs.records import last_loss_by_picture, read_graph
from ....trainers.runs.run import Run
from ....trainers.video import PIECES
from .. import dataset_folders, paths
from .control import REGISTRY
from .http import BODY, Refusal, answering, in_thread, read_number
from .prompt_queue import RETURNING, list_prompts

_PREFIX = "/graft/dataset"
_MOST_NAMES = 100_000
_TEXT_LIMIT = 32 * 1024 * 1024
_MASK_LIMIT = 64 * 1024 * 1024
_MOST_REPEATS = 10_000
# Decoding takes up to 16 bytes a pixel, so few pictures are decoded at a time.
_DECODERS = 2


def add_routes(routes: web.RouteTableDef) -> None:
    """Add the routes to ComfyUI's."""
    decoding = asyncio.Semaphore(_DECODERS)
    pictures = {"thumbnail": _thumbnail, "picture": _picture, "mask": _mask}
    edits = {
        "captions": _edit_captions,
        "exclude": _exclude,
        "center": _set_center,
        "repeats": _set_repeats,
        "trash": _discard,
        "restore": _restore,
        "rotate": _rotate,
        "added": _check_added,
    }
    routes.get(_PREFIX)(answering(_show, is_private=True))
    routes.get(f"{_PREFIX}/losses")(answering(_list_losses, is_private=True))
    routes.get(f"{_PREFIX}/folders")(answering(_list_folders, is_private=True))
    # Comparing a large folder takes minutes, in which its pictures are looked at.
    comparing = asyncio.Semaphore(1)
    routes.get(f"{_PREFIX}/alike")(answering(functools.partial(_find_alike, comparing), is_private=True))
    for name, work in pictures.items():
        send = functools.partial(_send_picture, decoding, work)
        routes.get(f"{_PREFIX}/{name}")(answering(send, is_private=True))
    for name, work in edits.items():
        routes.post(f"{_PREFIX}/{name}")(answering(functools.partial(_edit, work), _TEXT_LIMIT))
    routes.post(f"{_PREFIX}/mask")(answering(_write_mask, _MASK_LIMIT, "image/png"))


async def _show(request: web.Request) -> dict[str, Any]:
    folder, options = await in_thread(_asked, request.query)
    page = await in_thread(read_page, folder, options, _count_tokens, paths.index_folder())
    folders = [
        {"name": name, "repeats": repeats, "chosen": name in page.chosen}
        for name, repeats in sorted(page.folders.items())
    ]
    return {
        **vars(page),
        # asdict would copy every value of every picture.
        "pictures": [vars(row) for row in page.pictures],
        "left_out": [vars(row) for row in page.left_out],
        "folder": request.query.get("folder", ""),
        "folders": folders,
        "training": _is_trained(request.query.get("folder", "")),
    }


async def _find_alike(comparing: asyncio.Semaphore, request: web.Request) -> dict[str, Any]:
    folder, options = await in_thread(_asked, request.query)
    async with comparing:
        pairs, broken = await in_thread(find_alike, folder, options, paths.index_folder())
    return {"pairs": pairs, "broken": [asdict(row) for row in broken]}


async def _list_losses(request: web.Request) -> dict[str, Any]:
    folder = await in_thread(dataset_folders.dataset_path, request.query.get("folder", ""))
    is_on = functools.partial(_is_on, folder)
    run, losses = await in_thread(last_loss_by_picture, paths.folders(), os.path.basename(folder), is_on)
    return {"run": run, "losses": losses.marked()}


def _is_on(folder: str, run: Run) -> bool:
    """Report whether a run is on a folder, not on another of its name, by the workflow that it was queued with."""
    try:
        nodes = read_graph(run)["prompt"].values()
        choices = [node["inputs"].get("folder") for node in nodes]
    except (GraftError, OSError, KeyError, TypeError, AttributeError):
        return True
    name = os.path.basename(folder)
    namesakes = [choice for choice in choices if isinstance(choice, str) and choice.rstrip("/").endswith(name)]
    return not namesakes or any(_leads_to(choice, folder) for choice in namesakes)


def _leads_to(choice: str, folder: str) -> bool:
    try:
        return dataset_folders.dataset_path(choice) == folder
    except DatasetError:
        return False


async def _list_folders(request: web.Request) -> dict[str, Any]:
    folders = await in_thread(dataset_folders.dataset_choices)
    return {"folders": folders, "uploads": await in_thread(dataset_folders.below_input, folders)}


def _asked(query) -> tuple[str, PageOptions]:
    """Return the folder's path, and the node's settings. Raise DatasetError or Refusal for invalid ones."""
    folder = query.get("folder", "")
    masks = query.get("masks", MASKS[0])
    if masks not in MASKS:
        raise Refusal(400, f"masks is none of {', '.join(MASKS)}.")
    pieces = query.get("clips") or PIECES[0]
    if pieces not in PIECES:
        raise Refusal(400, f"clips is none of {', '.join(PIECES)}.")
    mask_folder = query.get("mask_folder", "").strip()
    control, *more_controls = dataset_folders.control_paths(folder, [query.get(name, "") for name in CONTROL_FOLDERS])
    reading = ScanOptions(
        lines_are_variants=query.get("lines_are_variants") == "1",
        masks=masks,
        mask_folder=dataset_folders.dataset_path(mask_folder, "mask_folder") if mask_folder else "",
        validation_folder=query.get("validation_folder", ""),
        control_folder=control,
        more_control_folders=tuple(more_controls),
        sources_optional=query.get("sources_optional") == "1",
        worse_folder=dataset_folders.control_path(folder, query.get(WORSE_FOLDER, ""), WORSE_FOLDER),
        frames=read_number(query.get("frames") or "0", 10_000),
        frame_rate=_read_rate(query.get("frame_rate") or "0"),
        pieces=pieces,
    )
    resolution = read_number(query.get("resolution", "0"), 16384)
    return dataset_folders.dataset_path(folder), PageOptions(
        query.get("trigger", ""), resolution, query.get("upscale") == "1", reading
    )


def _read_rate(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,9})?", text):
        raise Refusal(400, "frame_rate is not a number.")
    return float(text)


@functools.lru_cache(maxsize=1)
def _tokenizer():
    from comfy.sd1_clip import SDTokenizer

    return SDTokenizer()


@functools.lru_cache(maxsize=50_000)
def _count_tokens(text: str) -> int:
    """Return a text's number of tokens for CLIP; 0 for a short one, whose number does not matter."""
    # A token has at least one character, and the tokenizer adds a first and a last one.
    return len(_tokenizer().tokenizer(text)["input_ids"]) - 2 if len(text) > 75 else 0


def _is_trained(folder: str) -> bool:
    """Report whether a training uses the folder, or one that gave way and waits in the queue."""
    nodes = [node for training in REGISTRY.all() for node in (training.sources or {}).values()]
    for item in itertools.chain(*list_prompts()):
        if RETURNING.find(item[1]) is not None:
            nodes += item[2].values()
    return any(node["inputs"].get("folder") == folder for node in nodes)


async def _send_picture(decoding: asyncio.Semaphore, work: Callable, request: web.Request) -> web.Response:
    async with decoding:
        content, kind = await in_thread(work, request.query)
    headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}
    # The address holds the picture's mark, so it never gets another content.
    headers["Cache-Control"] = "private, max-age=31536000, immutable" if request.query.get("mark") else "no-store"
    return web.Response(body=content, content_type=kind, headers=headers)


def _thumbnail(query) -> tuple[bytes, str]:
    if query.get("moving"):
        return moving_thumbnail(_source(query, one_clip)), "image/webp"
    return thumbnail(_source(query), paths.folders().cache), "image/webp"


def _picture(query) -> tuple[bytes, str]:
    return full_picture(_source(query)), "image/jpeg"


def _mask(query) -> tuple[bytes, str]:
    folder, options = _asked(query)
    return read_mask(folder, query.get("name", ""), options.reading), "image/png"


def _source(query, find=one_picture):
    try:
        return find(dataset_folders.dataset_path(query.get("folder", "")), query.get("name", ""))
    except DatasetError as error:
        raise Refusal(404, str(error)) from error


async def _edit(work: Callable, request: web.Request) -> dict[str, Any]:
    body = request[BODY]
    try:
        folder = await in_thread(dataset_folders.dataset_path, body.get("folder"))
        return await in_thread(work, folder, body)
    except GraftError as error:
        raise Refusal(409, str(error)) from error


def _names(body: dict[str, Any]) -> list[str]:
    names = body.get("names")
    if not isinstance(names, list) or len(names) > _MOST_NAMES or not all(isinstance(name, str) for name in names):
        raise Refusal(400, "names is not a list of names.")
    return names


def _name(body: dict[str, Any], key: str = "name") -> str:
    if not isinstance(body.get(key), str):
        raise Refusal(400, f"{key} is not a name.")
    return body[key]


def _edit_captions(folder: str, body: dict[str, Any]) -> dict[str, Any]:
    rows = body.get("edits")
    fields = ("name", "text", "was")
    is_list = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not is_list or not all(isinstance(row.get(field), str) for row in rows for field in fields):
        raise Refusal(400, "edits is not a list of {name, text, was}.")
    lines = body.get("lines_are_variants") is True
    edits = [CaptionEdit(*(row[field] for field in fields)) for row in rows]
    return {"results": [asdict(result) for result in caption_edits.edit_captions(folder, edits, lines)]}


def _exclude(folder: str, body: dict[str, Any]) -> dict[str, Any]:
    if type(body.get("excluded")) is not bool:
        raise Refusal(400, "excluded is neither true nor false.")
    return {"excluded": picture_edits.exclude(folder, _names(body), body["excluded"])}


def _set_center(folder: str, body: dict[str, Any]) -> dict[str, Any]:
    center = body.get("center")
    is_point = isinstance(center, list) and len(center) == 2 and all(type(part) in (int, float) for part in center)
    if center is not None and not (is_point and all(0.0 <= part <= 1.0 for part in center)):
        raise Refusal(400, "center is not a point of the picture.")
    point = None if center is None else (float(center[0]), float(center[1]))
    picture_edits.set_center(folder, _name(body), point)
    return {"name": body["name"], "center": point}


def _set_repeats(folder: str, body: dict[str, Any]) -> dict[str, Any]:
    repeats = body.get("repeats")
    if repeats is not None and not (type(repeats) is int and 1 <= repeats <= _MOST_REPEATS):
        raise Refusal(400, f"repeats is not a number from 1 to {_MOST_REPEATS}.")
    picture_edits.set_repeats(folder, _name(body, "subfolder"), repeats)
    return {"subfolder": body["subfolder"], "repeats": repeats}


def _discard(folder: str, body: dict[str, Any]) -> dict[str, Any]:
    moved, failed = picture_edits.discard(folder, _names(body))
    return {"moved": moved, "failed": [{"name": name, "error": reason} for name, reason in failed]}


def _restore(folder: str, body: dict[str, Any]) -> dict[str, Any]:
    restored, failed = picture_edits.restore(folder, _names(body))
    return {"restored": restored, "failed": [{"name": name, "error": reason} for name, reason in failed]}


def _rotate(folder: str, body: dict[str, Any]) -> dict[str, Any]:
    if body.get("degrees") not in (90, 180, 270):
        raise Refusal(400, "degrees is none of 90, 180, 270.")
    masks = body.get("mask_folder", "")
    mask_folder = dataset_folders.dataset_path(masks, "mask_folder") if masks != "" else ""
    inputs = (*CONTROL_FOLDERS, WORSE_FOLDER)
    paired = {input: dataset_folders.control_path(body["folder"], body.get(input, ""), input) for input in inputs}
    picture_edits.rotate(folder, _name(body), body["degrees"], mask_folder, paired)
    return {"name": body["name"]}


def _check_added(folder: str, body: dict[str, Any]) -> dict[str, Any]:
    added = uploads.check_added(folder, _names(body))
    duplicates = [{"name": name, "of": original} for name, original in added.duplicates]
    return {**asdict(added), "duplicates": duplicates, "folder": body["folder"]}


async def _write_mask(request: web.Request) -> dict[str, Any]:
    query, content = request.query, request[BODY]
    name = query.get("name", "")
    if query.get("masks") == "off" or query.get("mask_folder", "").strip():
        raise Refusal(409, "Training would ignore this mask: the node's masks are off, or its mask_folder is set.")
    try:
        folder = await in_thread(dataset_folders.dataset_path, query.get("folder", ""))
        has_mask = await in_thread(picture_edits.write_mask, folder, name, content)
    except GraftError as error:
        raise Refusal(409, str(error)) from error
    return {"name": name, "mask": has_mask}
