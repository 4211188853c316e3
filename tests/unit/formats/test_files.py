"""Tests that files are complete or absent, whatever happens while they are written."""

import errno
import json
import os
import random
import struct

import pytest
import torch
from graft_pack.trainers.errors import ModelError, RunError
from graft_pack.trainers.formats import atomic, files, json_files
from graft_pack.trainers.formats.adapter import Adapter, load_adapter, save_adapter
from graft_pack.trainers.formats.embedding import Embedding, load_embedding, save_embedding
from graft_pack.trainers.formats.kohya import lora_tensors, to_kohya
from graft_pack.trainers.formats.metadata import tensors_hash
from safetensors.torch import save_file


class Crash(BaseException):
    """A crash as sudden as one within a process can be."""


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c": torch.tensor(1.5, dtype=torch.bfloat16)}


def test_tensors_come_back_with_their_metadata(tmp_path):
    path = str(tmp_path / "deep" / "er" / "x.safetensors")
    files.write_tensors(path, TENSORS, {"k": "v"})
    tensors, metadata = files.read_tensors(path)
    assert metadata == {"k": "v"} == files.read_metadata(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)


def test_views_and_shared_tensors_are_written_as_their_values(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    path = str(tmp_path / "x.safetensors")
    files.write_tensors(path, {"t": whole.t(), "part": whole[1:], "same": whole}, {})
    tensors, _ = files.read_tensors(path)
    assert torch.equal(tensors["t"], whole.t())
    assert torch.equal(tensors["part"], whole[1:])


def test_the_file_is_the_librarys_own(tmp_path):
    """It is equal byte for byte, and the library reads it for any dtype."""
    from safetensors import safe_open
    from safetensors.torch import save

    source = torch.Generator().manual_seed(0)
    plain = {name: torch.randn(3, size, generator=source) for name, size in (("b", 2), ("a.c", 5), ("a", 1))}
    for metadata in ({}, {"k": 'a \u00fc " v'}):
        files.write_tensors(str(tmp_path / "x.safetensors"), plain, metadata, checksums=False)
        assert _parts((tmp_path / "x.safetensors").read_bytes()) == _parts(save(plain, metadata or None))
    kinds = [getattr(torch, kind) for kind in files._DTYPES]
    every = {f"{kind}": (torch.arange(5) % 2).to(kind) for kind in kinds}
    every["number"] = torch.tensor(3, dtype=torch.int64)
    files.write_tensors(str(tmp_path / "y.safetensors"), every, {"k": "v"})
    with safe_open(tmp_path / "y.safetensors", framework="pt") as file:
        assert file.metadata().keys() == {"k", files.CHECKSUMS} and file.metadata()["k"] == "v"
        # Readers that map the file need each value at a multiple of its size.
        for row in list(files.read_header(str(tmp_path / "y.safetensors")).values())[1:]:
            assert row["data_offsets"][0] % getattr(torch, _named(row["dtype"])).itemsize == 0
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert read.keys() == every.keys()
    for name, tensor in every.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.float())


def _named(dtype):
    return next(name for name, theirs in files._DTYPES.items() if theirs == dtype)


def _parts(data):
    """Return (decoded header, alignment of the data, data)."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), size % 8, data[8 + size :]


def test_numbers_that_the_format_does_not_know_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(RunError, match="complex64"):
        files.write_tensors(str(tmp_path / "x.safetensors"), {"x": torch.zeros(2, dtype=torch.complex64)}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(moment, tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    json_files.write_json(str(path), {"old": 1})

    def crash(*args):
        raise Crash

    monkeypatch.setattr(files.os, moment, crash)
    with pytest.raises(Crash):
        json_files.write_json(str(path), {"new": 2})
    monkeypatch.undo()
    assert json_files.read_json(str(path)) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    path = str(tmp_path / "x.bin")
    with pytest.raises(Crash):
        with atomic.replacing(path) as temporary:
            open(temporary, "wb").close()
            raise Crash
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"x\.json.*cannot be written"):
        json_files.write_json(str(tmp_path / "file" / "x.json"), {})


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 40, b"{" * 5000])
def test_what_is_no_safetensors_file_is_named(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"x\.safetensors"):
        files.read_tensors(str(path))
    with pytest.raises(RunError, match=r"x\.safetensors"):
        files.read_metadata(str(path))


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_half_a_file_is_refused(share, tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_tensors(str(path), {"a": torch.randn(100, 10)}, {})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(RunError):
        files.read_tensors(str(path))


def test_an_adapter_carries_its_metadata_through_a_file(tmp_path):
    layers = {"x.to_q": lora_tensors(torch.randn(4, 8), torch.randn(8, 4), 2.0)}
    adapter = Adapter(to_kohya(layers, lambda path: "lora_unet_" + path.replace(".", "_")), {"ss_seed": "7"})
    assert sorted(adapter) == [f"lora_unet_x_to_q.{end}" for end in ("alpha", "lora_down.weight", "lora_up.weight")]
    assert float(adapter["lora_unet_x_to_q.alpha"]) == 2.0
    path = str(tmp_path / "x.safetensors")
    save_adapter(path, adapter, "My LoRA")
    back = load_adapter(path)
    assert back.metadata["ss_seed"] == "7"
    assert back.metadata["modelspec.title"] == "My LoRA"
    assert back.metadata["modelspec.hash_sha256"] == "0x" + tensors_hash(back)


def test_the_hash_follows_names_shapes_and_values():
    tensors = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.ones(2, 3)},
        {"a": torch.zeros(2, 3).half()},
    ]
    assert len({tensors_hash(one) for one in [tensors, *others]}) == 5


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, monkeypatch):
    """The disk becomes full after some tensors were written."""
    path = tmp_path / "a.safetensors"
    files.write_tensors(str(path), {"x": torch.zeros(2)}, {})
    before = path.read_bytes()

    real = files.bytes_of
    asked = []

    def full(tensor):
        asked.append(tensor)
        if len(asked) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensor)

    monkeypatch.setattr(files, "bytes_of", full)
    with pytest.raises(RunError, match="a.safetensors.*No space.*Free space"):
        files.write_tensors(str(path), {"x": torch.ones(2), "y": torch.ones(2)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_may_be_read_by_whoever_may_read_its_folder(tmp_path):
    files.write_tensors(str(tmp_path / "a.safetensors"), {"x": torch.zeros(2)}, {})
    (tmp_path / "other").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Files of other programs stay, because their names do not mark them as ours."""
    others = {".tmpAbCdEf", "state.safetensors", ".x.tmp", ".model.part.tmp", "a.12345678.tmp"}
    for name in (".state.safetensors.12345678.tmp", *others):
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.12345678.tmp").mkdir()
    (tmp_path / ".link.12345678.tmp").symlink_to(tmp_path / "state.safetensors")
    atomic.sweep(str(tmp_path))
    assert len(os.listdir(tmp_path)) == 8, "others may be writing them"
    atomic.sweep(str(tmp_path), older_than=0.0)
    assert set(os.listdir(tmp_path)) == {*others, ".folder.12345678.tmp", ".link.12345678.tmp"}


