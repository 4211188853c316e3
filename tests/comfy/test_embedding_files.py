"""Tests of embedding files named in a text by `embedding:<name>`: their content is part of every fingerprint."""

import pytest
import torch
from safetensors.torch import save_file

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

WIDTH = 768


@pytest.fixture
def clip(tmp_path):
    """Return a text encoder that looks for embeddings in its own folder."""
    clip = models.text("SD1")
    for inner in vars(clip.tokenizer).values():
        if hasattr(inner, "_try_get_embedding"):
            inner.embedding_directory = [str(tmp_path)]
    return clip


@pytest.fixture
def write(tmp_path, clip):
    """Return write(name, value), which writes an embedding file of two vectors."""
    width = clip.tokenizer.clip_l.embedding_size

    def write(name, value=0.5):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({"emb_params": torch.full((2, width), value)}, path)

    return write


def digest(clip, *texts, without=()):
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    return ComfyText(clip).embedded_digest(texts, without)


def test_texts_without_embeddings_have_no_digest(clip, write):
    write("word")
    assert digest(clip, "a toy", "word", "embedding: word", "embedding:other", "") == ""


@pytest.mark.parametrize(
    "text",
    [
        "embedding:word",
        "a toy, embedding:word, red",
        "(embedding:word:1.3)",
        "a {embedding:word|dog} runs",
        "a embedding:{dog|word}",
        "a embedding:{big dog | word}",
        "[embedding:word]",
        "embedding:word,red",
        "a\nembedding:word\nb",
        "toy embedding:sub/word",
    ],
)
def test_an_embedding_in_a_text_counts_by_its_content(clip, write, text):
    names = ("word", "sub/word")
    assert digest(clip, text) == ""
    found = []
    for value in (0.5, 0.25):
        for name in names:
            write(name, value)
        found.append(digest(clip, text))
    assert "" not in found and found[0] != found[1]
    for name in names:
        write(name, 0.5)
    assert digest(clip, text) == found[0]


def test_the_host_takes_no_name_that_is_not_asked_for(clip, write):
    """For captions as encoded: every vector that the host inserts is one that the fingerprint covers."""
    from graft_pack.nodes.host.model.embeddings import called_names

    for name in ("word", "x-1", "sub/word", "v1.2"):
        write(name)
    for text in ("a embedding:word, b", "(embedding:x-1:1.2) embedding:v1.2", "embedding:sub/word,", "embedding:word"):
        asked = []
        inner = clip.tokenizer.clip_l
        ask = inner._try_get_embedding

        def recorded(name, ask=ask, asked=asked):
            found = ask(name)
            if found[0] is not None:
                asked.append(name.split()[0].strip(","))
            return found

        inner._try_get_embedding = recorded
        clip.tokenize(text)
        inner._try_get_embedding = ask
        assert asked and set(asked) <= called_names(text), text


def test_words_that_are_known_otherwise_do_not_count_twice(clip, write):
    from graft_pack.nodes.host.model import embeddings

    write("word")
    for text in ("a embedding:word", "embedding:word, red", "(embedding:word:1.2)", "embedding:word<x>"):
        assert digest(clip, text, without=("word",)) == ""
    other = clip.clone()
    other.tokenizer = embeddings.with_embedding(clip.tokenizer, "word", {"clip_l": torch.ones(1, WIDTH)})
    assert digest(other, "a embedding:word") == ""


def test_a_caption_of_any_length_is_searched_quickly(clip):
    assert digest(clip, "embedding:" + "a," * 100_000) == ""
    assert digest(clip, "embedding:" * 10_000) == ""


def test_a_replaced_file_changes_what_nodes_are_asked_for(clip, write, tmp_path, monkeypatch):
    import folder_paths
    from graft_pack.nodes.host.model import embeddings

    monkeypatch.setattr(embeddings, "_CALLED", set())
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    write("word")
    write("other")
    assert embeddings.file_states() == []
    digest(clip, "a embedding:word")
    before = embeddings.file_states()
    assert [state[0] for state in before] == ["word"]
    write("word", 0.25)
    assert embeddings.file_states() != before
