"""Tests that files of earlier versions, under fingerprints of sampled weights, are found and used for one base only."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from graft_pack.trainers.data.class_images import ClassImages, Drawing
from graft_pack.trainers.engine import session
from graft_pack.trainers.fingerprints import earlier_fingerprint, embedded_digest
from graft_pack.trainers.formats import json_files
from graft_pack.trainers.preprocessing.cache import Cache, key_of
from graft_pack.trainers.preprocessing.encode import TextCache
from graft_pack.trainers.runs.earlier import claim
from graft_pack.trainers.runs.folders import Folders

from tests.support import models


@pytest.fixture
def folders(tmp_path):
    return Folders(*(str(tmp_path / name) for name in ("runs", "cache", "loras", "words")))


@dataclass
class Encoder:
    """A text encoder whose sampled fingerprint covers less than the whole, with embedding files by name."""

    whole: str = "whole a"
    files: tuple = ()
    encoded: int = 0

    def fingerprint(self):
        return self.whole

    def earlier_fingerprint(self):
        return "sampled"

    def embedded_digest(self, texts, without=()):
        return "|".join(f"{name}={content}" for name, content in self.files if any(name in text for text in texts))

    def form(self, caption):
        return None

    def encode(self, caption):
        self.encoded += 1
        return {"cross_attn": torch.ones(1, 2, 3)}


def filled(folder, encoder, caption="a toy"):
    cache = TextCache(Cache(str(folder)), encoder)
    cache.fill([caption], lambda name: None)
    return cache


def task(identity="f" * 64, earlier="e" * 64, embedded=""):
    return session.Task(None, None, identity, earlier, embedded, "toy", {})


def find(folders, given, **recipe):
    return session._find_run(models.recipe("SD1", **recipe), given, folders, "")


def write_run(folders, identity):
    run = find(folders, task(identity, ""))
    json_files.write_json(run.recipe_path, {"identity": identity, "recipe": {"steps": 3}})
    return run


def test_the_first_base_that_asks_gets_what_earlier_versions_made(tmp_path):
    folder = str(tmp_path / "new")
    assert claim(folder, "sampled", "whole a")
    assert claim(folder, "sampled", "whole a")
    assert not claim(folder, "sampled", "whole b")
    assert claim(folder, "same", "same")


@pytest.mark.parametrize("junk", ["", "[]", '{"sampled": 3}'])
def test_a_damaged_list_of_bases_is_written_anew(tmp_path, junk):
    (tmp_path / "bases.json").write_text(junk)
    assert claim(str(tmp_path), "sampled", "whole a")
    assert not claim(str(tmp_path), "sampled", "whole b")


def test_captions_that_earlier_versions_encoded_are_found(tmp_path):
    folder = tmp_path / "text"
    cache = Cache(str(folder))
    cache.put(key_of("text 1", "sampled", "a toy"), {"cross_attn": torch.zeros(1, 2, 3)})
    cache.flush()
    mine, other = Encoder(), Encoder("whole b")
    assert filled(folder, mine).get("a toy")["cross_attn"].sum() == 0 and mine.encoded == 0
    # Different weights with the same sampled fingerprint encode for themselves.
    assert filled(folder, other).get("a toy")["cross_attn"].sum() == 6 and other.encoded == 1
    again = Encoder("whole b")
    assert filled(folder, again).get("a toy")["cross_attn"].sum() == 6 and again.encoded == 0


def test_entries_of_earlier_versions_go_into_jobs_under_their_new_keys(tmp_path):
    cache = Cache(str(tmp_path / "text"))
    cache.put("old", {"x": torch.ones(2)})
    cache.flush()
    cache.find_as("new", "old")
    assert cache.missing(["new"]) == set()
    cache.copy_used(str(tmp_path / "job"))
    assert Cache(str(tmp_path / "job")).get("new")["x"].sum() == 2


def test_captions_are_encoded_anew_when_their_embedding_changes(tmp_path):
    caption = "a toy word"
    for content, encoded in (("1", 1), ("1", 0), ("2", 1), ("1", 0)):
        encoder = Encoder(files=(("word", content),))
        filled(tmp_path / "text", encoder, caption)
        assert encoder.encoded == encoded, content
    plain = Encoder(files=(("word", "3"),))
    filled(tmp_path / "text", plain, "a toy")
    same = Encoder(files=(("word", "4"),))
    filled(tmp_path / "text", same, "a toy")
    assert (plain.encoded, same.encoded) == (1, 0), "captions without it keep their key"


def test_a_run_of_earlier_versions_is_found(folders):
    old = write_run(folders, "e" * 64)
    assert find(folders, task()).folder == old.folder
    new = write_run(folders, "f" * 64)
    assert find(folders, task()).folder == new.folder


def test_a_run_of_earlier_versions_that_is_anothers_is_left(folders):
    old = write_run(folders, "e" * 64)
    assert find(folders, task(earlier="")).folder != old.folder
    assert find(folders, task(earlier="d" * 64)).folder != old.folder


def test_a_run_of_earlier_versions_is_one_set_of_embeddings(folders):
    old = write_run(folders, "e" * 64)
    assert find(folders, task("1" * 64, embedded="word 1")).folder == old.folder
    assert find(folders, task("2" * 64, embedded="word 2")).folder != old.folder


def test_a_new_run_is_made_beside_one_of_earlier_versions(folders):
    old = write_run(folders, "e" * 64)
    assert find(folders, task(), on_existing="new").folder not in (old.folder, "")
    assert find(folders, task(), on_existing="start over").folder == old.folder


def test_class_images_of_earlier_versions_are_found(tmp_path):
    drawing = Drawing("a dog", "", "whole", (64, 64), 2, 1.0, "euler", "normal", 0)
    before = replace(drawing, base="sampled")
    old = ClassImages(str(tmp_path), before).folder
    assert ClassImages(str(tmp_path), drawing, before).folder != old
    os.makedirs(old)
    assert ClassImages(str(tmp_path), drawing, before).folder == old
    assert ClassImages(str(tmp_path), drawing).folder != old


def test_a_host_without_a_past_has_one_fingerprint():
    class SyncTransfer:
        def fingerprint(self):
            return "plain"

    assert earlier_fingerprint(SyncTransfer()) == "plain"
    assert embedded_digest(SyncTransfer(), ("embedding:word",)) == ""
