"""Tests of files from untrusted sources: each parser returns valid data or names the fault, and does nothing else."""

import json
import ntpath
import os
import posixpath
import re
import struct

import numpy as np
import pytest
import torch
from graft_pack.trainers.data import captions
from graft_pack.trainers.data.examples import read_resolutions
from graft_pack.trainers.data.index import Index
from graft_pack.trainers.data.scan import scan_folder
from graft_pack.trainers.errors import DatasetError, GraftError, ModelError, RunError, SettingsError
from graft_pack.trainers.formats import files, keys
from graft_pack.trainers.formats.adapter import Adapter, load_adapter
from graft_pack.trainers.formats.embedding import load_embedding
from graft_pack.trainers.methods.textual_inversion import check_name
from graft_pack.trainers.preprocessing.cache import Cache
from graft_pack.trainers.recipe.parsing import parse_pairs
from graft_pack.trainers.runs import records
from graft_pack.trainers.runs.checkpoint import State
from graft_pack.trainers.runs.folders import Products
from graft_pack.trainers.runs.run import Run
from graft_pack.trainers.text import check_file_name, check_text, is_text, is_windows_reserved
from graft_pack.trainers.tools.difference import difference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load as load_by_library
from safetensors.torch import save

from tests.support import malformed, odd_files

FEW = settings(max_examples=40)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c.d": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


def read(folder, data):
    """Return the tensors of a file with these bytes, None if the reader refuses it with a named error."""
    path = folder / "x.safetensors"
    path.write_bytes(data)
    try:
        return files.read_tensors(str(path))[0]
    except RunError as error:
        assert str(path) in error.message and error.cure and len(str(error)) < 1000
        return None


def by_library(data):
    try:
        return load_by_library(data)
    except (SafetensorError, ValueError, KeyError):
        return None


def assert_alike(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
        assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (ours[name], theirs[name])))


@given(st.data())
def test_spoilt_bytes_are_refused_or_read_as_the_library_reads_them(folder, data):
    whole = bytearray(save(TENSORS, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    whole = bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])
    ours = read(folder, whole)
    if ours is not None:
        assert_alike(ours, by_library(whole))


ROWS = st.dictionaries(
    st.text(max_size=5) | st.just("__metadata__"),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "I64", "U8", "BOOL", "F4", "F33", ""]) | PLAIN,
            "shape": st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**62, 2**64, 10**30]), max_size=4) | VALUES,
            "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3) | VALUES,
        }
    )
    | VALUES,
    max_size=3,
)


