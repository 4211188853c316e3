"""A seeded corpus of malformed, hostile or odd but valid inputs for a server, with the expected answers.

A trial writes its files, sends its request, and states the words that the answer must contain.
"""

import itertools
import json
import math
import random
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from . import graphs, odd_files, runs
from .server import PromptError, PromptRefused, describe_refusal

HTML = "<img src=x onerror=alert(1)>"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Trial:
    """One input.

    Attributes:
        kind: class of the input.
        name: name of the input.
        act: called with the server, returns (True if the server accepted it, the answer's text).
        says: regular expression that the answer must match.
        taken: True if the input is odd but valid.
        prepare: called with the server before the list of files is taken.
    """

    kind: str
    name: str
    act: Callable
    says: str
    taken: bool = False
    prepare: Callable = field(default=lambda server: None)


def every(defaults, trained, seed=0):
    """Return all trials, ordered so that each class is spread over the whole.

    Args:
        defaults: the server's nodes, as `known_nodes` returns them.
        trained: name of a run with two steps, made by `training_of(server, 2)`.
    """
    rng = random.Random(seed)
    made = []
    for group in (widgets, sockets, names, adapters, embeddings, pictures, captions, states, routes):
        made += group(rng, defaults, trained)
    rng.shuffle(made)
    return made


# Prompts


def run(server, prompt, node=None):
    """Run a prompt; return (True if it ran to its end, the answer), with ComfyUI's whole message for an error."""
    try:
        answer = server.submit(prompt)
        entry = server.wait(answer["prompt_id"], 300)
        if answer["node_errors"]:
            # The server refused one output and ran another.
            return False, describe_refusal(answer)
    except PromptRefused as refusal:
        return False, str(refusal)
    except PromptError as error:
        kind = error.error.get("exception_type", "").split(".")[-1]
        return False, f"{kind}: {error.error.get('exception_message')}"
    texts = [text for output in entry["outputs"].values() for text in output.get("text", ())]
    return True, "\n".join(texts)


def graph_of(defaults, kind, **values):
    """Return a prompt that reaches a node of a kind; its id is 5, and its widgets have defaults except for some."""
    prompt = graphs.training("toy", 1)
    prompt["9"] = graphs.node("GraftLoadAdapter", adapter_name="sound.safetensors")
    prompt["8"] = graphs.node("GraftLoadEmbedding", embedding_name="sound.safetensors")
    links = {"MODEL": ["1", 0], "CLIP": ["1", 1], "VAE": ["1", 2], "GRAFT_DATASET": ["2", 0], "LORA_MODEL": ["9", 0]}
    links |= {"GRAFT_EMBEDDING": ["8", 0], "IMAGE": ["7", 0], "LOSS_MAP": ["3", 3]}
    prompt["7"] = graphs.node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    inputs = dict(defaults[kind].widgets)
    inputs |= {name: links[socket] for name, socket in defaults[kind].sockets.items() if socket in links}
    prompt["5"] = graphs.node(kind, **{**inputs, **values})
    outputs = defaults[kind].outputs
    if outputs[:1] == ["GRAFT_OPTIONS"]:
        prompt["3"]["inputs"]["options"] = ["5", 0]
        return _needed(prompt, "3")
    if defaults[kind].is_output:
        return _needed(prompt, "5")
    place = {"GRAFT_DATASET": ("GraftInspectDataset", "dataset"), "LORA_MODEL": ("GraftInspectAdapter", "adapter")}
    place |= {"GRAFT_EMBEDDING": ("GraftSaveEmbedding", "embedding"), "MODEL": ("GraftInspectAdapter", "model")}
    place |= {"CLIP": ("GraftInspectAdapter", "clip"), "IMAGE": ("PreviewImage", "images")}
    end, name = place[outputs[0]]
    prompt["6"] = graphs.node(end, **{name: ["5", 0]})
    if end == "GraftInspectAdapter":
        prompt["6"]["inputs"].setdefault("adapter", ["9", 0])
    if name == "clip":
        prompt["6"]["inputs"]["model"] = ["1", 0]
    if end == "GraftSaveEmbedding":
        prompt["6"]["inputs"]["name"] = "saved-by-corpus"
    return _needed(prompt, "6")


def _needed(prompt, end):
    """Return the nodes that an output node needs."""
    found = {}
    left = [end]
    while left:
        one = left.pop()
        if one in found or one not in prompt:
            continue
        found[one] = prompt[one]
        left += [value[0] for value in prompt[one]["inputs"].values() if isinstance(value, list) and len(value) == 2]
    return found


@dataclass(frozen=True)
class Known:
    """A node of the server.

    Attributes:
        title: display name.
        widgets: default values.
        schemas: {input: (type, options)}.
        sockets: {input: type} of required sockets.
        optional: {input: type} of optional sockets.
        outputs: types.
        is_output: True if the node runs without a node behind it.
    """

    title: str
    widgets: dict
    schemas: dict
    sockets: dict
    optional: dict
    outputs: list
    is_output: bool


def known_nodes(server):
    """Return {node id: Known} of the pack's nodes."""
    found = {}
    for name, info in server.object_info().items():
        if not name.startswith("Graft"):
            continue
        schemas, sockets = {}, {"required": {}, "optional": {}}
        for group, held in sockets.items():
            for field_name, (kind, *rest) in info["input"].get(group, {}).items():
                options = rest[0] if rest else {}
                if isinstance(kind, list) or kind in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
                    schemas[field_name] = ("COMBO" if isinstance(kind, list) else kind, options)
                else:
                    held[field_name] = kind
        widgets = graphs.defaults_of(info)
        widgets |= {"folder": "toy"} if name == "GraftLoadDataset" else {}
        widgets |= {"adapter_name": "sound.safetensors"} if name == "GraftLoadAdapter" else {}
        widgets |= {"embedding_name": "sound.safetensors"} if name == "GraftLoadEmbedding" else {}
        for prompt_name in ("class_prompt", "instance_prompt"):
            if prompt_name in widgets:
                widgets[prompt_name] = "a photo of a toy"
        found[name] = Known(
            info["display_name"].partition(" (")[0],
            widgets,
            schemas,
            sockets["required"],
            sockets["optional"],
            info["output"],
            info["output_node"],
        )
    return found


