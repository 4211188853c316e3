"""Tests of cache shards on disk: stored entries are found, damaged ones are rebuilt, and old ones make room."""

import json
import os
import struct

import pytest
import torch
from graft_pack.trainers.formats import files
from graft_pack.trainers.preprocessing import cache as caches
from graft_pack.trainers.preprocessing.cache import Cache, cache_size, key_of, prune
from safetensors import safe_open

COUNT = 80


def entry(number, dtype=torch.float32):
    source = torch.Generator().manual_seed(number)
    return {"mean": torch.randn(1, 4, 6, 5, generator=source).to(dtype), "logvar": torch.full((2, number % 3), 0.5)}


def filled(folder, count=COUNT):
    cache = Cache(str(folder))
    for number in range(count):
        cache.put(key_of(number), entry(number))
    cache.flush()
    return cache


def same(found, expected):
    return (
        found is not None and found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    )


def missing(folder, count=COUNT):
    wanted = {key_of(number): number for number in range(count)}
    return {wanted[key] for key in Cache(str(folder)).missing(wanted)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_what_was_put_is_found_by_another(tmp_path, dtype):
    cache = Cache(str(tmp_path))
    cache.put("a", entry(1, dtype))
    assert same(cache.get("a"), entry(1, dtype)), "before it is written"
    assert not list(tmp_path.iterdir())
    cache.flush()
    for one in (cache, Cache(str(tmp_path))):
        assert one.missing(["a", "b"]) == {"b"}
        assert same(one.get("a"), entry(1, dtype))
        assert one.get("b") is None


def test_entries_share_shards(tmp_path):
    cache = filled(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3, "80 entries of a few hundred bytes"
    with safe_open(files[0], framework="pt") as file:
        assert json.loads(file.metadata()["sums"]).keys() == set(file.keys())
    assert all(same(cache.get(key_of(number)), entry(number)) for number in range(COUNT))


@pytest.mark.parametrize("limit", ["_ENTRIES", "_BYTES", "_SECONDS"])
def test_a_shard_is_written_when_it_is_full_large_or_old(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(caches, limit, 0)
    cache = Cache(str(tmp_path))
    cache.put("a", entry(1))
    assert len(list(tmp_path.iterdir())) == 1


def flip_data(path):
    """Flip one bit of the last tensor byte; the header stays valid."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut_off(path):
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size - 10)


def empty(path):
    path.write_bytes(b"")


def swap_header(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:8] + data[8 : 8 + size].replace(b'"sums"', b'"sins"') + data[8 + size :])


@pytest.mark.parametrize("damage", [flip_data, cut_off, empty, swap_header])
def test_a_damaged_shard_is_noticed_and_rebuilt(tmp_path, damage):
    filled(tmp_path)
    first, *others = sorted(tmp_path.iterdir())
    with safe_open(first, framework="pt") as file:
        held = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118 - not a dict
    numbers = {number for number in range(COUNT) if key_of(number) in held}
    damage(first)
    gone = missing(tmp_path)
    assert gone, "noticed"
    assert gone <= numbers, "the other shards are not touched"
    if damage is flip_data:
        assert len(gone) == 1, "what is sound in the shard stays"
    assert not first.exists()
    assert set(others) <= set(tmp_path.iterdir())
    cache = Cache(str(tmp_path))
    for number in set(range(COUNT)) - gone:
        assert same(cache.get(key_of(number)), entry(number))
    for number in gone:
        cache.put(key_of(number), entry(number))
    cache.flush()
    assert not missing(tmp_path)


def test_damage_while_it_is_used_is_not_taken_for_a_tensor(tmp_path):
    cache = filled(tmp_path, 1)
    flip_data(next(iter(tmp_path.iterdir())))
    assert cache.get(key_of(0)) is None


def test_what_a_killed_process_left_is_swept_but_not_what_another_writes_now(tmp_path):
    old, young = tmp_path / ".x.safetensors.1.tmp", tmp_path / ".y.safetensors.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert missing(tmp_path, 3) == {0, 1, 2}
    assert not old.exists()
    assert young.exists()


def test_two_processes_may_fill_one_folder(tmp_path):
    one, other = Cache(str(tmp_path)), Cache(str(tmp_path))
    for cache in (one, other):
        cache.put("a", entry(1))
        cache.flush()
    assert same(Cache(str(tmp_path)).get("a"), entry(1))


def test_the_oldest_makes_room_and_what_is_used_stays(tmp_path):
    shards = set()
    for place, number in enumerate((1, 2, 3)):
        cache = Cache(str(tmp_path / "latents"))
        cache.put(str(number), entry(number))
        cache.flush()
        (path,) = {*(tmp_path / "latents").iterdir()} - shards
        shards.add(path)
        os.utime(path, (1000 + place, 1000 + place))
    size = cache_size(str(tmp_path))
    assert size == sum(path.stat().st_size for path in (tmp_path / "latents").iterdir())
    each = size // 3
    Cache(str(tmp_path / "latents")).missing(["1"])
    assert prune(str(tmp_path), size, 10_000) == 0
    assert abs(prune(str(tmp_path), 2 * each + 100, 10_000) - each) < 100
    left = Cache(str(tmp_path / "latents"))
    assert left.missing(["1", "2", "3"]) == {"2"}, "the first was used last"
    prune(str(tmp_path), 0, 10_000)
    assert Cache(str(tmp_path / "latents")).missing(["1", "3"]) == set(), "both were used since"


def put_foreign(folder):
    """Write files that are no shards: other programs' adapters, a torn file, a shard's name, a link, an old temp."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, metadata in enumerate(({}, {"format": "pt"}, {"sums": "{}"}, {"sums": "no JSON", "key": "x"})):
        files.write_tensors(str(folder / f"{number}.safetensors"), {"x": torch.ones(2)}, metadata)
    data = (folder / "0.safetensors").read_bytes()
    (folder / f"{'a1' * 12}.safetensors").write_bytes(data)
    (folder / f"{'b2' * 12}.safetensors").write_bytes(data[:20])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / ".tmpAbCdEf").write_bytes(b"of another program")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_file_of_others_is_removed(tmp_path):
    """Not when the folder is opened, not when entries are read, and not to make room."""
    before = put_foreign(tmp_path / "latents")
    shard = tmp_path / "shard"
    filled(shard, 1)
    (target,) = shard.iterdir()
    os.symlink(target, tmp_path / "latents" / f"{'c3' * 12}.safetensors")
    assert missing(tmp_path / "latents", 3) == {0, 1, 2}
    prune(str(tmp_path / "latents"), 0, 10_000)
    after = {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir() if not path.is_symlink()}
    assert after == before
    assert target.exists() and (tmp_path / "latents" / f"{'c3' * 12}.safetensors").is_symlink()


@pytest.mark.parametrize("metadata", [{"format": "graft cache 0"}, {"key": "ab" * 32}], ids=["format", "first version"])
def test_files_of_earlier_versions_still_make_room(tmp_path, metadata):
    path = tmp_path / "ab" / f"{'ab' * 32}.safetensors"
    files.write_tensors(str(path), {"x": torch.ones(2)}, metadata)
    prune(str(tmp_path), 0, 1e12)
    assert not path.exists()
