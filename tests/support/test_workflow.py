"""Tests of the conversion from UI format to API format, by hand-made graphs and against the real frontend."""

import pytest

from tests.support.workflow import WorkflowError, to_prompt

SCHEMAS = {
    "Source": {"input": {"required": {"seed": ["INT", {"default": 0}], "mode": [["a", "b"], {}]}}},
    "Sink": {
        "input": {
            "required": {"image": ["IMAGE"], "text": ["STRING", {"default": "x"}]},
            "optional": {
                "mask": ["MASK"],
                "extra": ["FLOAT", {"default": 0.5}],
                "note": ["STRING", {"forceInput": True}],
            },
        },
        "display_name": "The Sink",
    },
    "Filter": {"input": {"required": {"image": ["IMAGE"]}}},
}


def make_workflow(**filter):
    """Return a workflow Source -> Filter -> Sink, with a note beside them."""
    return {
        "nodes": [
            {"id": 1, "type": "Source", "widgets_values": [7, "randomize", "b"], "outputs": [{"type": "IMAGE"}]},
            {
                "id": 2,
                "type": "Filter",
                "inputs": [{"name": "image", "type": "IMAGE", "link": 10}],
                "outputs": [{"type": "IMAGE"}],
                **filter,
            },
            {
                "id": 3,
                "type": "Sink",
                "title": "mine",
                "inputs": [
                    {"name": "image", "type": "IMAGE", "link": 11},
                    {"name": "mask", "type": "MASK", "link": None},
                ],
                "widgets_values": ["hello"],
            },
            {"id": 4, "type": "Note", "widgets_values": ["text"]},
        ],
        "links": [[10, 1, 0, 2, 0, "IMAGE"], [11, 2, 0, 3, 0, "IMAGE"]],
    }


def convert(workflow, **arguments):
    return {node: entry["inputs"] for node, entry in to_prompt(workflow, SCHEMAS, **arguments).items()}


def test_widgets_and_links():
    assert convert(make_workflow()) == {
        "1": {"seed": 7, "mode": "b"},
        "2": {"image": ["1", 0]},
        "3": {"image": ["2", 0], "text": "hello", "extra": 0.5},
    }


@pytest.mark.parametrize("filter", [{"mode": 4}, {"type": "Reroute"}])
def test_bypass_and_reroute_hand_the_link_on(filter):
    prompt = convert(make_workflow(**filter))
    assert "2" not in prompt
    assert prompt["3"]["image"] == ["1", 0]


def test_what_a_muted_node_feeds_is_left_open():
    assert "image" not in convert(make_workflow(mode=2))["3"]


@pytest.mark.parametrize("name", ["3", "mine", "Sink"])
def test_overrides(name):
    assert convert(make_workflow(), overrides={name: {"text": "other"}})["3"]["text"] == "other"


@pytest.mark.parametrize("overrides", [{"nobody": {"text": ""}}, {"Sink": {"nothing": ""}}])
def test_overrides_that_change_nothing_are_errors(overrides):
    with pytest.raises(WorkflowError):
        convert(make_workflow(), overrides=overrides)


def test_unknown_node_types_are_errors():
    with pytest.raises(WorkflowError, match="Filter2"):
        convert(make_workflow(type="Filter2"))