NUMBERS = {
    "FLOAT": {
        "nan": (math.nan, "nan is not a number between"),
        "nan as text": ("nan", "nan is not a number between"),
        "infinite": (math.inf, "inf is not a number between"),
        "minus infinite": (-math.inf, "-inf is not a number between"),
        "huge": (1e308, "is not a number between"),
        "a word": ("much", "Failed to convert an input value to a FLOAT"),
        "an object": ({"a": 1}, "Failed to convert an input value to a FLOAT"),
        "nothing": (None, "Failed to convert an input value to a FLOAT"),
    },
    "INT": {
        "below": (-(10**6), "smaller than min"),
        "huge": (10**30, "bigger than max"),
        "huge float": (1e300, "bigger than max"),
        "nan": (math.nan, "Failed to convert an input value to a INT"),
        "infinite": (math.inf, "Failed to convert an input value to a INT"),
        "a word": ("many", "Failed to convert an input value to a INT"),
        "digits": ("9" * 5000, "Failed to convert an input value to a INT"),
        "an object": ({"a": 1}, "Failed to convert an input value to a INT"),
    },
    "STRING": {
        "NUL": ("a\0b", r"control character '\\x00'"),
        "escape": ("\x1b[2J\x07", r"control character '\\x1b'"),
        "half a character": ("\ud800", r"control character '\\ud800'"),
        "a megabyte": ("a" * 1_000_000, "has 1000000 characters|no name|is not a valid folder name"),
    },
    "COMBO": {
        "unknown": ("no such choice", "not in list|is not one of the choices|There is no"),
        "a number": (5, "not in list|not a text"),
        "an object": ({"a": 1}, "not in list|not a text"),
        "a list": ({"__value__": [1, 2, 3]}, "not in list|not a text"),
        "a path": ("../../../../etc/passwd", "not in list|is not one of the choices|There is no|lies outside"),
        # Not the name alone, because another trial creates a folder of that name.
        "HTML": (f"{HTML}<b>", "not in list|is not one of the choices|There is no|no folder"),
    },
}


def widgets(rng, defaults, trained):
    """Yield every widget of every node with every wrong value of its kind."""
    for name, known in sorted(defaults.items()):
        for field_name, (kind, _) in sorted(known.schemas.items()):
            for what, (value, says) in NUMBERS.get(kind, {}).items():
                if name == "GraftLoadDataset" and field_name == "mask_folder" and what == "half a character":
                    continue
                yield Trial(
                    f"widget {kind}",
                    f"{name}.{field_name} {what}",
                    _queueing(defaults, name, {field_name: value}),
                    rf"(?s){field_name}.*(?:{says})|(?:{says}).*{field_name}",
                )


def _queueing(defaults, kind, values):
    return lambda server: run(server, graph_of(defaults, kind, **values))


def sockets(rng, defaults, trained):
    """Yield literals in place of links."""
    for name, known in sorted(defaults.items()):
        for field_name in sorted({**known.sockets, **known.optional}):
            for what, value in {"a text": "text", "a number": 5, "an object": {"a": [1]}, "nothing": None}.items():
                if value is None and field_name in known.optional:
                    continue
                says = f"Error: {known.title} .node 5., input '{field_name}': "
                says += "The connected \\w+ is empty" if value is None else "The connected value is of type"
                yield Trial(
                    "socket", f"{name}.{field_name} {what}", _queueing(defaults, name, {field_name: value}), says
                )


# Names and paths

LEADING_OUT = {
    "up": "../../outside",
    "far up": "../" * 30 + "etc",
    "absolute": "/etc",
    "backslashes": "..\\..\\outside",
    "drive": "C:\\Windows",
    "share": "\\\\server\\share",
    "half way": "toy/../../../outside",
    "a link": "way-out",
    "through a link": "way-out/pictures",
    "a URL": "file:///etc/passwd",
    "home": "~/",
    "a variable": "$HOME",
    "NUL": "toy\0/../../outside",
    "long": "a" * 5000,
    "deep": "a/" * 2000 + "b",
}
FILE_NAMES = {
    "up": "../x",
    "far up": "a/../../../x",
    "absolute": "/tmp/graft-hostile",
    "backslashes": "..\\..\\x",
    "drive": "C:x",
    "stream": "x:stream",
    "device": "CON",
    "device with an ending": "nul.txt",
    "device as a folder": "aux/x",
    "point at the end": "x.",
    "space in front": "a/ x",
    "an empty part": "a//x",
    "HTML": HTML,
    "a question": "what?",
    "long": "x" * 400,
    "deep": "x/" * 40 + "x",
    "a link": "way-out/x",
}
WORDS = {
    "up": "../x",
    "folder": "a/b",
    "space": "two words",
    "weight": "(x:1.5)",
    "an ending": "x.safetensors",
    "device": "CON",
    "device with an ending": "nul.x",
    "HTML": HTML,
    "long": "x" * 101,
    "point": "x.",
    "letters": "h\u00fcte",
    "newline": "a\nb",
    "comma": "a,b",
    "backslash": "a\\b",
}
RUN_NAMES = {
    "up": "../x",
    "folder": "a/b",
    "backslash": "a\\b",
    "drive": "C:x",
    "HTML": HTML,
    "long": "x" * 101,
    "point": "x.",
    "points": "..",
    "newline": "a\nb",
    "hidden": ".x",
}


