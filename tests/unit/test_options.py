"""Tests of the declarations of options, and of what follows from them."""

from dataclasses import MISSING, dataclass, fields, replace

import pytest
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
from graft_pack.trainers.engine.validation import check_recipe, choices_of
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.option import option, options_of
from graft_pack.trainers.recipe.options import RECIPE_OPTIONS, RecipeOptions
from graft_pack.trainers.recipe.recipe import Recipe

from docs.build import make_options
from tests.support import models

CHOICES = [name for name, entry in RECIPE_OPTIONS.items() if entry.choices]


def test_every_field_of_a_recipe_is_declared():
    assert list(RECIPE_OPTIONS) == [field.name for field in fields(Recipe)]
    assert not set(vars(Recipe).get("__annotations__", {})), "Recipe has fields of its own"


def test_one_entry_is_an_option_of_a_node_with_range_default_and_identity():
    """The declaration of an option is all that its field, widget, check and identity need."""

    @dataclass(frozen=True, kw_only=True)
    class Extended(RecipeOptions):
        sharpness: float = option("optimizer", unset=-1.0, range=(0.0, 2.0), default=1.0, before=1.0)

    declared = options_of(Extended)["sharpness"]
    assert (declared.node, declared.input, declared.bounds) == ("optimizer", "sharpness", (-1.0, 2.0))
    assert Extended(**models.recipe("SD1").__dict__).sharpness == 1.0
    with pytest.raises(SettingsError, match=r"sharpness is 3.0. It must lie between 0.0 and 2.0") as caught:
        declared.check_range(3.0, "sharpness")
    assert caught.value.input == "sharpness"


def test_an_attribute_that_options_do_not_have_is_refused():
    with pytest.raises(TypeError, match="rnage"):
        option("optimizer", rnage=(0, 1))


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "text_encoder"])
def test_a_recipe_with_an_unknown_choice_is_refused_by_name(name):
    with pytest.raises(SettingsError, match=f"Unknown {name} 'odd'") as caught:
        check_recipe(replace(models.recipe("SD1"), **{name: "odd"}))
    assert caught.value.input == name


@pytest.mark.parametrize("name", CHOICES)
def test_offered_choices_are_among_the_known_ones(name):
    entry = RECIPE_OPTIONS[name]
    assert set(choices_of(entry.offered or entry.choices)) <= set(choices_of(entry.choices))


def test_jobs_of_earlier_versions_load_without_the_options_that_came_later():
    recipe = resolve(Options(), family_of("SD1"), RecipeInputs("LoRA", 10, 0.0, 4, 1, 0, 0, ""))
    later = {name for name, entry in RECIPE_OPTIONS.items() if entry.before is not MISSING}
    first = {name: value for name, value in vars(recipe).items() if name not in later}
    assert Recipe(**first).identity("d", "b") == recipe.identity("d", "b")
    with pytest.raises(TypeError, match="rank"):
        Recipe(**{name: value for name, value in first.items() if name != "rank"})


def test_the_page_of_options_lists_every_option():
    page = make_options.PAGE.read_text(encoding="utf-8")
    assert make_options.add_table(page) == page