def flipped(data, place, bit):
    spoilt = bytearray(data)
    spoilt[place] ^= 1 << bit
    return bytes(spoilt)


@pytest.mark.parametrize(
    "load", [load_adapter, lambda path: load_embedding(path, "word")], ids=["adapter", "embedding"]
)
def test_a_flipped_bit_in_a_file_of_ours_is_noticed(load, tmp_path, caplog, trials):
    """A flip in the data or in its description is refused; a flip elsewhere in the header is logged."""
    path = tmp_path / "x.safetensors"
    if load is load_adapter:
        save_adapter(
            str(path), Adapter({"l.lora_up.weight": torch.ones(2, 1), "l.lora_down.weight": torch.ones(1, 2)}), "t"
        )
    else:
        save_embedding(str(path), Embedding({"clip_l": torch.ones(1, 768)}, "word"), "t")
    load(str(path))
    assert not caplog.records
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    entry = data.index(files.CHECKSUMS.encode())
    source = random.Random(0)
    for place in range(0, len(data), trials(1 + len(data) // 200, 1)):
        # In the checksum entry's name alone, the flip makes the file look like another program's.
        if entry <= place < entry + len(files.CHECKSUMS):
            continue
        caplog.clear()
        path.write_bytes(flipped(data, place, source.randrange(8)))
        try:
            load(str(path))
        except (RunError, ModelError):
            continue
        assert place < start and "does not match its checksum" in caplog.text, (place, data[place - 20 : place + 20])


def test_files_of_others_and_edited_ones_are_read(tmp_path, caplog):
    """Other programs keep the metadata when they change tensors, and may change the metadata alone."""
    path = str(tmp_path / "x.safetensors")
    files.write_tensors(path, TENSORS, {"k": "v"})
    entry = files.read_header(path)["__metadata__"][files.CHECKSUMS]
    save_file({"other": torch.ones(3)}, path, {files.CHECKSUMS: entry})
    assert files.read_tensors(path)[0]["other"].tolist() == [1, 1, 1]
    assert "does not match its checksum" in caplog.text
    save_file(TENSORS, path, {files.CHECKSUMS: entry, "title": "mine"})
    assert files.read_tensors(path)[1] == {"title": "mine"}
    save_file({**TENSORS, "a": TENSORS["a"] + 1}, path, {files.CHECKSUMS: entry})
    with pytest.raises(RunError, match=r"is damaged: the tensor a .*graft_checksums"):
        files.read_tensors(path)
    for metadata in ({}, {files.CHECKSUMS: ""}, {files.CHECKSUMS: "1:3:x"}, {files.CHECKSUMS: "\u00e9" * 40}):
        save_file(TENSORS, path, metadata)
        assert files.read_tensors(path)[0].keys() == TENSORS.keys()


def test_checksums_are_made_anew_for_each_file(tmp_path):
    """Metadata that was read from one file and written into another carries no checksums along."""
    one, other = str(tmp_path / "1.safetensors"), str(tmp_path / "2.safetensors")
    files.write_tensors(one, TENSORS, {"k": "v"})
    files.write_tensors(other, {"n": torch.ones(2)}, files.read_header(one)["__metadata__"])
    assert files.read_tensors(other, strict=True)[1] == {"k": "v"}