def names(rng, defaults, trained):
    """Yield names of folders and files that lead elsewhere, or are invalid on some system."""
    for what, value in LEADING_OUT.items():
        for input in ("folder", "mask_folder"):
            says = (
                f"input '{input}': .*(?:There is no folder|lies outside|is not a valid folder name|control character)"
            )
            act = _queueing(defaults, "GraftLoadDataset", {input: value})
            yield Trial("folder", f"{input} {what}", act, says)
        for name in (value, f"{value}.safetensors"):
            act = _queueing(defaults, "GraftLoadAdapter", {"adapter_name": name})
            yield Trial("file name", f"adapter {what} {name[-12:]!a}", act, "input 'adapter_name': There is no adapter")
        act = _queueing(defaults, "GraftLoadEmbedding", {"embedding_name": value})
        yield Trial("file name", f"embedding {what}", act, "input 'embedding_name': There is no embedding")
        act = _queueing(defaults, "GraftAdapterOptions", {"start_from": value})
        yield Trial("file name", f"start_from {what}", act, "input 'start_from': There is no adapter")
    for value in ("sound.pt", "sound.ckpt"):
        act = _queueing(defaults, "GraftLoadAdapter", {"adapter_name": value})
        yield Trial("file name", f"pickle {value}", act, "is not a .safetensors file.*hide programs", prepare=_pickles)
    for what, value in FILE_NAMES.items():
        act = _queueing(defaults, "GraftSaveAdapter", {"filename_prefix": value})
        yield Trial("prefix", what, act, "input 'filename_prefix': .*(?:Cannot use|leads out of)")
        act = _queueing(defaults, "GraftSaveDataset", {"folder": value})
        yield Trial("prefix", f"dataset {what}", act, "input 'folder': .*(?:Cannot use|is a link)")
    for what, value in WORDS.items():
        act = _queueing(defaults, "GraftSaveEmbedding", {"name": value})
        yield Trial("word", f"saved {what}", act, "input 'name': A prompt cannot use the embedding name")
        act = _queueing(defaults, "GraftTrainEmbedding", {"name": value})
        yield Trial("word", f"trained {what}", act, "input 'name': A prompt cannot use the embedding name")
        act = _queueing(defaults, "GraftPivotalOptions", {"name": value})
        yield Trial("word", f"pivotal {what}", act, "input 'name': A prompt cannot use the embedding name")
    for what, value in RUN_NAMES.items():
        act = _queueing(defaults, "GraftRunOptions", {"name": value})
        yield Trial("run name", what, act, "input 'name': The run name .*cannot be a folder name")
    for what, value in {
        "look-around": "attn(?!2)",
        "backreference": r"(a)\1",
        "laid out": "(?:a{99}){99}",
        "none": "(",
        "long": "a" * 999,
    }.items():
        for node, input, ending in (
            ("GraftAdapterOptions", "target_patterns", ""),
            ("GraftAdapterOptions", "block_ranks", "=4"),
            ("GraftApplyAdapter", "block_strengths", "=0.5"),
        ):
            says = f"input '{input}': .*(?:does not support|repeats too much|not a regular expression|longer than)"
            act = _queueing(defaults, node, {input: f"{value}{ending}"})
            yield Trial("pattern", f"{input} {what}", act, says)
    for value in ("512, -1", "1e9", "NaN", "9" * 400, "<b>", "\u0665\u0661\u0662x"):
        act = _queueing(defaults, "GraftLoadDataset", {"more_resolutions": value})
        yield Trial("text of numbers", f"{value[:9]!a}", act, "input 'more_resolutions': .*is not a resolution")
    for value in ("attn2=nan", "attn2=inf", "=4", "attn2", "attn2=4=", "a=-1"):
        act = _queueing(defaults, "GraftAdapterOptions", {"block_learning_rates": value})
        yield Trial("text of numbers", value, act, "input 'block_learning_rates': .*not pattern=value")


def _pickles(server):
    for name in ("sound.pt", "sound.ckpt"):
        server.path("models", "loras", name).write_bytes(b"cos\nsystem\n(S'touch /tmp/graft-hostile'\ntR.")


# Safetensors files


def safetensors(tensors=None, metadata=None, rows=None, header=None, size=None, data=None):
    """Return the bytes of a file, valid or not.

    Args:
        tensors: {name: float32 array}.
        rows: overrides of the tensors' header entries.
        header: header bytes that replace all of that.
        size: header size that the file claims.
        data: bytes that replace those of the tensors.
    """
    found, blob = {}, b""
    if metadata is not None:
        found["__metadata__"] = metadata
    for name, value in (tensors or {}).items():
        raw = np.ascontiguousarray(value, dtype=np.float32).tobytes()
        span = [len(blob), len(blob) + len(raw)]
        found[name] = {"dtype": "F32", "shape": list(np.shape(value)), "data_offsets": span}
        blob += raw
    found.update(rows or {})
    text = json.dumps(found).encode() if header is None else header
    blob = blob if data is None else data
    return struct.pack("<Q", len(text) if size is None else size) + text + blob


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(up=(32, 4), down=(4, 32), name=LAYER, value=0.01, alpha=4.0):
    """Return the tensors of one layer."""
    made = {f"{name}.lora_up.weight": np.full(up, value), f"{name}.lora_down.weight": np.full(down, value)}
    return made if alpha is None else {**made, f"{name}.alpha": np.array(alpha)}


