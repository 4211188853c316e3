"""Tests of a user's first contact with the nodes: search words, and the display of unset numbers."""

import pytest
from selenium.webdriver.common.keys import Keys

from tests.support.browser import EMPTY

pytestmark = [pytest.mark.browser, pytest.mark.server]

WORDS = {
    "lora train": "Graft Train LoRA",
    "lora training": "Graft Train LoRA",
    "fine-tune": "Graft Fine-tune",
    "dreambooth": "Graft Train DreamBooth",
    "caption": "Graft Load Dataset",
    "embedding": "Graft Textual Inversion",
    "textual inversion": "Graft Textual Inversion",
    "merge lora": "Graft Merge Adapters",
    "regularization": "Graft Class Images",
}

FIND_BOX = """
    const isOf = one => one.role === 'combobox' && /search|add a node/i.test(one.placeholder);
    return [...document.querySelectorAll('input')].find(one => one.checkVisibility() && isOf(one)) ?? null;"""
READ_FOUND = """
    return [...document.querySelectorAll('[role=option]')].filter(one => one.checkVisibility())
        .map(one => one.textContent.trim());"""


def test_nodes_are_found_by_the_words_that_users_type(page):
    """In the box that a double click on the graph opens; it lists the best match first."""
    page.load(EMPTY)
    page.js("await app.extensionManager.command.execute('Workspace.SearchBox.Toggle');")
    page.wait_for("return [...document.querySelectorAll('input[role=combobox]')].some(one => one.checkVisibility());")
    box = page.driver.execute_script(FIND_BOX)
    for words, title in WORDS.items():
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(words)
        page.wait_for(f"{READ_FOUND.replace('.map', f'.some(one => one.textContent.includes({title!r})); //')}")
    box.send_keys(Keys.ESCAPE)
    page.js("await app.extensionManager.command.execute('Workspace.SearchBox.Toggle');")


SHOWN = """
    const node = app.graph.getNodeById(args[0]);
    const element = document.querySelector(`[data-node-id="${args[0]}"]`);
    if (!args[2]) return node.widgets.find(widget => widget.name === args[1])._displayValue;
    const field = element.querySelector(`[aria-label="${args[1]}"]`);
    const whole = field.matches('input') ? field.parentElement : field;
    const over = whole.querySelector('.graft-unset');
    return over?.checkVisibility() ? over.textContent : whole.querySelector('input').value;"""


@pytest.mark.parametrize(
    "kind, name, shown",
    [
        ("GraftTrainLoRA", "learning_rate", "auto (1e-4)"),
        ("GraftTrainEmbedding", "learning_rate", "auto (5e-4)"),
        ("GraftFineTune", "learning_rate", "auto"),
        ("GraftRunOptions", "save_every", "auto (500)"),
        ("GraftOptimizerOptions", "warmup_steps", "none"),
        ("GraftPreviewOptions", "seed", "auto (0)"),
    ],
)
def test_unset_numbers_are_shown_as_auto(page, renderer, kind, name, shown):
    page.load(EMPTY)
    node = page.add_node(kind, 300, 200)
    page.fit()
    before = page.serialize()["nodes"][0]["widgets_values"]
    if renderer:
        page.wait_for(f"return document.querySelector('[data-node-id=\"{node}\"] .graft-unset')?.textContent;")
    assert page.js(SHOWN, node, name, renderer) == shown
    # The workflow's values are unchanged.
    assert page.serialize()["nodes"][0]["widgets_values"] == before
    page.set_widget(node, name, 1)
    page.wait_for("await new Promise(resolve => setTimeout(resolve, 300)); return true;")
    assert float(page.js(SHOWN, node, name, renderer)) == 1


def test_the_value_that_is_used_is_shown_once_the_model_is_known(page, renderer):
    """A run reports its settings; another optimizer before the trainer makes them those of another run."""
    page.load(EMPTY)
    trainer, dataset = page.add_node("GraftFineTune", 700, 100), page.add_node("GraftLoadDataset", 100, 100)
    page.connect(dataset, 0, trainer, "dataset")
    page.fit()
    page.js("""
        const where = {node: String(args[0]), workflow: app.graph.id ?? '', prompt_id: 'x'};
        const settings = {learning_rate: 5e-6, resolution: 512};
        api.dispatchCustomEvent('graft.progress', {...where, event: 'begin'});
        api.dispatchCustomEvent('graft.progress', {...where, event: 'run', name: 'r', step: 0, steps: 9, settings});
        await new Promise(resolve => setTimeout(resolve, 800));""", trainer)  # fmt: skip
    assert page.js(SHOWN, trainer, "learning_rate", renderer) == "auto (5e-6)"
    assert page.js(SHOWN, dataset, "resolution", renderer) == "auto (512)"
