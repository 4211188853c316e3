"""The history of runs in tests: the sidebar tab, the comparison, and the host's toasts and dialogs."""

from __future__ import annotations

from selenium.webdriver.common.by import By


class HistoryView:
    """The sidebar tab in a page."""

    def __init__(self, page):
        self.page = page

    def open(self):
        """Open the tab by its command and wait until it has read the runs."""
        self.page.js("await app.extensionManager.command.execute('Graft.OpenHistory');")
        self.page.wait_for("""
            return Boolean(document.querySelector('.graft-card, .graft-empty:not(:empty)'));""")
        return self

    def close(self):
        self.page.js("app.extensionManager.sidebarTab.activeSidebarTabId = null;")

    def refresh(self):
        self.press("Refresh")

    def names(self):
        return self.page.js("return [...document.querySelectorAll('.graft-card')].map(card => card.dataset.run);")

    def queue(self):
        """Return the lines of the queue above the runs, its heading first; none while it is hidden."""
        return self.page.js("""
            const queue = document.querySelector('.graft-queue');
            return queue.checkVisibility() ? queue.innerText.split(String.fromCharCode(10)).filter(Boolean) : [];""")

    def card(self, name):
        """Return {status, text, picture: True if loaded, open, remove: True if enabled}."""
        return self.page.js("""
            const card = document.querySelector(`.graft-card[data-run="${args[0]}"]`);
            const icon = name => card.querySelector(`.graft-icon:has(.pi-${name})`);
            const [open, remove] = [icon('folder-open'), icon('trash')];
            return {status: card.dataset.status, text: card.innerText, open: !open.disabled, remove: !remove.disabled,
                    picture: card.querySelector('img')?.naturalWidth > 0, curve: !!card.querySelector('polyline')};""",
            name)  # fmt: skip

    def wait_for_card(self, name, condition, timeout=60):
        """Wait until a condition on a card holds, an expression of `card`."""
        return self.page.wait_for(f"""
            const card = document.querySelector('.graft-card[data-run="{name}"]');
            return Boolean({condition});""", timeout)  # fmt: skip

    def press(self, label):
        """Press a button by its label, as a mouse does."""
        for button in self.page.driver.find_elements(
            By.CSS_SELECTOR, ":is(.graft-history, .graft-comparison, .graft-viewer) button"
        ):
            if label in (button.get_attribute("aria-label"), button.text) and button.is_displayed():
                button.click()
                return
        raise AssertionError(f"no button {label}")

    def choose(self, name):
        """Tick a run."""
        self.page.driver.find_element(By.CSS_SELECTOR, f'.graft-card[data-run="{name}"] input').click()

    def search(self, text):
        field = self.page.driver.find_element(By.CSS_SELECTOR, ".graft-search input")
        field.clear()
        field.send_keys(text or " \ue003")

    # The comparison

    def recipes(self):
        """Return {setting: texts of the runs} as the comparison shows them."""
        return self.page.js("""
            return Object.fromEntries([...document.querySelectorAll('.graft-recipes tbody tr')].map(row =>
                [row.cells[0].textContent, [...row.cells].slice(1).map(cell => cell.textContent)]));""")

    def comparison(self):
        """Return {legend: texts of its rows, curves: points of each, steps, pictures: number loaded, by run}."""
        self.page.wait_for("""
            const parts = [...document.querySelectorAll('.graft-samples img, .graft-curves')];
            return parts.some(part => part.matches('svg')) && parts.every(part => part.naturalWidth !== 0);""")
        return self.page.js("""
            const dialog = document.querySelector('.graft-comparison');
            const texts = selector => [...dialog.querySelectorAll(selector)].map(part => part.textContent);
            const lines = [...dialog.querySelectorAll('polyline')];
            return {legend: texts('table:not([class]) tbody tr'),
                    curves: lines.map(line => line.getAttribute('points').split(' ').length),
                    dots: dialog.querySelectorAll('circle').length, label: dialog.querySelector('svg').ariaLabel,
                    steps: texts('.graft-samples thead th').slice(1),
                    pictures: [...dialog.querySelectorAll('.graft-samples tbody tr')].map(
                        row => row.querySelectorAll('img').length)};""")  # fmt: skip

    # Host dialogs and toasts

    def answer(self, label):
        """Press a button of the host's dialog."""
        script = f"""
            const dialogs = [...document.querySelectorAll('[role=dialog], .p-dialog')];
            const buttons = dialogs.flatMap(dialog => [...dialog.querySelectorAll('button')]);
            return buttons.find(button => button.textContent.trim() === '{label}' && button.checkVisibility());"""
        self.page.wait_for(f"return Boolean((() => {{ {script} }})());")
        self.page.driver.execute_script(script).click()

    def wait_for_toast(self, text, timeout=60):
        """Wait for a toast that contains a text, and close it."""
        self.page.wait_for(f"""
            const toast = [...document.querySelectorAll('.p-toast-message')].find(
                toast => toast.textContent.includes('{text}'));
            toast?.querySelector('button')?.click();
            return Boolean(toast);""", timeout)  # fmt: skip