def row(shape, start, stop, dtype="F32"):
    """Return a header's entry for a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def lying():
    """Return {description: (bytes, words of the reason)} of invalid safetensors files."""
    good = lora()
    whole = safetensors(good)
    deep = b"[" * 200_000
    none = "cannot be read as safetensors"
    return {
        "nothing": (b"", f"{none} .*ends after 0 of 8 bytes"),
        "four bytes": (b"abcd", f"{none} .*ends after 4 of 8 bytes"),
        "a text": (b"dear diary, this is no file of tensors at all", f"{none} .*its header has"),
        "a pickle": (b"\x80\x04\x95cos\nsystem\n" * 20, f"{none} .*its header has"),
        "a page": (b"<!doctype html><html><script>alert(1)</script></html>", f"{none} .*its header has"),
        "header beyond the file": (safetensors(good, size=10**6), f"{none} .*ends after .* of its header"),
        "header of 2^63": (safetensors(good, size=2**63), f"{none} .*its header has 9223372036854775808 bytes"),
        "header of 2^64-1": (safetensors(good, size=2**64 - 1), f"{none} .*its header has"),
        "empty header": (safetensors(header=b""), none),
        "no JSON": (safetensors(header=b"{'a': 1}"), none),
        "a list": (safetensors(header=b"[]"), f"{none} .*not a JSON object"),
        "a number": (safetensors(header=b"5"), f"{none} .*not a JSON object"),
        "nested": (safetensors(header=deep), f"{none} .*(?:nested too deeply|recursion)"),
        "nested objects": (safetensors(header=b'{"a":' * 100_000), f"{none} .*(?:nested too deeply|recursion)"),
        "not UTF-8": (safetensors(header=b'{"\xff\xfe": 1}'), f"{none} .*utf-8"),
        "UTF-16": (safetensors(header='{"a": 1}'.encode("utf-16")), none),
        "cut off": (whole[:-7], f"{none} .*bytes of data, but"),
        "too long": (whole + b"\0" * 8, f"{none} .*bytes of data, but"),
        "offsets beyond": (safetensors(rows={"a": row([4], 0, 16)}, data=b"\0" * 8), f"{none} .*bytes of data"),
        "offsets overlap": (
            safetensors(rows={"a": row([2], 0, 8), "b": row([2], 4, 12)}, data=b"\0" * 12),
            f"{none} .*overlap",
        ),
        "a gap": (safetensors(rows={"a": row([2], 0, 8), "b": row([2], 12, 20)}, data=b"\0" * 20), f"{none} .*gap"),
        "offsets back": (safetensors(rows={"a": row([2], 8, 0)}, data=b"\0" * 8), f"{none} .*has -8 bytes"),
        "offsets below 0": (safetensors(rows={"a": row([2], -8, 0)}, data=b""), f"{none} .*is incomplete"),
        "one offset": (
            safetensors(rows={"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, data=b""),
            f"{none} .*is incomplete",
        ),
        "offsets of text": (safetensors(rows={"a": row([2], "0", "8")}, data=b"\0" * 8), f"{none} .*is incomplete"),
        "offsets of floats": (safetensors(rows={"a": row([2], 0.0, 8.0)}, data=b"\0" * 8), f"{none} .*is incomplete"),
        "shape and bytes": (
            safetensors(rows={"a": row([3], 0, 8)}, data=b"\0" * 8),
            f"{none} .*shape and dtype need 12",
        ),
        "enormous shape": (safetensors(rows={"a": row([2**40, 2**20], 0, 8)}, data=b"\0" * 8), f"{none} .*need"),
        "shape that wraps": (safetensors(rows={"a": row([2**62, 4, 2], 0, 8)}, data=b"\0" * 8), f"{none} .*need"),
        "shape below 0": (safetensors(rows={"a": row([-2, -1], 0, 8)}, data=b"\0" * 8), f"{none} .*is incomplete"),
        "shape of 10^400": (safetensors(rows={"a": row([10**400], 0, 8)}, data=b"\0" * 8), f"{none} .*is incomplete"),
        "many dimensions": (
            safetensors(rows={"a": row([1] * 100_000, 0, 4)}, data=b"\0" * 4),
            f"{none} .*is incomplete",
        ),
        "no shape": (safetensors(rows={"a": {"dtype": "F32"}}), f"{none} .*is incomplete"),
        "a text for a row": (safetensors(rows={"a": "F32"}), f"{none} .*is incomplete"),
        "unknown dtype": (
            safetensors(rows={"a": row([2], 0, 8, "F33")}, data=b"\0" * 8),
            f"{none} .*unknown dtype F33",
        ),
        "dtype of HTML": (safetensors(rows={"a": row([2], 0, 8, HTML)}, data=b"\0" * 8), f"{none} .*unknown dtype"),
        "twice a name": (
            safetensors(header=b'{"a":%b,"a":%b}' % ((json.dumps(row([1], 0, 4)).encode(),) * 2), data=b"\0" * 4),
            f"{none} .*occurs twice",
        ),
        "metadata of numbers": (safetensors(good, {"a": 1}), f"{none} .*metadata does not map names to texts"),
        "metadata of lists": (safetensors(good, {"a": ["b"]}), f"{none} .*metadata does not map names to texts"),
        "metadata a list": (safetensors(good, [1]), f"{none} .*metadata does not map names to texts"),
    }


def adapters(rng, defaults, trained):
    """Yield malformed adapter files, inspected and applied."""
    nan = lora()
    nan[f"{LAYER}.lora_up.weight"] = np.full((32, 4), np.nan)
    inf = lora()
    inf[f"{LAYER}.lora_down.weight"][0, 0] = np.inf
    no_up = {f"{LAYER}.lora_down.weight": np.ones((4, 32))}
    config = lambda value: {"lora_adapter_metadata": value}  # noqa: E731
    unet = {"unet.a.to_q.lora_A.weight": np.ones((4, 8)), "unet.a.to_q.lora_B.weight": np.ones((8, 4))}
    bare = {"base_model.model.a.lora_A.weight": np.ones((4, 8)), "base_model.model.a.lora_B.weight": np.ones((8, 4))}
    broken = {
        "no tensors": (safetensors(), "holds no tensors"),
        "an endless name": (safetensors(lora(name="lora_unet_" + "a" * 60_000)), "key of 60027 characters"),
        "NaN": (safetensors(nan), "has values that are not finite"),
        "infinite": (safetensors(inf), "has values that are not finite"),
        "ranks apart": (safetensors(lora((32, 5), (4, 32))), "do not fit each other"),
        "up alone": (safetensors({f"{LAYER}.lora_up.weight": np.ones((32, 4))}), "factors is missing"),
        "down alone": (safetensors(no_up), "factors is missing"),
        "zero size": (safetensors(lora((32, 0), (0, 32))), "is empty"),
        "flat": (safetensors(lora((32,), (32,))), "do not fit each other"),
        "a number for a factor": (safetensors(lora((), (4, 32))), "do not fit each other"),
        "alpha of many": (
            safetensors({**lora(), f"{LAYER}.alpha": np.ones(9)}),
            "alpha has the shape .* is not a number",
        ),
        "hada apart": (
            safetensors({f"{LAYER}.hada_w1_a": np.ones((8, 4)), f"{LAYER}.hada_w1_b": np.ones((5, 8))}),
            "do not fit each other",
        ),
        "lokr alone": (safetensors({f"{LAYER}.lokr_w1_a": np.ones((8, 4))}), "is missing"),
        "peft's without its configuration": (
            safetensors(bare),
            "its adapter_config.json, which holds the alpha, is missing",
        ),
        "configuration no JSON": (safetensors(unet, config("{")), "metadata of .* is damaged"),
        "configuration nested": (safetensors(unet, config("[" * 100_000)), "metadata of .* is damaged"),
        "configuration a list": (safetensors(unet, config("[1]")), "metadata of .* is damaged"),
        "r a text": (safetensors(unet, config('{"unet.r": "four", "unet.lora_alpha": 4}')), "is invalid .r is 'four'"),
        "r of nothing": (safetensors(unet, config('{"unet.r": 0, "unet.lora_alpha": 4}')), "no r or no alpha"),
        "alpha NaN": (safetensors(unet, config('{"unet.r": 4, "unet.lora_alpha": NaN}')), "lora_alpha is nan"),
        "no alpha": (safetensors(unet, config('{"unet.r": 4}')), "no r or no alpha"),
        "a pattern with look-around": (
            safetensors(unet, config('{"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"(?!a)b": 4}}')),
            "rank_pattern .*contains look-around",
        ),
        "rank 0 by a pattern": (
            safetensors(unet, config('{"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"a": 0}}')),
            "rank_pattern of a is 0",
        ),
        "an unknown kind of peft's": (
            safetensors(unet, config('{"unet.r": 4, "unet.peft_type": "EVIL"}')),
            "peft's type",
        ),
    }
    for what, (data, says) in {**lying(), **broken}.items():
        for end in ("GraftInspectAdapter", "GraftApplyAdapter")[: 2 if what in broken else 1]:
            yield _of_file(
                "adapter", "loras", f"{what} {end}", data, says, defaults, "GraftLoadAdapter", "adapter_name", end
            )
    for what, tensors in {
        "another width": lora((48, 4), (4, 48)),
        "another layer's": lora(name="lora_unet_nowhere_at_all"),
        "another model's": lora(name="diffusion_model.double_blocks.0.img_attn.proj"),
    }.items():
        says = "Graft Apply Adapter .*input 'adapter': The adapter (?:was made for another|fits no layer)"
        yield _of_file(
            "adapter",
            "loras",
            what,
            safetensors(tensors),
            says,
            defaults,
            "GraftLoadAdapter",
            "adapter_name",
            "GraftApplyAdapter",
        )
    made = {"graft_made": "[" * 50_000, "graft_recipe": "{" * 50_000, "modelspec.title": HTML * 50, "": "x"}
    legal = {
        "HTML for metadata": (safetensors(lora(), {"modelspec.title": HTML, HTML: HTML}), "Title: <img"),
        "metadata nested": (safetensors(lora(), made), "Title: <img"),
        "a recipe of another kind": (safetensors(lora(), {"graft_recipe": "[1, 2]", "graft_made": "5"}), "(?i)LoRA"),
        "HTML for a layer": (safetensors(lora(name=f"lora_unet_{HTML}")), "(?i)LoRA"),
        "no alpha": (safetensors(lora(alpha=None)), "(?i)LoRA"),
        "a name of some length": (safetensors(lora(name="lora_unet_" + "a" * 900)), "(?i)LoRA"),
        "thousands of layers": (
            safetensors(
                {key: value for number in range(2000) for key, value in lora((2, 1), (1, 2), f"l{number}").items()}
            ),
            "(?i)LoRA",
        ),
        "metadata of a megabyte": (safetensors(lora(), {"modelspec.description": "a" * 10**6}), "Description: aaa"),
    }
    for what, (data, says) in legal.items():
        yield _of_file(
            "adapter",
            "loras",
            what,
            data,
            says,
            defaults,
            "GraftLoadAdapter",
            "adapter_name",
            "GraftInspectAdapter",
            True,
        )


def _of_file(kind, folder, what, data, says, defaults, loader, input, end, taken=False):
    """Return a trial of a model file that its loader reads and another node uses."""
    name = f"hostile-{zlib.crc32(f'{kind} {what}'.encode())}.safetensors"

    def act(server):
        prompt = graph_of(defaults, end)
        loaders = [one for one, node in prompt.items() if node["class_type"] == loader]
        prompt[loaders[0]]["inputs"][input] = name
        return run(server, prompt)

    return Trial(kind, what, act, says, taken, lambda server: _write(server.path("models", folder, name), data))


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def embeddings(rng, defaults, trained):
    """Yield malformed embedding files."""
    width = 768
    nan = np.full((2, width), np.nan)
    broken = {
        "another width": (safetensors({"emb_params": np.ones((2, 700))}), "holds no embedding"),
        "three dimensions": (safetensors({"emb_params": np.ones((1, 2, width))}), "holds no embedding"),
        "nothing in it": (safetensors({"emb_params": np.ones((0, width))}), "holds no embedding"),
        "no tensors": (safetensors(), "holds no embedding"),
        "several": (safetensors({"a": np.ones((1, width)), "b": np.ones((1, width))}), "holds no embedding"),
        "a LoRA": (safetensors(lora()), "holds no embedding"),
        "NaN": (safetensors({"emb_params": nan}), "not finite"),
        "clip_g of another width": (
            safetensors({"clip_l": np.ones((1, width)), "clip_g": np.ones((1, 5))}),
            "no embedding",
        ),
        "whole numbers": (
            safetensors(rows={"emb_params": row([1, width], 0, 8 * width, "I64")}, data=b"\0" * 8 * width),
            "no valid embedding",
        ),
        "endless": (safetensors({"emb_params": np.zeros((1001, width))}), "1001 vectors, more than"),
    }
    chosen = {what: value for what, value in lying().items() if rng.random() < 0.35}
    for what, (data, says) in {**chosen, **broken}.items():
        end, input = "GraftSaveEmbedding", "embedding_name"
        yield _of_file("embedding", "embeddings", what, data, says, defaults, "GraftLoadEmbedding", input, end)
    for what, data in {
        "one vector without its dimension": safetensors({"x": np.ones(width)}),
        "HTML for metadata": safetensors({HTML: np.ones((1, width))}, {HTML: HTML}),
    }.items():
        name = f"word-{what.split()[0].lower()}"

        def act(server, name=name):
            prompt = graph_of(defaults, "GraftSaveEmbedding", name=f"{name}-again")
            prompt["8"]["inputs"]["embedding_name"] = f"{name}.safetensors"
            return run(server, prompt)

        prepare = lambda server, name=name, data=data: _write(  # noqa: E731
            server.path("models", "embeddings", f"{name}.safetensors"), data
        )
        yield Trial("embedding", what, act, f"{name}-again.safetensors", True, prepare)


# Pictures and captions


def _looked_at(name, says, prepare, taken=True, kind="picture", **values):
    """Return a trial that inspects a folder below input/; the answer names the files left out."""

    def act(server):
        prompt = {"2": graphs.node("GraftLoadDataset", folder=name, trigger="", resolution=64, repeats=1, **values)}
        prompt["4"] = graphs.node("GraftInspectDataset", dataset=["2", 0])
        return run(server, prompt)

    return Trial(kind, name, act, says, taken, prepare)


def pictures(rng, defaults, trained):
    """Yield each odd file in its own folder beside a valid one, which is shown in any case."""
    for number in range(120):
        yield _odd_picture(number)
    for what, (data, says) in {
        "bomb": (odd_files.bomb(), "more than 178956970 pixels"),
        "gzip": (b"\x1f\x8b" * 4000, "picture format is unknown"),
        "svg": (b"<svg onload='alert(1)'/>", "picture format is unknown"),
        "polyglot": (b"GIF89a/*" + b"<script>alert(1)</script>" * 40, "cannot be read|too small"),
        "zeros": (bytes(4000), "picture format is unknown"),
        "wide head": (odd_files._png(2**31 - 1, 2**31 - 1, 8, 2, b""), "pixels|cannot be read"),
        "no data": (odd_files._png(64, 64, 8, 2, b""), "cannot be read"),
    }.items():
        yield _looked_at(f"picture {what}", says, _one_beside(f"picture {what}", "odd.png", data))


def _odd_picture(number):
    """Return the trial of a file from `odd_files`, by its number; the file is made when needed."""
    folder = f"odd {number}"
    state = {}

    def prepare(server):
        all_of_them = server.path("input", ".odd")
        outside = server.path("..", "canary", "secrets").resolve()
        if not all_of_them.exists():
            all_of_them.mkdir()
            outside.mkdir(exist_ok=True)
            _MADE[str(all_of_them)] = sorted(odd_files.make(str(all_of_them), str(outside)).items())
        made = _MADE[str(all_of_them)]
        name, odd = made[number % len(made)]
        state.update(name=name, odd=odd)
        target = server.path("input", folder)
        target.mkdir()
        Image.fromarray(odd_files.quarters(7)).save(target / "sound.png")
        source = all_of_them / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            (target / name).symlink_to(_as_there(source.readlink(), all_of_them, target))
        else:
            (target / name).write_bytes(source.read_bytes())

    def act(server):
        prompt = {"2": graphs.node("GraftLoadDataset", folder=folder, trigger="", resolution=64, repeats=1)}
        prompt["4"] = graphs.node("GraftInspectDataset", dataset=["2", 0])
        taken, said = run(server, prompt)
        odd = state["odd"]
        if taken and odd.picture is None and not (state["name"].split("/")[-1] in said and odd.reason in said):
            return False, f"{state['name']} is not named with '{odd.reason}': {said}"
        count = 3 if state["name"].startswith("way in") else 2
        if taken and odd.picture is not None and f"{count} pictures" not in said:
            return False, f"{state['name']} is no picture: {said}"
        return taken, said

    return Trial("picture", f"odd {number}", act, "[123] pictures?", True, prepare)


_MADE = {}


def _as_there(aim, folder, other):
    """Return a link's target, mapped from `folder` to the same place in `other`, where its file is copied to."""
    if not aim.is_relative_to(folder):
        return aim
    inner = other / aim.relative_to(folder)
    if aim.exists():
        inner.write_bytes(aim.read_bytes())
    return inner


