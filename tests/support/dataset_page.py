"""The dataset page in tests: its dialog, its tiles, and files dropped on a node by a real drag of the browser."""

from __future__ import annotations

import json
import time

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

# Find an enabled button of the topmost dialog by its text or its label.
BUTTON = """
    const find = label => [...[...document.querySelectorAll('dialog[open]')].at(-1)?.querySelectorAll('button') ?? []]
        .find(button => [button.textContent.trim(), button.ariaLabel].includes(label)
            && button.checkVisibility() && !button.disabled);"""


def drop_files(page, node, paths):
    """Drag files or folders from outside onto a node and drop them, as a hand does."""
    x, y = page.js("""
        const {pos, size} = app.graph.getNodeById(args[0]);
        const [x, y] = app.canvas.ds.convertOffsetToCanvas([pos[0] + size[0] / 2, pos[1] + size[1] / 3]);
        const {left, top} = app.canvas.canvas.getBoundingClientRect();
        return [x + left, y + top];""", node)  # fmt: skip
    drag(page, x, y, paths)


def drag(page, x, y, paths):
    """Drop files at a point of the window."""
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": x, "y": y, "data": data}
        page.driver.execute_cdp_cmd("Input.dispatchDragEvent", event)
        time.sleep(0.1)


class DatasetView:
    """The open page of a dataset."""

    def __init__(self, page):
        self.page = page

    def open(self, folder, **values):
        """Add Graft Load Dataset to an empty graph, and open its page by the command; return this."""
        self.page.load({"version": 0.4, "nodes": [], "links": [], "last_node_id": 0, "last_link_id": 0})
        node = self.page.add_node("GraftLoadDataset")
        self.page.set_widgets([(node, name, value) for name, value in {"folder": folder, **values}.items()])
        self.page.js("await app.extensionManager.command.execute('Graft.OpenDataset');")
        self.wait_for_tiles()
        return self

    def wait_for_tiles(self):
        self.page.wait_for("return document.querySelectorAll('.graft-tile').length > 0;", 60)

    def close(self):
        """Close all dialogs, whatever is open."""
        self.page.js("for (const dialog of [...document.querySelectorAll('dialog[open]')].reverse()) dialog.close();")

    def names(self):
        """Return the names of the pictures in view, in order."""
        return self.page.js("return [...document.querySelectorAll('.graft-tile')].map(tile => tile.dataset.name);")

    def tile(self, name):
        """Return {caption, text, state, selected, excluded} of a picture in view."""
        return self.page.js("""
            const tile = [...document.querySelectorAll('.graft-tile')].find(tile => tile.dataset.name === args[0]);
            return {caption: tile.querySelector('textarea').value, text: tile.innerText, state: tile.dataset.state,
                    selected: tile.classList.contains('graft-selected'),
                    excluded: tile.classList.contains('graft-excluded')};""", name)  # fmt: skip

    def part(self, name, selector):
        """Return an element of a picture's tile."""
        for tile in self.page.driver.find_elements(By.CSS_SELECTOR, ".graft-tile"):
            if tile.get_attribute("data-name") == name:
                return tile.find_element(By.CSS_SELECTOR, selector)
        raise AssertionError(f"no tile {name}")

    def type(self, name, text):
        """Replace a picture's caption as a hand does.

        The driver's own `clear` sends no input event, so the page would put the old text back at its next update.
        """
        field = self.part(name, "textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def select(self, name):
        self.part(name, "input").click()

    def wait_for(self, name, condition, timeout=20):
        """Wait until a condition on a picture's tile holds, an expression of `tile`."""
        self.page.wait_for(f"""
            const tile = [...document.querySelectorAll('.graft-tile')].find(tile => tile.dataset.name === {name!r});
            return Boolean(tile && ({condition}));""", timeout)  # fmt: skip

    def wait_until_saved(self):
        self.page.wait_for("""
            return [...document.querySelectorAll('.graft-tile')].every(tile => tile.dataset.state === '');""")

    def press(self, label):
        """Press a button of a dialog by its text or its label, as a mouse does; the topmost dialog counts."""
        self.page.wait_for(f"{BUTTON} return find({json.dumps(label)}) !== undefined;")
        self.page.driver.execute_script(f"{BUTTON} return find(arguments[0]);", label).click()

    def chip(self, name):
        """Press a filter or a tag in the side bar."""
        self.page.wait_for(f"""
            const chips = [...document.querySelectorAll('.graft-chips button')];
            const chip = chips.find(chip => chip.title === {json.dumps(name)});
            chip?.click();
            return chip !== undefined;""")  # fmt: skip

    def sort_by(self, order):
        """Choose an order of the pictures."""
        self.page.js("""
            const order = document.querySelector('.graft-dataset select');
            order.value = args[0];
            order.dispatchEvent(new Event('change'));""", order)  # fmt: skip

    def fill(self, label, value):
        """Fill a field of the topmost dialog by its label; a select gets the option of that text."""
        self.page.js("""
            const dialog = [...document.querySelectorAll('dialog[open]')].at(-1);
            const [text, value] = args;
            const label = [...dialog.querySelectorAll('label')].find(label => label.firstChild.data === text);
            const field = label.querySelector('input, select, textarea');
            const option = [...field.options ?? []].find(option => option.text === value);
            field.value = option ? option.value : value;
            field.dispatchEvent(new Event('input', {bubbles: true}));""", label, value)  # fmt: skip

    def press_keys(self, *keys):
        """Press keys, given as in selenium, in the element with the focus; a tuple is a chord."""
        for key in keys:
            chain = ActionChains(self.page.driver)
            held = key[:-1] if isinstance(key, tuple) else ()
            for one in held:
                chain.key_down(one)
            chain.send_keys(key[-1] if held else key)
            for one in held:
                chain.key_up(one)
            chain.perform()

    def focused(self):
        """Return (name of the tile with the focus, tag of the element with the focus)."""
        return tuple(
            self.page.js("""
            const element = document.activeElement;
            return [element.closest('.graft-tile')?.dataset.name ?? '', element.tagName.toLowerCase()];""")
        )

    def redone(self, act):
        """Wait until an act is the next one to redo."""
        self.page.wait_for(f"return Boolean(document.querySelector('.graft-dataset [aria-label^=\"Redo: {act}\"]'));")

    def crop(self):
        """Return (left, width) of the open picture's crop, in fractions of its width."""
        return tuple(
            self.page.js("""
            const crop = document.querySelector('.graft-crop').getBoundingClientRect();
            const frame = document.querySelector('.graft-frame').getBoundingClientRect();
            return [(crop.left - frame.left) / frame.width, crop.width / frame.width];""")
        )

    def open_mask(self, name):
        """Open a picture, and its mask in the editor."""
        self.press(f"Picture: {name}")
        self.press("Edit the mask")
        self.page.wait_for("return document.querySelector('.graft-mask-sheet img')?.naturalWidth > 0;")

    def save_mask(self, label="Save the mask"):
        """Save or remove the mask, and close the picture."""
        self.press(label)
        self.page.wait_for("return !document.querySelector('.graft-mask-editor');")
        self.press("Close")

    def paint(self, *points):
        """Draw a stroke over the open mask editor, through points in fractions of the picture."""
        canvas = self.page.driver.find_element(By.CSS_SELECTOR, ".graft-mask-sheet canvas")
        width, height = canvas.size["width"], canvas.size["height"]
        places = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in points]
        chain = ActionChains(self.page.driver).move_to_element_with_offset(canvas, *places[0]).click_and_hold()
        for place in places[1:]:
            chain = chain.move_to_element_with_offset(canvas, *place)
        chain.release().perform()
