"""The live panel in tests: a small graph around a trainer, and the content of the page's panel."""

from __future__ import annotations

import json
import time

from .browser import EMPTY
from .graphs import CHECKPOINT

# {title: (node id, place)}, in the order of their creation.
NODES = {
    "Checkpoint": ("CheckpointLoaderSimple", (0, 0)),
    "Photos": ("GraftLoadDataset", (0, 200)),
    "Run": ("GraftRunOptions", (400, 0)),
    "Previews": ("GraftPreviewOptions", (400, 320)),
    "Noise": ("GraftObjectiveOptions", (400, 700)),
    "Train": ("GraftTrainLoRA", (850, 0)),
    "Save": ("GraftSaveAdapter", (1350, 0)),
}
LINKS = [
    ("Checkpoint", 0, "Train", "model"),
    ("Checkpoint", 1, "Train", "clip"),
    ("Checkpoint", 2, "Train", "vae"),
    ("Photos", 0, "Train", "dataset"),
    ("Run", 0, "Previews", "options"),
    ("Previews", 0, "Noise", "options"),
    ("Noise", 0, "Train", "options"),
    ("Train", 2, "Save", "adapter"),
]
VALUES = {
    "Checkpoint": {"ckpt_name": CHECKPOINT},
    "Photos": {"resolution": 64},
    "Train": {"learning_rate": 2e-3, "rank": 4, "batch_size": 1},
    "Previews": {"prompts": "a large sks toy", "steps": 2},
    "Save": {"filename_prefix": "panel"},
}

# The node of each value that a test sets by its name alone.
PLACES = {
    "steps": "Train",
    "seed": "Train",
    "batch_size": "Train",
    "name": "Run",
    "save_every": "Run",
    "validation_fraction": "Run",
    "validate_every": "Run",
    "keep_best": "Run",
    "stop_when": "Run",
    "patience": "Run",
    "every": "Previews",
    "prompts": "Previews",
    "min_timestep": "Noise",
    "max_timestep": "Noise",
}


def draw_graph(page, folder):
    """Draw the graph in an empty page; return the workflow as saving gives it."""
    page.load(EMPTY)
    ids = dict(zip(NODES, page.add_nodes([(kind, *place) for kind, place in NODES.values()]), strict=True))
    for source, slot, target, name in LINKS:
        page.connect(ids[source], slot, ids[target], name)
    filled = {**VALUES, "Photos": {**VALUES["Photos"], "folder": folder}}
    page.set_widgets([(ids[title], name, value) for title, values in filled.items() for name, value in values.items()])
    return page.serialize()


def set_values(page, **fields):
    """Set widgets of the graph in the page, by the names in PLACES."""
    nodes = {node["type"]: node["id"] for node in page.list_nodes()}
    page.set_widgets([(nodes[NODES[PLACES[name]][0]], name, value) for name, value in fields.items()])


def look_at(page, scale=1.0):
    """Move the trainer to the middle of the page, so that its panel is mounted."""
    page.js("""
        const isTrainer = node => node.widgets?.some(widget => widget.name === 'graft_panel');
        const node = app.canvas.graph.nodes.find(isTrainer);
        app.canvas.ds.scale = args[0];
        app.canvas.centerOnNode(node);
        app.canvas.setDirty(true, true);""", scale)  # fmt: skip
    page.wait_for("return document.querySelector('.graft-panel')?.offsetHeight > 0;")