def _one_beside(folder, name, data):
    def prepare(server):
        target = server.path("input", folder)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(odd_files.quarters(7)).save(target / "sound.png")
        (target / name).write_bytes(data)

    return prepare


def captions(rng, defaults, trained):
    """Yield malformed texts beside pictures."""
    for what, (name, data, says) in {
        "latin-1": ("sound.txt", b"gr\xfcn", "not UTF-8"),
        "UTF-16 cut": ("sound.txt", b"\xff\xfea", "not UTF-8"),
        "binary": ("sound.txt", bytes(range(256)), "not UTF-8"),
        "NUL": ("sound.txt", b"a\0b", "contains NUL"),
        "nested JSON": ("sound.json", b"[" * 100_000, "not JSON"),
        "JSON with half a character": ("sound.json", b'{"caption": "\\ud800"}', "half of a character"),
        "endless caption": ("sound.txt", b"word " * 100_000, "499999 characters"),
        "endless JSON number": ("sound.json", b"1" * 10_000, "not JSON"),
    }.items():
        # The only picture cannot be trained on, so the folder is refused and the reason stated.
        folder = f"caption {what}"
        yield _looked_at(
            folder,
            f"input 'folder': .*no picture to train on: .*{says}",
            _one_beside(folder, name, data),
            False,
            "caption",
        )
    for what, (name, data, says) in {
        "metadata that leads out": (
            "metadata.jsonl",
            b'{"file_name": "../../../etc/passwd", "text": "x"}\n{"file_name": "/etc/passwd", "text": "x"}',
            "names 2 missing pictures",
        ),
        "metadata of numbers": ("metadata.jsonl", b"5\n", "not a JSON object"),
        "metadata without names": ("metadata.jsonl", b'{"text": "x"}\n', "has no file_name"),
        "metadata nested": ("metadata.jsonl", b'{"a":' * 50_000, "not JSON"),
        "metadata with half a character": (
            "metadata.jsonl",
            b'{"file_name": "sound.png", "text": "\\udfff"}',
            "half of a character",
        ),
        "a table of NUL": (
            "metadata.csv",
            b"file_name,text\n\0,\0\n",
            "not CSV|missing pictures|has no file_name|contains NUL",
        ),
        "a field without end": ("metadata.csv", b'file_name,text\nsound.png,"' + b"a" * 300_000, "not CSV|characters"),
    }.items():
        folder = f"caption {what}"
        yield _looked_at(folder, says, _one_beside(folder, name, data), kind="caption")
    for what, text in {
        "HTML": HTML,
        "escape": "\x1b[31mred",
        "right to left": "\u202eabc\u202c",
        "emoji": "\U0001f431" * 20,
        "parentheses": "((((a:9999)))) [b] {c|d} <lora:x:1>",
        "embedding that is not there": "embedding:../../../etc/passwd, embedding:nosuch",
        "a long one": "word " * 300,
        "combining": "a" + "\u0301" * 100,
    }.items():
        folder = f"legal caption {what}"

        def act(server, folder=folder):
            return run(server, graphs.training(folder, 1, trigger="sks"))

        prepare = _one_beside(folder, "sound.txt", text.encode())
        yield Trial("legal caption", what, act, "1 steps trained", True, prepare)
    for what, folder in {
        "HTML": HTML,
        "device": "CON",
        "spaces": "a b  c",
        "hidden end": "x. .",
        "long": "l" * 200,
    }.items():

        def act(server, folder=folder):
            taken, said = run(server, graphs.training(folder, 1, trigger="sks"))
            listed = server.get("/graft/runs")["runs"]
            return taken and all(set(one["name"]).isdisjoint("<>:/\\") for one in listed), said

        yield Trial("legal folder", what, act, "1 steps trained", True, _one_beside(folder, "sound.txt", b"a"))


