"""Tests of a run's single sample picture, for a prompt that a page queued without previews."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def recipe(comfy):
    from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
    from graft_pack.trainers.families import family_of

    def make(options=None, **fields):
        options = Options(options or {})
        return resolve(options, family_of("SD1"), RecipeInputs("LoRA", 4, 0.0, 4, 1, 0, 64, fields.get("trigger", "")))

    return make


def dataset(trigger, *captions, prior=False):
    return SimpleNamespace(trigger=trigger, examples=[SimpleNamespace(captions=captions, prior=prior)])


@pytest.mark.parametrize(
    "given, prompt",
    [
        (dataset("sks toy", "a red toy"), ("sks toy",)),
        (dataset("", "", " a red toy "), ("a red toy",)),
        (dataset("", ""), ()),
        (dataset("", "a class image", prior=True), ()),
    ],
)
def test_its_prompt_is_the_trigger_or_the_first_caption(recipe, given, prompt):
    from graft_pack.nodes.host.actions.train import with_picture

    found = with_picture(recipe(), given)
    assert found.preview_prompts == prompt
    assert found.preview_every == (0 if prompt else 100)
    assert found.identity("data", "base") == recipe().identity("data", "base"), "it is the same run"


def test_previews_that_are_set_stay(recipe):
    from graft_pack.nodes.host.actions.train import with_picture

    chosen = recipe({("preview", "prompts"): "mine", ("preview", "every"): 7})
    assert with_picture(chosen, dataset("sks toy")) == chosen


def test_a_word_that_is_learnt_is_its_own_prompt(recipe):
    from graft_pack.nodes.host.actions.train import with_picture

    learning = recipe({("pivotal", "name"): "my-dog", ("pivotal", "init_text"): "dog"})
    assert with_picture(learning, dataset("my-dog")).preview_prompts == ("embedding:my-dog",)
