"""Tests of the work before a run's first step, counted: no needless import, read or encoding."""

import sys
from dataclasses import replace

import pytest
from graft_pack.trainers.formats import files
from graft_pack.trainers.formats.adapter import save_adapter
from graft_pack.trainers.formats.files import read_header
from graft_pack.trainers.optimizers import SCHEDULES, ScheduleShape, lr_factor
from graft_pack.trainers.preprocessing import cache as caches
from graft_pack.trainers.preprocessing.cache import Cache

from tests.support.diffusers_host import LayeredEncoder, PosteriorCodec, WordEncoder, make_dataset, make_host
from tests.support.diffusers_host import run_session as session

FORMS = {
    "LoRA": {},
    "LoHa": {"method": "LoHa"},
    "text encoder": {"text_encoder": True, "text_encoder_rank": 2, "text_encoder_learning_rate": 1e-3},
}


class Refusing(LayeredEncoder):
    """A text encoder that refuses to encode or to be trained."""

    def encode(self, caption):
        raise AssertionError(caption)

    training = encode_live = encode


def without_libraries(monkeypatch):
    """Make imports of peft, and of the engine's parts of diffusers, fail as if they were not installed."""
    lacking = {name for name in sys.modules if name.split(".")[0] == "peft"}
    for name in lacking | {"peft", "diffusers.optimization", "diffusers.training_utils"}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("form", FORMS)
def test_a_finished_run_is_returned_without_libraries_pictures_or_weights(tmp_path, monkeypatch, form):
    host = replace(make_host(), text=LayeredEncoder())
    first = session(tmp_path, host=host, **FORMS[form])
    path = tmp_path / "again.safetensors"
    again = replace(make_host(), text=Refusing())
    again.codec.encode = again.denoiser.training = again.denoiser.predict = None
    without_libraries(monkeypatch)
    found = session(tmp_path, host=again, **FORMS[form])
    assert (found.resumed_from, found.step) == (4, 4)
    save_adapter(str(path), found.adapter, "again")
    assert files.read_tensors(str(path))[0].keys() == first.adapter.keys()
    if first.adapter.native is None:
        return
    # A missing library raises only when it is needed; the form made then equals that of the training.
    with pytest.raises(ImportError):
        _ = found.adapter.native
    monkeypatch.undo()
    made, expected = found.adapter.native, first.adapter.native
    assert (made.config, made.scales, made.published) == (expected.config, expected.scales, expected.published)
    assert made.all_tensors().keys() == expected.all_tensors().keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_needs_no_library(schedule, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.optimization", None)
    for warmup in (0, 2):
        factor = lr_factor(schedule, ScheduleShape(warmup, 5, points=((0, 1.0),)))
        assert factor(warmup) == 1.0
        if schedule == "constant":
            assert [factor(step) for step in range(warmup, 7)] == [1.0] * (7 - warmup)


def keys_of(shard):
    """Return the keys of a shard's entries, whose tensors are named key/name."""
    return {name.partition("/")[0] for name in read_header(str(shard)) if name != "__metadata__"}


def test_a_shard_is_read_once_however_much_of_it_is_wanted(tmp_path, monkeypatch):
    made = session(tmp_path, host=replace(make_host(), codec=PosteriorCodec()), dataset=make_dataset(30))
    shards = list((tmp_path / "cache").rglob("*.safetensors"))
    read = []
    inner = files.read_tensors
    monkeypatch.setattr(caches.files, "read_tensors", lambda path, names: read.append(path) or inner(path, names))
    for folder in {path.parent for path in shards}:
        keys = {key for path in folder.iterdir() for key in keys_of(path)}
        assert keys and not Cache(str(folder)).missing(keys)
    assert made.step and sorted(read) == sorted(map(str, shards))


def test_with_full_caches_a_new_run_encodes_nothing(tmp_path):
    session(tmp_path)

    class Words(WordEncoder):
        encode = None

    host = replace(make_host(), text=Words())
    host.codec.encode = None
    assert session(tmp_path, host=host, learning_rate=2e-2).resumed_from == 0