# State of runs


_TIMES = itertools.count()


def training_of(server, steps, name="kept"):
    """Return a graph of a run with some steps and a saved state for each."""
    # A new number each time, without effect on the result: the host answers a known prompt from its cache.
    return runs.graph_of(server, "toy", name, steps, save_every=1, keep_last=100 + next(_TIMES))


def plain_of(path):
    """Return (header, plain values, data) of a state's file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    # An earlier version wrote the file like this. With checksums, the reader would look at nothing else.
    header["__metadata__"].pop("graft_checksums", None)
    return header, json.loads(header["__metadata__"]["state"]), data[8 + size :]


def _with(change):
    """Return a function that writes a state's file with changed plain values."""

    def spoil(path):
        header, plain, data = plain_of(path)
        changed = change(plain)
        header["__metadata__"]["state"] = changed if isinstance(changed, str) else json.dumps(plain)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return spoil


def _nan_weights(path):
    header, _, data = plain_of(path)
    start, stop = next(held["data_offsets"] for key, held in header.items() if key.startswith("trainables/"))
    text = json.dumps(header).encode()
    spoilt = data[:start] + np.full((stop - start) // 4, np.nan, np.float32).tobytes() + data[stop:]
    path.write_bytes(struct.pack("<Q", len(text)) + text + spoilt)


def _other_names(path):
    header, _, data = plain_of(path)
    named = {key.replace("trainables/", "strangers/"): held for key, held in header.items()}
    text = json.dumps(named).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


SPOILT_STATES = {
    "version 2": (_with(lambda plain: plain.update(version=2)), "version 2"),
    "no version": (_with(lambda plain: plain.pop("version") and None), "damaged"),
    "version of HTML": (_with(lambda plain: plain.update(version=HTML)), "has the unknown version"),
    "another step": (_with(lambda plain: plain.update(step=7)), "its step is 7"),
    "step below 0": (_with(lambda plain: plain.update(step=-1)), "its step is -1"),
    "step a text": (_with(lambda plain: plain.update(step="2")), "its step is '2'"),
    "step 2.5": (_with(lambda plain: plain.update(step=2.5)), "its step is 2.5"),
    "no batches": (_with(lambda plain: plain.pop("batches") and None), "damaged"),
    "batches endless": (_with(lambda plain: plain.update(batches=math.inf)), "batches"),
    "a field too many": (_with(lambda plain: plain.update(evil=1)), "unknown field evil"),
    "losses a text": (_with(lambda plain: plain.update(losses="many")), "damaged"),
    "losses nested": (_with(lambda plain: plain.update(losses=[[1]])), "damaged"),
    "optimiser a list": (_with(lambda plain: plain.update(optimizer=[1])), "damaged"),
    "optimiser of texts": (_with(lambda plain: plain.update(optimizer={"0": {"a": "b"}})), "damaged"),
    "groups that set parameters": (_with(lambda plain: plain.update(groups=[{"params": 1}])), "damaged"),
    "scaler a text": (_with(lambda plain: plain.update(scaler="x")), "damaged"),
    "a list": (_with(lambda plain: "[]"), "damaged"),
    "nothing": (_with(lambda plain: ""), "damaged"),
    "nested": (_with(lambda plain: "[" * 100_000), "damaged"),
    "NaN weights": (_nan_weights, "is not finite"),
    "other names": (_other_names, "does not belong to a state"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
    "lying head": (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), "cannot be read"),
    "another file": (lambda path: path.write_bytes(safetensors(lora())), "damaged"),
}


def states(rng, defaults, trained):
    """Yield trials that damage a run's files and queue one more step: the run resumes from an intact state."""
    for what, (spoil, logged) in SPOILT_STATES.items():
        yield _resuming(
            f"last state {what}", spoil, trained, f"(?s)3 steps trained.*{logged}", ["state-00000002.safetensors"]
        )
    yield _resuming(
        "all states version 9",
        _with(lambda plain: plain.update(version=9)),
        trained,
        "(?s)3 steps trained.*version 9",
        ["state-00000001.safetensors", "state-00000002.safetensors"],
    )
    garbage = {
        "binary": b"\xff\xfe\0\n" * 9,
        "nested": b"[" * 100_000 + b"\n",
        "odd": b'{"step": [1]}\n{"step": 1e999}\n[]\n',
    }
    for what, data in garbage.items():
        spoil = lambda path, data=data: path.write_bytes(path.read_bytes() + data)  # noqa: E731
        yield _resuming(f"log {what}", spoil, trained, "3 steps trained", ["metrics.jsonl"])
    for what, data in {
        "no JSON": b"{",
        "nested": b"[" * 100_000,
        "odd": b'{"how": "<b>", "step": 1, "steps": 3}',
        "numbers": b"5",
    }.items():
        spoil = lambda path, data=data: path.write_bytes(data)  # noqa: E731
        yield _resuming(f"halt {what}", spoil, trained, "3 steps trained", ["halted.json"])
    for what, (data, says) in {
        "no JSON": (b"{", "recipe.json' cannot be read as JSON"),
        "nested": (b"[" * 100_000, "recipe.json' cannot be read as JSON"),
        "a list": (b"[]", "recipe.json' is not a recipe"),
        "of another": (b'{"identity": "0123"}', "belongs to another run"),
        "identity a number": (b'{"identity": 5}', "recipe.json' is not a recipe"),
    }.items():
        spoil = lambda path, data=data: path.write_bytes(data)  # noqa: E731
        yield _resuming(f"recipe {what}", spoil, trained, says, ["recipe.json"], False)
    yield from _caches(trained)


def _resuming(what, spoil, trained, says, files, taken=True):
    """Return a trial that damages files of the kept run, queues one more step, and restores everything."""

    def act(server):
        folder = runs.find_run(server, trained)
        kept = {path: path.read_bytes() for path in folder.glob("*") if path.is_file()}
        before = len(server.read_log())
        try:
            for name in files:
                spoil(folder / name)
            done, said = run(server, training_of(server, 3, trained))
        finally:
            for path in folder.glob("*"):
                if path.is_file():
                    path.unlink()
            for path, data in kept.items():
                path.write_bytes(data)
        return done, said + "\n" + server.read_log()[before:]

    return Trial("state", what, act, says, taken)


OURS = {"format": "graft cache 1"}


def _caches(trained):
    """Write malformed entries into the caches of the whole server."""
    foreign = safetensors({"k/mean": np.ones(4)}, {"format": "graft cache 99", "sums": "{}"})
    for what, (data, logged) in {
        "another format": (foreign, "ignored the cache shard .*: its format is 'graft cache 99'"),
        "no sums": (safetensors({"k/mean": np.ones(4)}, OURS), "is damaged"),
        "sums nested": (safetensors({"k/mean": np.ones(4)}, OURS | {"sums": "[" * 100_000}), "is damaged"),
        "sums of texts": (safetensors({"k/mean": np.ones(4)}, OURS | {"sums": '{"k/mean": "x"}'}), "is damaged"),
        "sums endless": (safetensors({"k/mean": np.ones(4)}, OURS | {"sums": '{"k/mean": 1e999}'}), "is damaged"),
        "sums of nothing": (safetensors({"k/mean": np.ones(4)}, OURS | {"sums": '{"other": 1}'}), "is damaged"),
        "no shard": (b"<html>", "is damaged"),
    }.items():

        def prepare(server, data=data, what=what):
            for kind in ("latents", "texts"):
                _write(server.path("output", "graft", "cache", kind, f"hostile {what}.safetensors"), data)

        def act(server, what=what):
            before = len(server.read_log())
            done, said = run(server, runs.graph_of(server, "toy", f"cache{zlib.crc32(what.encode())}", 1))
            for path in server.path("output", "graft", "cache").rglob("hostile*"):
                path.unlink()
            return done, said + "\n" + server.read_log()[before:]

        yield Trial("cache", what, act, f"(?s)1 steps trained.*{logged}", True, prepare)
    for what, data in {
        "no JSON": b"{",
        "nested": b"[" * 100_000,
        "another version": b'{"version": 99, "files": {}}',
        "rows of nothing": b'{"version": 1, "files": {"%b": [], "a": 5}}',
        "sizes of HTML": b"ours",
    }.items():

        def act(server, data=data):
            for path in server.path("output", "graft", "cache", "index").glob("*.json"):
                path.unlink()
            run(server, graph_for_index())
            for path in server.path("output", "graft", "cache", "index").glob("*.json"):
                held = json.loads(path.read_bytes())
                if data == b"ours":
                    held["files"] = {name: [one[0], {"size": HTML}] for name, one in held.get("files", {}).items()}
                    path.write_text(json.dumps(held))
                else:
                    path.write_bytes(data)
            return run(server, graph_for_index())

        yield Trial("cache", f"index {what}", act, "pictures", True)


def graph_for_index():
    """Return a graph that inspects the shared folder again despite the host's cache."""
    values = {"folder": "toy", "trigger": "", "resolution": 64, "repeats": 1 + next(_TIMES)}
    return {"2": graphs.node("GraftLoadDataset", **values), "4": graphs.node("GraftInspectDataset", dataset=["2", 0])}


# Routes

RUN_IDS = (
    "..",
    "%2e%2e",
    "..%2f..%2fsecret-12345678",
    "..%5c..%5csecret-12345678",
    "%00",
    "toy-12345678%00",
    "toy-12345678%0a",
    "toy-12345678.",
    "toy-12345678%20",
    "con-12345678.txt",
    "con.x-12345678",
    "NUL.-12345678",
    "C:-12345678",
    "C%3A%5CWindows-12345678",
    "toy-12345678::$DATA",
    "%3Cscript%3Ealert(1)%3C%2Fscript%3E",
    "%3Cimg%20src=x%20onerror=alert(1)%3E-12345678",
    "%ff%fe-12345678",
    "%ed%a0%80-12345678",
    "\u202etoy-12345678",
    "toy-1234567",
    "toy-123456789",
    "toy-GGGGGGGG",
    "-12345678",
    ".hidden-12345678",
    "a" * 300 + "-12345678",
    "a" * 6000,
    "cache",
    "class_images",
    "kept",
    "*",
    "kept-*",
    "${jndi}-12345678",
    "%25%32%65-12345678",
)
NODE_IDS = ("99", "..", "%3Cb%3E", "3%00", "a" * 200, ":".join("1" * 40), "3:3:3", "%ff", "-1", "%2e%2e%2f3")
STRANGERS = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://["},
    {"Origin": "file://"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": HTML},
)
BODIES = {
    "a list": b"[]",
    "a number": b"1",
    "half": b"{",
    "binary": b"\xff\xfe",
    "nested": b"[" * 4000,
    "NaN": b"NaN",
    "nothing but spaces": b" " * 100,
}


def ask(server, path, data=None, headers=JSON, method=None):
    """Return (status, headers, body) of an answer."""
    address = server.url + urllib.request.quote(path, safe="/%?=&:.$*(){}")
    request = urllib.request.Request(address, data, dict(headers), method=method)
    try:
        with OPENER.open(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode("utf-8", "replace")


def _asking(path, data=None, headers=JSON, method=None, own=True):
    def act(server):
        status, head, body = ask(server, path, data, headers, method)
        # The host itself answers unknown routes and requests that it refuses earlier.
        kind = head.get("Content-Type") or ""
        ours = kind.startswith("application/json") and head["X-Content-Type-Options"] == "nosniff"
        if (own and not ours) or "html" in kind:
            return True, f"{status} {kind} {body[:200]}"
        if ours:
            json.loads(body)
        return status == 200, f"{status} {body}"

    return act


def routes(rng, defaults, trained):
    """Yield requests to the routes."""
    for run_id in RUN_IDS:
        own = not run_id.startswith((".", "%2e")) and "%2f" not in run_id.lower()
        own = own and "{" not in run_id
        says = '40[045] .*"error": "There is no such run' if own else "40[0-9]"
        yield Trial("route", f"show {run_id[:40]!a}", _asking(f"/graft/runs/{run_id}", own=own), says)
        for wish in rng.sample(("stop", "save", "pause", "resume"), 2):
            act = _asking(f"/graft/runs/{run_id}/{wish}", b"{}", own=own)
            yield Trial("route", f"{wish} {run_id[:40]!a}", act, says)
        yield Trial("route", f"delete {run_id[:40]!a}", _asking(f"/graft/runs/{run_id}/delete", b"{}", own=own), says)
        yield Trial("route", f"workflow of {run_id[:40]!a}", _asking(f"/graft/runs/{run_id}/workflow", own=own), says)
    for node in NODE_IDS:
        own = "%2f" not in node
        says = '40[49] .*"error": "(?:This is not a valid node|The training is not running)' if own else "40[0-9]"
        yield Trial("route", f"node {node[:20]!a}", _asking(f"/graft/nodes/{node}/stop", b"{}", own=own), says)
    for headers in STRANGERS:
        # The host refuses some of them before our route runs, or fails on them.
        act = _asking("/graft/nodes/3/stop", b"{}", {**JSON, **headers}, own=False)
        yield Trial("route", f"from {headers}", act, '403 .*"error": "Only pages of this server|403 $|500 ')
    for what, body in BODIES.items():
        act = _asking("/graft/nodes/3/stop", body)
        yield Trial("route", f"body {what}", act, '400 .*"error": "The body is not a JSON object')
    act = _asking("/graft/nodes/3/stop", b"{" + b" " * 10**6 + b"}")
    yield Trial("route", "body of a megabyte", act, '413 .*"error": "The body is longer than')
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/html", ""):
        act = _asking("/graft/nodes/3/stop", b"{}", {"Content-Type": kind})
        yield Trial("route", f"as {kind}", act, '415 .*"error": "Send a JSON object')
    for number in ("-1", "NaN", "1e9", "9" * 20, "%3Cb%3E", "1;2", "%d9%a5", "0x10", ""):
        act = _asking(f"/graft/runs/RUN?events={number}")
        yield Trial("route", f"events {number}", act, '40[04] .*"error": "The query has a value that is not a number')
    for method in ("PUT", "DELETE", "PATCH"):
        act = _asking("/graft/runs", None, {}, method, own=False)
        yield Trial("route", method, act, "40[345]")