@given(ROWS, st.integers(0, 64))
@example({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}, 0)
@example({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8)
@example({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, 8)
def test_headers_of_any_content_are_refused_or_read_as_the_library_reads_them(folder, rows, size):
    data = malformed.safetensors(rows=rows, data=bytes(size))
    ours = read(folder, data)
    if ours is not None:
        assert_alike(ours, by_library(data))


@given(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4))
def test_what_is_sound_is_read(folder, shapes):
    made = {f"t{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    assert_alike(read(folder, save(made)), made)


@pytest.mark.parametrize("what", malformed.lying())
def test_lying_files_are_refused_with_their_reason(folder, what):
    data, says = malformed.lying()[what]
    path = folder / "lying.safetensors"
    path.write_bytes(data)
    for reader in (files.read_header, files.read_metadata, files.read_tensors):
        with pytest.raises(RunError) as caught:
            reader(str(path))
        assert re.search(says, str(caught.value), re.DOTALL), str(caught.value)


def test_nothing_is_reserved_for_what_a_header_says(folder, monkeypatch):
    """Its shape means a terabyte: the reader must not even call the library."""
    monkeypatch.setattr("safetensors.safe_open", None)
    data = malformed.safetensors(rows={"a": malformed.row([2**40], 0, 2**42)}, data=b"1234")
    assert read(folder, data) is None


@given(VALUES | st.fixed_dictionaries({"version": st.just(1), "step": st.just(3)}, optional=dict.fromkeys(
    ("batches", "losses", "validation", "optimiser", "groups", "scaler", "frozen"), VALUES)))  # fmt: skip
def test_a_state_of_any_content_is_taken_or_passed_over(tmp_path_factory, plain):
    folder = tmp_path_factory.getbasetemp() / "state"
    folder.mkdir(exist_ok=True)
    run = Run(str(folder), str(folder), str(folder))
    tensors = {"trainables/a": torch.ones(2), "optimiser/0/exp_avg": torch.ones(2)}
    (folder / "state-00000003.safetensors").write_bytes(save(tensors, {"state": json.dumps(plain)}))
    state = run.load(9)
    assert state is None or (state.step == 3 and type(state.batches) is int)
    (folder / "recipe.json").write_text(json.dumps(plain))
    (folder / "halted.json").write_text(json.dumps(plain))
    (folder / "metrics.jsonl").write_text(f"{json.dumps(plain)}\n" * 2)
    run.halt()
    run.forget_after(2)
    records.read_events(run, 9)
    for read_it in (lambda: run.check_identity("0" * 64), lambda: records.record_of(run)):
        try:
            read_it()
        except RunError as error:
            assert str(folder) in error.message


@pytest.mark.parametrize("what", malformed.SPOILT_STATES)
def test_of_a_spoilt_state_the_one_before_is_taken(tmp_path, what, caplog):
    spoil, logged = malformed.SPOILT_STATES[what]
    run = Run(*(str(tmp_path / name) for name in ("run", "loras", "words")))
    for step in (1, 2):
        state = State(step, step, trainables={"a": torch.ones(3)}, optimizer={0: {"step": 1, "exp_avg": torch.ones(3)}})
        run.save(state, Products(Adapter({"x": torch.zeros(1)})), 9)
    assert run.load(2).step == 2
    spoil(tmp_path / "run" / "state-00000002.safetensors")
    assert run.load(2).step == 1
    assert re.search(logged, caplog.text)


@FEW
@given(
    st.binary(max_size=300) | st.sampled_from([b"[" * 50_000, b'{"a":' * 50_000, b"1" * 6000, b"\xff\xfe[", b"1e999"])
)
def test_files_of_any_bytes_beside_a_run(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    run = Run(str(folder), str(folder), str(folder))
    for name in ("recipe.json", "halted.json", "metrics.jsonl", "state-00000001.safetensors"):
        (folder / name).write_bytes(data)
    assert run.load(1) is None and run.halt() is None
    records.read_events(run, 9)
    run.forget_after(0)
    for read_it in (lambda: run.check_identity("x"), lambda: records.record_of(run)):
        with pytest.raises(RunError):
            read_it()


@FEW
@given(VALUES)
@example({"other/mean": 1})
def test_caches_and_indices_of_any_content_are_made_anew(tmp_path_factory, value):
    base = tmp_path_factory.getbasetemp() / "caches"
    base.mkdir(exist_ok=True)
    shard = base / "x.safetensors"
    shard.write_bytes(save({"k/mean": torch.ones(3)}, {"format": "graft cache 1", "sums": json.dumps(value)}))
    cache = Cache(str(base))
    assert cache.missing(["k"]) == {"k"} and cache.get("k") is None and not shard.exists()
    picture = base / "pictures" / "a.png"
    if not picture.exists():
        picture.parent.mkdir()
        odd_files.Image.fromarray(odd_files.quarters(1)).save(picture)
        os.utime(picture, (1, 1))
    indices = base / "index"
    Index(str(indices), str(picture.parent))
    look = lambda: scan_folder(str(picture.parent), "", 0, 1, index_folder=str(indices)).examples[0].size  # noqa: E731
    look()
    (path,) = indices.glob("*.json") if list(indices.glob("*.json")) else (next(_named(indices, picture)),)
    path.write_text(json.dumps({"version": 1, "files": {str(picture): value}}))
    assert look() == odd_files.SIZE


def _named(indices, picture):
    indices.mkdir(exist_ok=True)
    yield indices / os.path.basename(Index(str(indices), str(picture.parent))._path)


def test_a_shard_of_another_format_is_left_where_it_is(tmp_path):
    shard = tmp_path / "x.safetensors"
    shard.write_bytes(save({"k/mean": torch.ones(3)}, {"format": "graft cache 2", "sums": '{"k/mean": 1}'}))
    assert Cache(str(tmp_path)).missing(["k"]) == {"k"} and shard.exists()


@FEW
@given(VALUES)
@example(3.4e38)
def test_configurations_of_any_content(tmp_path_factory, value):
    """In the metadata of diffusers' files, and in peft's file beside them."""
    folder = tmp_path_factory.getbasetemp() / "configurations"
    folder.mkdir(exist_ok=True)
    factors = {"a.to_q.lora_A.weight": torch.ones(4, 8), "a.to_q.lora_B.weight": torch.ones(8, 4)}
    config = {"unet.r": value, "unet.lora_alpha": value, "unet.rank_pattern": value}
    for held in (value, config, {**config, "unet.r": 4}, {"unet.r": 4, "unet.lora_alpha": value}):
        path = folder / "x.safetensors"
        texts = {"lora_adapter_metadata": json.dumps(held), "graft_recipe": json.dumps(held)}
        path.write_bytes(save({f"unet.{name}": tensor for name, tensor in factors.items()}, texts))
        _load(path)
        path.write_bytes(save({f"base_model.model.{name}": tensor for name, tensor in factors.items()}))
        (folder / "adapter_config.json").write_text(json.dumps(held).replace("unet.", ""))
        _load(path)


def _load(path):
    try:
        adapter = load_adapter(str(path))
    except (ModelError, RunError) as error:
        assert error.cure and len(str(error)) < 1000
        return
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert adapter.made_by() is None or isinstance(adapter.made_by(), str)


SHAPES = st.lists(st.integers(0, 4), max_size=4)
ENDS = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a")
ENDS += ("hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "diff", "diff_b")


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(ENDS), SHAPES, min_size=1, max_size=5))
@example({"lora_up.weight": [3, 2], "lora_down.weight": [2, 4]})
@example({"lora_up.weight": [3, 2, 1, 1], "lora_down.weight": [2, 4, 3, 3], "alpha": []})
def test_factors_that_are_taken_can_be_multiplied(shapes):
    held = {f"layer.{end}": torch.ones(shape) for end, shape in shapes.items()}
    two = {"lora_up.weight", "lora_down.weight"}
    fits = two <= shapes.keys() and shapes.keys() <= two | {"alpha"} and _multiply(held)
    try:
        keys.check_parts(held, "The adapter", "adapter")
    except ModelError as error:
        assert "layer layer" in error.message
        assert not fits, error
        return
    if two <= shapes.keys() and "lora_mid.weight" not in shapes:
        assert _multiply(held)
        difference("layer", {end: held[f"layer.{end}"] for end in shapes}, "adapter").value()


def _multiply(held):
    up, down = held["layer.lora_up.weight"], held["layer.lora_down.weight"]
    if not up.numel() or not down.numel() or up.dim() < 2 or down.dim() < 2:
        return False
    if held.get("layer.alpha", torch.ones(())).numel() != 1:
        return False
    try:
        return bool((up.flatten(1) @ down.flatten(1)).numel())
    except RuntimeError:
        return False


@FEW
@given(st.dictionaries(st.sampled_from(["clip_l", "clip_g", "emb_params", "x"]), st.lists(st.sampled_from(
    [0, 1, 2, 768, 1280, 1024]), max_size=3), max_size=2), st.sampled_from([1.0, np.nan, np.inf]))  # fmt: skip
def test_embeddings_of_any_shape(folder, shapes, value):
    path = folder / "word.safetensors"
    made = {name: torch.full(shape, value) for name, shape in shapes.items() if np.prod(shape) < 10**7}
    path.write_bytes(save(made))
    try:
        word = load_embedding(str(path), "word")
    except (ModelError, RunError) as error:
        assert error.cure
        return
    assert all(one.dim() == 2 and one.isfinite().all() and one.shape[1] in (768, 1280, 1024) for one in word.values())


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
       | VALUES.map(lambda value: json.dumps(value).encode()))  # fmt: skip
@example(b'{"caption": "\\ud800"}')
@example(b'{"file_name": "a.png", "text": "\\udfff"}')
def test_caption_files_of_any_bytes(folder, data):
    for name in ("x.txt", "x.json", "metadata.jsonl", "metadata.csv"):
        path = folder / name
        path.write_bytes(data)
        is_table = name.startswith("metadata")
        for lines in (False, True):
            try:
                if is_table:
                    rows = captions.metadata_rows(str(path), name)
                    texts = [text for _, row in rows for text in captions.from_json(row, lines)]
                else:
                    texts = captions.parse_sidecar(captions.read_text(str(path), name), name, lines)
            except DatasetError:
                continue
            assert all(is_text(text) and text == " ".join(text.split()) for text in texts)


def test_a_caption_has_a_length():
    assert captions.variants_of("a" * 10_000, False)
    for text in ("a" * 10_001, "b\n" + "a" * 10_001):
        with pytest.raises(DatasetError, match="10001|10003 characters"):
            captions.variants_of(text, True) or captions.variants_of(text, False)


PARTS = st.lists(st.sampled_from(["..", ".", "", "a", "CON", "nul.txt", "a.", " a", "C:", "x" * 200, "~"]), max_size=5)
ODD_NAMES = st.text(max_size=30) | st.text(alphabet="./\\:~-0aA \0\n*CONnul", max_size=24) | PARTS.map("/".join)


@settings(max_examples=300)
@given(ODD_NAMES)
@example("sub/folder/name")
@example("..")
@example("CON")
@example("a:b")
@example("x.")
def test_a_file_name_that_is_taken_is_one_on_every_system(name):
    try:
        check_file_name(name, "filename_prefix")
    except SettingsError as error:
        assert error.input == "filename_prefix" and len(error.message) < 300
        return
    for system, root in ((posixpath, "/root/loras"), (ntpath, "C:\\root\\loras")):
        path = system.normpath(system.join(root, name))
        assert path.startswith(root + system.sep), path
    for part in name.split("/"):
        assert part and not is_windows_reserved(part) and part.strip(" .") and part[-1] not in " ."
        assert not set(part) & set('<>:"|?*\\\0\n\x1f') or set(part) <= {"\n"}


@pytest.mark.parametrize("name", ["adapter", "sub/adapter", "a b", "%year%-%month%", "gr\u00fcn", "a.b", "x" * 150])
def test_usual_file_names_are_taken(name):
    check_file_name(name, "filename_prefix")


@given(st.text(max_size=40))
def test_a_word_that_is_taken_can_be_addressed(name):
    try:
        check_name(name)
    except SettingsError:
        return
    assert (
        name.isascii() and name.split() == [name] and not is_windows_reserved(name) and not set(name) & set("/\\:()[],")
    )


@given(st.text(max_size=60))
def test_texts_that_are_taken_can_be_written(text):
    try:
        check_text(text, "trigger", 50)
    except SettingsError:
        return
    assert len(text) <= 50 and "\0" not in text
    text.encode("utf-8")


@given(st.text(max_size=30) | st.text(alphabet="0123456789 ,=-.einfa", max_size=20))
def test_numbers_in_texts(text):
    for parse in (
        read_resolutions,
        lambda given: parse_pairs(given, float, -100.0, 100.0, "block_strengths"),
        lambda given: parse_pairs(given, int, 0, 4096, "block_ranks"),
    ):
        try:
            found = parse(text)
        except GraftError as error:
            assert error.input
            continue
        numbers = [one[1] if isinstance(one, tuple) else one for one in found]
        assert all(-100 <= number <= 16384 for number in numbers)


def test_a_header_may_not_be_read_beyond_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 60 * 1024 * 1024) + b"{}")
    with pytest.raises(RunError, match="ends after 2 of"):
        files.read_header(str(path))


BLOCKS = st.lists(st.tuples(st.text(alphabet="ab", max_size=2), st.integers(0, 30)), max_size=80)


@given(BLOCKS)
@example([(f"l{number}", 0) for number in range(3000)])
@example([("l", number) for number in range(3000)])
def test_an_adapter_of_any_layers_has_a_picture_of_some_rows(blocks):
    from graft_pack.trainers.tools.plots import joined

    rows = [(f"{kind}.{number}", 1.0) for kind, number in blocks]
    found = joined(rows, 36)
    assert len(found) <= 36
    assert sum(value**2 for _, value in found) == pytest.approx(len(rows))
    if len(rows) <= 36:
        assert [value for _, value in found] == [1.0] * len(rows)
