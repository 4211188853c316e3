"""Tests of the node that imports the settings of other trainers, in ComfyUI's process."""

import pytest
from graft_pack.trainers.engine.resolve import Options
from graft_pack.trainers.errors import GraftError

from docs.build import make_locales

TEXT = """
network_module = "networks.lora"
network_dim = 8
network_train_unet_only = true
learning_rate = 3e-4
max_train_steps = 700
train_batch_size = 2
seed = 5
lr_scheduler = "cosine"
mystery = 1
"""


@pytest.fixture
def node(comfy):
    return {node.define_schema().node_id: node for node in make_locales.list_nodes()}["GraftImportRecipe"]


def test_outputs_are_options_report_and_the_trainers_widgets(node):
    before = Options().adding("run", {"keep_last": 9}).adding("optimizer", {"schedule": "linear"})
    before.preview_model = "model"
    options, report, *widgets = node.execute(text=TEXT, options=before).result
    assert options.value("optimizer", "schedule", "") == "cosine" and options.value("run", "keep_last", 0) == 9
    assert options.preview_model == "model" and before.value("optimizer", "schedule", "") == "linear"
    assert widgets == [700, 3e-4, 8, 2, 5]
    names = [output.display_name for output in node.define_schema().outputs]
    assert names == ["options", "report", "steps", "learning_rate", "rank", "batch_size", "seed"]
    assert "mystery = 1: Graft has nothing like it." in report


def test_an_unknown_text_is_refused_before_and_while_it_runs(node):
    start = "Graft Import Recipe, input 'text': The text has no settings that Graft knows."
    assert node.validate_inputs(text='{"a": 1}').startswith(start)
    with pytest.raises(GraftError) as caught:
        node.execute(text='{"a": 1}')
    assert str(caught.value).startswith(start) and "sd-scripts" in caught.value.cure
    with pytest.raises(GraftError, match="input 'options'"):
        node.execute(text=TEXT, options="wrong")
