"""Tests of checks on inputs before a node runs, and on values that arrive over wires."""

import asyncio
import inspect
import math

import pytest
import torch
from graft_pack.trainers.errors import GraftError
from graft_pack.trainers.recipe.options import OPTIONS

from docs.build import make_locales

NODES = {node.define_schema().node_id: node for node in make_locales.list_nodes()}
WRONG = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 1e300}


def plain_title(schema):
    """Return a node's title without the search words in brackets."""
    return schema.display_name.partition(" (")[0]


def checked_inputs():
    """Yield (node id, input) of all widgets whose values the host passes on unchecked."""
    for name, node in NODES.items():
        for given in node.define_schema().inputs:
            if given.get_io_type() in ("FLOAT", "STRING", "COMBO"):
                yield name, given


def sockets():
    """Yield (node id, input) of all sockets."""
    for name, node in NODES.items():
        for given in node.define_schema().inputs:
            if given.get_io_type() not in ("FLOAT", "STRING", "INT", "BOOLEAN", "COMBO"):
                yield name, given


ALL = [pytest.param(name, given, id=f"{name}-{given.id}") for name, given in checked_inputs()]


@pytest.mark.parametrize("name, given", ALL)
def test_every_number_text_and_choice_is_checked(name, given):
    """The host passes the values that the signature names."""
    node = NODES[name]
    assert given.id in inspect.getfullargspec(node.validate_inputs).args
    lists = node.define_schema().is_input_list
    ask = lambda value: node.validate_inputs(**{given.id: [value] if lists else value})  # noqa: E731
    title = node.define_schema().display_name.partition(" (")[0]
    if given.get_io_type() == "FLOAT":
        wrong = [*WRONG.values(), {"a": 1}, "1", True, math.nextafter(given.min, -math.inf), given.max * 2 + 1]
        assert ask(given.default) is True and ask(given.max) is True
    elif given.get_io_type() == "COMBO":
        wrong = ["no such choice", "a\0b", 5, {"a": 1}, ["auto"], "a" * 200_000]
        assert given.default is None or ask(given.default) is True
    else:
        wrong = ["a\0b", "\x1b[31m", "\ud800", "a" * 200_000, 5, {"a": 1}]
        assert ask(given.default) is True
    for value in wrong:
        answer = ask(value)
        assert isinstance(answer, str) and answer.startswith(f"{title}, input '{given.id}': "), (value, answer)
        assert len(answer) < 1000
    assert ask(None) is True


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_node_has_a_widget_for_each_of_its_options(kind):
    schema = NODES[f"Graft{kind.capitalize()}Options"].define_schema()
    sockets = {"options", "model"}
    defaults = {given.id: given.default for given in schema.inputs if given.id not in sockets}
    assert defaults == {name: option.unset for name, option in OPTIONS[kind].items()}


@pytest.fixture
def validate(comfy, monkeypatch):
    """Return validate(node id, values): ComfyUI's own errors for a node with these values in a prompt."""
    import execution
    from graft_pack.nodes.checks import find_faults
    from graft_pack.nodes.host.server import validation

    import nodes

    monkeypatch.setattr(execution, "validate_inputs", inspect.unwrap(execution.validate_inputs))
    validation.register(find_faults)
    for name, node in NODES.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)

    def errors_of(name, values):
        prompt = {"1": {"class_type": name, "inputs": values}}
        answer = asyncio.run(execution.validate_inputs("prompt", prompt, "1", {}))
        # Sockets are not connected here.
        return [error for error in answer[1] if error["type"] != "required_input_missing"]

    return errors_of


def filled(name):
    """Return (valid values of a node's checked inputs, the same inputs with an invalid value each)."""
    taken, wrong = {}, {}
    for owner, given in checked_inputs():
        if owner == name:
            taken[given.id] = given.default if given.default is not None else (given.options or [""])[0]
            wrong[given.id] = math.nan if given.get_io_type() == "FLOAT" else "a\0b"
    node = NODES[name]
    return {one: value for one, value in taken.items() if node.validate_inputs(**{one: value}) is True}, wrong


