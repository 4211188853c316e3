"""Tests of the tags in a file's metadata, counted as kohya's sd-scripts count them, and only if asked for."""

import json
from dataclasses import replace

from graft_pack.trainers.data.examples import count_tags

from tests.support.diffusers_host import make_dataset, run_session


def frequency_of_sd_scripts(captions):
    """Return its counts, written out."""
    frequency_for_dir = {}
    for caption in captions:
        for tag in caption.split(","):
            tag = tag.strip()
            if tag:
                tag = tag.lower()
                frequency_for_dir[tag] = frequency_for_dir.get(tag, 0) + 1
    return frequency_for_dir


def test_tags_are_counted_as_sd_scripts_count_them():
    texts = ["1girl, Solo,, red  hat", "solo, a picture", ""]
    dataset = make_dataset(3)
    pairs = zip(dataset.examples, texts, strict=True)
    examples = [replace(example, captions=(text,), trigger="sks") for example, text in pairs]
    dataset = replace(dataset, examples=(*examples, replace(examples[0], prior=True)))
    assert count_tags(dataset) == {dataset.name: frequency_of_sd_scripts([f"sks, {text}" for text in texts])}


def test_captions_are_written_only_if_asked_for(tmp_path):
    private = run_session(tmp_path / "off", steps=1)
    assert not [name for name, value in private.adapter.metadata.items() if "picture 0" in value]
    assert "ss_tag_frequency" not in private.adapter.metadata
    result = run_session(tmp_path / "on", steps=1, tag_frequency="on")
    tags = json.loads(result.adapter.metadata["ss_tag_frequency"])
    assert list(tags) == [make_dataset().name]
    assert sum(tags[make_dataset().name].values()) > 0
    assert result.run.name == private.run.name, "the option decides nothing"