class PanelView:
    """The only panel that the page shows."""

    def __init__(self, page):
        self.page = page

    def phase(self):
        return self.page.js("return document.querySelector('.graft-panel').dataset.phase;")

    def text(self, selector):
        return self.page.js("return document.querySelector(`.graft-panel ${args[0]}`).textContent;", selector)

    def label(self, selector):
        return self.page.js("return document.querySelector(`.graft-panel ${args[0]}`).ariaLabel;", selector)

    def count(self):
        return self.text(".graft-count")

    def announced(self):
        return self.text("[role=status]")

    def gives_way(self):
        """Return the switch's state and tooltip, None while it is hidden."""
        return self.page.js("""
            const way = document.querySelector('.graft-panel .graft-way');
            return way.checkVisibility() ? [way.ariaPressed === 'true', way.title] : null;""")

    def buttons(self):
        """Return the names of the visible buttons below the pictures."""
        return self.page.js("""
            return [...document.querySelectorAll('.graft-panel .graft-buttons button')]
                .filter(button => button.checkVisibility()).map(button => button.textContent);""")

    def facts(self):
        """Return the figures as {name: text}."""
        return self.page.js("""
            return Object.fromEntries([...document.querySelectorAll('.graft-panel dl > div')].map(
                fact => [fact.dataset.name, fact.querySelector('dd').textContent]));""")

    def pictures(self):
        """Return the captions of the loaded sample pictures."""
        self.page.wait_for("""
            const images = [...document.querySelectorAll('.graft-panel .graft-thumb img')];
            const { samples } = document.querySelector('.graft-panel').graftTraining;
            return images.length === samples.size && images.every(image => image.naturalWidth > 0);""")
        return self.page.js("""
            return [...document.querySelectorAll('.graft-panel .graft-thumb')].map(thumb => thumb.textContent);""")

    def has_host_preview(self):
        """Report whether the host shows its own preview picture in the trainer."""
        return self.page.js("""
            const whole = document.querySelector('.lg-node:has(.graft-panel)');
            const images = [...(whole?.querySelectorAll('img') ?? [])];
            const trainer = app.graph.nodes.find(node => node.type === 'GraftTrainLoRA');
            return images.some(image => !image.closest('.graft-panel') && image.checkVisibility())
                || trainer.widgets.some(widget => widget.name.startsWith('$$'));""")

    def is_drawn(self):
        """Report whether the chart contains the color of its smoothed line."""
        return self.page.js("""
            const canvas = document.querySelector('.graft-panel canvas');
            const swatch = document.querySelector('.graft-panel [data-line=smooth]');
            const probe = document.createElement('canvas').getContext('2d');
            probe.fillStyle = getComputedStyle(swatch).backgroundColor;
            probe.fillRect(0, 0, 1, 1);
            const wanted = probe.getImageData(0, 0, 1, 1).data;
            const seen = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            let found = 0;
            for (let place = 0; place < seen.length; place += 4) {
                if ([0, 1, 2].every(part => Math.abs(seen[place + part] - wanted[part]) < 3)) found += 1;
            }
            return found > 50;""")

    def wait_until_drawn(self, timeout=10):
        """Wait until the chart has the theme's colors: the page changes its theme slowly, and the chart follows."""
        deadline = time.monotonic() + timeout
        while not self.is_drawn():
            assert time.monotonic() < deadline, "the chart is not in the theme's colors"
            time.sleep(0.1)

    def list_cramped(self):
        """Return the elements that are cut off, cover their neighbor or stick out of the panel or the node."""
        return self.page.js("""
            const panel = document.querySelector('.graft-panel');
            const seen = [...panel.children].filter(
                part => part.checkVisibility() && !part.classList.contains('graft-live'));
            const boxes = seen.map(part => [part.className, part.getBoundingClientRect()]);
            const found = [];
            boxes.forEach(([name, {bottom}], place) => {
                const next = boxes[place + 1];
                if (next && bottom > next[1].top + 0.5) found.push(`${name} lies over ${next[0]}`);
            });
            const around = panel.getBoundingClientRect();
            for (const [name, box] of boxes) {
                const inside = box.left >= around.left && box.right <= around.right && box.top >= around.top
                    && box.bottom <= around.bottom;
                if (!inside) found.push(`${name} sticks out`);
            }
            const node = panel.closest('.lg-node')?.getBoundingClientRect();
            if (node && (around.bottom > node.bottom || around.right > node.right)) found.push('the panel sticks out');
            const texts = '.graft-state, .graft-count, dt, dd, button, .graft-saved, .graft-hint';
            for (const text of panel.querySelectorAll(texts)) {
                if (text.checkVisibility() && text.scrollWidth > text.clientWidth + 1 && text.clientWidth)
                    found.push(`cut off: ${text.textContent}`);
            }
            return found;""")

    def state(self):
        """Return the page's state of the training that it shows."""
        return self.page.js("""
            const training = document.querySelector('.graft-panel').graftTraining;
            return {run: training.run, step: training.step, steps: training.steps, points: training.curve.steps,
                    validation: training.curve.validation};""")  # fmt: skip

    def points(self):
        """Return the steps in the chart."""
        return self.state()["points"]

    def wait_for_past(self):
        """Wait until the chart begins with the first step: live messages may arrive before the log of past steps."""
        self.page.wait_for("return document.querySelector('.graft-panel').graftTraining.curve.steps[0] === 1;", 20)

    def wait(self, phase, timeout=120):
        """Wait until the panel shows a phase; raise an error with the phase it shows instead."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.phase()
            if found == phase:
                return
            assert found != "failed" or phase == "failed", self.text(".graft-note")
            time.sleep(0.1)
        raise TimeoutError(f"the panel is at {found}, not at {phase}: {self.text('.graft-state')}")

    def wait_for_step(self, step, timeout=120):
        """Wait until the panel shows so many steps; return the number that it shows."""
        return self.page.wait_for(
            f"""
            const training = document.querySelector('.graft-panel')?.graftTraining;
            return training?.step >= {step} && training.step;""",
            timeout,
        )

    def wait_for_text(self, selector, text, timeout=90):
        """Wait until a part of the panel shows a text."""
        self.page.wait_for(
            f"return document.querySelector('.graft-panel {selector}')?.textContent.includes({json.dumps(text)});",
            timeout,
        )

    def press(self, name):
        """Press a button as a mouse does."""
        for button in self.page.driver.find_elements("css selector", ".graft-panel .graft-buttons button"):
            if button.text == name:
                button.click()
                return
        raise AssertionError(f"no button {name}: {self.buttons()}")

    def where(self):
        """Return the origin fields of a message from this node's training."""
        return self.page.js("""
            const node = app.graph.nodes.find(node => node.type === 'GraftTrainLoRA');
            return {node: String(node.id), workflow: app.graph.id, prompt_id: 'made-up'};""")

    def simulate(self, event, **fields):
        """Make the page believe that the server sent a message."""
        message = {**self.where(), "event": event, **fields}
        self.page.js("api.dispatchCustomEvent('graft.progress', args[0]);", message)