@pytest.mark.parametrize("name", sorted({name for name, _ in checked_inputs()}))
def test_host_shows_an_error_at_the_faulty_inputs_only(name, validate):
    taken, wrong = filled(name)
    for one, value in wrong.items():
        found = validate(name, {**taken, one: value})
        assert [error["extra_info"]["input_name"] for error in found] == [one]
        assert f"input '{one}': " in found[0]["details"]
    found = validate(name, dict(wrong))
    assert sorted(error["extra_info"]["input_name"] for error in found) == sorted(wrong)
    assert all(error["details"].count("input '") == 1 for error in found)


def test_validation_of_other_nodes_stays_as_it_is(validate, monkeypatch):
    import nodes

    class Other:
        RETURN_TYPES = ()

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"a": ("STRING", {}), "b": ("STRING", {})}}

        @classmethod
        def VALIDATE_INPUTS(cls, a, b):
            return "neither"

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Other", Other)
    assert sorted(error["details"] for error in validate("Other", {"a": "", "b": ""})) == ["a - neither", "b - neither"]


@pytest.mark.parametrize(
    "name, given", [pytest.param(name, given, id=f"{name}-{given.id}") for name, given in sockets()]
)
@pytest.mark.parametrize("value", ["text", 5, {"a": 1}, object()], ids=lambda value: type(value).__name__)
def test_what_is_no_such_thing_is_named_by_its_input(name, given, value, comfy):
    node = NODES[name]
    schema = node.define_schema()
    others = {one.id: None if one.optional else one.default for one in schema.inputs if hasattr(one, "default")}
    others |= {one.id: None for one in schema.inputs if not hasattr(one, "default")}
    if schema.is_input_list:
        others = {one: [held] for one, held in others.items()}
        absent = {"masks": None, "control_images": None, "conditioning": None}
        pictures = {**absent, "images": [torch.zeros(1, 8, 8, 3)]}
        others |= {one: held for one, held in pictures.items() if one in others}
        value = [value]
    else:
        others |= stand_ins(schema)
    with pytest.raises(GraftError, match=f"{plain_title(schema)}, input '{given.id}': The connected value is of type"):
        node.execute(**{**others, given.id: value})


def stand_ins(schema):
    """Return a stand-in for each socket that passes its type check."""
    from types import SimpleNamespace

    from graft_pack.trainers.data.examples import Dataset
    from graft_pack.trainers.formats.embedding import Embedding

    thing = SimpleNamespace(model=1, clone=1, cond_stage_model=1, tokenizer=1, encode=1, decode=1)
    made = {"GRAFT_DATASET": Dataset((), "", 0, "x"), "GRAFT_EMBEDDING": Embedding({}, "x"), "LORA_MODEL": {}}
    made["LOSS_MAP"] = {"loss": [1.0]}
    made |= dict.fromkeys(("MODEL", "CLIP", "VAE"), thing)
    return {one.id: made[one.get_io_type()] for one in schema.inputs if one.get_io_type() in made}


@pytest.mark.parametrize("name", ["images", "masks", "control_images"])
def test_numbers_that_are_none_are_named_by_the_input_they_came_in_by(name, comfy):
    others = {"captions": [""], "trigger": [""], "resolution": [0]}
    given = {one: [torch.zeros(1, 8, 8, 3)] for one in ("images", "control_images")} | {"masks": [torch.zeros(8, 8)]}
    NODES["GraftDatasetFromImages"].execute(**others, **given)
    given[name] = [given[name][0] * math.nan]
    with pytest.raises(GraftError, match=f"input '{name}': A picture or mask contains numbers that are not finite"):
        NODES["GraftDatasetFromImages"].execute(**others, **given)
