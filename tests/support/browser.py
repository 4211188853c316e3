"""A real headless Chromium, driven by its own driver, on the real ComfyUI frontend.

browser = Browser(folder)
page = browser.open(server.url)
page.load(workflow)
prompt_id = page.queue()
"""

import importlib.resources
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
DRIVER = ("chromedriver",)

# Set before the page opens: no template browser and no release notes over the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "99.0.0",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Locale": "en",
    "Comfy.VueNodes.Enabled": False,
}

# A workflow without nodes.
EMPTY = {"version": 0.4, "nodes": [], "links": [], "last_node_id": 0, "last_link_id": 0}

# Frontend banners marked as seen and closed.
DISMISSED = ["vueNodesBannerDismissed", "comfy.vueNodesMigration.dismissed"]

# Console errors of the unmodified frontend on a private, offline server.
NOISE = [
    r"favicon|user\.css|/api/userdata",
    r"https://(api\.comfy\.org|huggingface\.co)/",
    r"ComfyApp graph accessed before initialization",
    # The page asks before it is left, but nobody has clicked in it yet.
    r"Blocked attempt to show a 'beforeunload' confirmation panel",
    r"Attempted to cleanup event listeners for graph that was never set up",
    r"reading 'id'\)\s+at onChange[\s\S]*GraphView",
]

# Run the body as an async function in the page and return its value as JSON.
SCRIPT = """
    const done = arguments[arguments.length - 1];
    const run = async (args, app, api) => {
        BODY
    };
    run(Array.from(arguments).slice(0, -1), window.app, window.app?.api ?? window.comfyAPI?.api?.api).then(
        value => done({value: JSON.stringify(value ?? null)}),
        error => done({error: String(error?.stack ?? error)}));"""

# Luminance and contrast by WCAG 2.1; disabled elements are exempt.
CONTRAST = """
    const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const paint = (...colors) => {
        pen.clearRect(0, 0, 1, 1);
        for (const color of colors) {
            pen.fillStyle = color;
            pen.fillRect(0, 0, 1, 1);
        }
        return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const groundOf = element => {
        const found = [];
        for (let one = element; one; one = one.parentElement) {
            found.unshift(getComputedStyle(one).backgroundColor);
            if (paint(found[0])[3] === 255) break;
        }
        return found;
    };
    const luminance = color => {
        const parts = color.slice(0, 3).map(part => part / 255);
        const [red, green, blue] = parts.map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const contrast = element => {
        const {fill, color} = getComputedStyle(element);
        const ground = groundOf(element);
        const text = paint(...ground, element instanceof SVGElement ? fill : color);
        const [low, high] = [text, paint(...ground)].map(luminance).sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const isText = element => [...element.childNodes].some(one => one.nodeType === 3 && one.data.trim());
    const shown = [...document.querySelectorAll(`${args[0]} *`)].filter(
        element => isText(element) && element.checkVisibility() && !element.closest(':disabled'));
    if (!shown.length) throw new Error(`no text in ${args[0]}`);
    return shown.filter(element => contrast(element) < 4.5).map(
        element => `${element.textContent.trim()}: ${contrast(element).toFixed(1)}`);"""

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-default-browser-check",
    "--mute-audio",
    "--hide-scrollbars",
    # The page can reach the loopback interface only.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


class BrowserError(RuntimeError):
    """The browser is missing, or the page did not reach the requested state."""


class Browser:
    """One Chromium with a private profile below folder; `open` returns a Page."""

    def __init__(self, folder, width=1600, height=1000):
        options = Options()
        options.binary_location = find_program(CHROMIUM, "GRAFT_CHROMIUM", "chromium")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in [*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={Path(folder).resolve()}"]:
            options.add_argument(flag)
        service = Service(find_program(DRIVER, "GRAFT_CHROMEDRIVER", "chromium-driver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(120)
        self.driver.set_page_load_timeout(120)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def open(self, url, settings=None, timeout=120):
        """Open ComfyUI's page with these settings and wait until its graph is usable."""
        page = Page(self.driver, url)
        page.prepare({**SETTINGS, **(settings or {})})
        page.open(timeout)
        return page

    def leave(self):
        """Leave the page."""
        self.driver.get("about:blank")

    def close(self):
        self.driver.quit()


class Page:
    """The frontend in the browser. Values cross as JSON; `js` may use `app`, `api` and `await`."""

    def __init__(self, driver, url):
        self.driver = driver
        self.url = url
        self.errors = []

    def open(self, timeout=120):
        """Load or reload the page, and wait until its graph has usable nodes."""
        self.driver.get(self.url)
        self.wait_for("""
            return Boolean(window.app?.extensionManager?.workflow?.activeWorkflow && app.graph.nodes.length
                           && window.LiteGraph?.registered_node_types?.KSampler);""", timeout)  # fmt: skip
        return self

    def prepare(self, settings):
        """Clear the logs and browser storage of earlier pages, and store settings on the server."""
        self.driver.get_log("browser")
        self.driver.get(f"{self.url}/system_stats")
        self.js("""
            localStorage.clear();
            sessionStorage.clear();
            for (const key of args[1]) localStorage.setItem(key, 'true');
            const body = JSON.stringify(args[0]);
            const headers = {'Content-Type': 'application/json'};
            const answer = await fetch('/api/settings', {method: 'POST', headers, body});
            if (!answer.ok) throw new Error(`settings not stored: ${answer.status}`);""",
            settings, DISMISSED)  # fmt: skip

    # Scripts

    def js(self, body, *args):
        """Run the body of an async function with `app`, `api` and `args`, and return its result."""
        script = SCRIPT.replace("BODY", body)
        answer = self.driver.execute_async_script(script, *args)
        if "error" in answer:
            raise BrowserError(answer["error"])
        return json.loads(answer["value"])

    def wait_for(self, body, timeout=30):
        """Run a script, as `js` does, until it returns a true value; return that value."""
        deadline = time.monotonic() + timeout
        problem = None
        while time.monotonic() < deadline:
            try:
                found = self.js(body)
            except (JavascriptException, BrowserError) as error:
                # The page may still be loading.
                problem, found = error, None
            if found:
                return found
            time.sleep(0.1)
        raise BrowserError(f"not so after {timeout} s: {body}\n{problem or ''}\nconsole: {self.read_errors()}")

    # The graph

    def load(self, workflow):
        """Load a UI-format workflow, as opening its file does."""
        self.js("await app.loadGraphData(args[0]);", workflow)
        self.wait_for("return app.graph.nodes.length > 0" if workflow.get("nodes") else "return true")
        return self

    def load_file(self, path):
        return self.load(json.loads(Path(path).read_text(encoding="utf-8")))

    def serialize(self):
        """Return the graph in the UI format, as saving does."""
        return self.js("return app.graph.serialize();")

    def to_prompt(self):
        """Return the graph in the API format, as queueing sends it."""
        return self.js("return (await app.graphToPrompt()).output;")

    def queue(self):
        """Press Run and return the id of the accepted prompt."""
        script = """
            const original = api.queuePrompt;
            let answer = null;
            api.queuePrompt = async function (...given) {
                answer = await original.apply(this, given);
                return answer;
            };
            try { await app.queuePrompt(0, 1); } finally { api.queuePrompt = original; }
            return {answer, refusal: app.lastNodeErrors};"""
        result = self.js(script)
        if not (result["answer"] or {}).get("prompt_id"):
            raise BrowserError(f"the prompt was not queued: {result['refusal']}")
        return result["answer"]["prompt_id"]

    def list_nodes(self):
        """Return the graph's nodes in order: [{id, type, title, mode, widgets: {name: value}, inputs, outputs}]."""
        return self.js("""
            return app.graph.nodes.map(node => ({
                id: node.id, type: node.type, title: node.title, mode: node.mode,
                widgets: Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value ?? null])),
                inputs: (node.inputs ?? []).map(input => ({name: input.name, type: input.type, link: input.link})),
                outputs: (node.outputs ?? []).map(output => ({name: output.name, type: output.type})),
            }));""")

    def add_node(self, type, x=100, y=100):
        """Add a node and return its id."""
        return self.add_nodes([(type, x, y)])[0]

    def add_nodes(self, rows):
        """Add nodes, given as (type, x, y), and return their ids. One call: the page then draws its nodes once."""
        return self.js("""
            return args[0].map(([type, x, y]) => {
                const node = LiteGraph.createNode(type);
                if (!node) throw new Error(`no node type ${type}`);
                node.pos = [x, y];
                app.graph.add(node);
                return node.id;
            });""", rows)  # fmt: skip

    def connect(self, source, slot, target, name):
        """Link an output, given by its index, with an input, given by its name."""
        self.js("""
            const [source, slot, target, name] = args;
            const node = app.graph.getNodeById(target);
            const place = node.inputs.findIndex(input => input.name === name);
            if (place < 0) throw new Error(`node ${target} has no input ${name}`);
            const link = app.graph.getNodeById(source).connect(slot, node, place);
            if (!link) throw new Error(`node ${source} does not connect to ${name} of node ${target}`);""",
            source, slot, target, name)  # fmt: skip

    def set_widget(self, node, widget, value):
        """Set a widget's value as a user does, with its callback."""
        self.set_widgets([(node, widget, value)])

    def set_widgets(self, rows):
        """Set widgets, given as (node, widget, value), in order. One call: the page then draws its nodes once."""
        self.js("""
            for (const [id, name, value] of args[0]) {
                const node = app.graph.getNodeById(id);
                const widget = node?.widgets?.find(widget => widget.name === name);
                if (!widget) throw new Error(`node ${id} has no widget ${name}`);
                widget.value = value;
                widget.callback?.(value, app.canvas, node);
            }""", rows)  # fmt: skip

    def set_setting(self, name, value):
        """Change a setting in the open page, such as Comfy.VueNodes.Enabled."""
        self.js("await app.extensionManager.setting.set(args[0], args[1]);", name, value)

    def get_setting(self, name):
        return self.js("return app.extensionManager.setting.get(args[0]);", name)

    def fit(self):
        """Zoom until the whole graph is visible, and wait for the end of the zoom, however slowly the page draws."""
        self.js("""
            await app.extensionManager.command.execute('Comfy.Canvas.FitView');
            const {ds} = app.canvas;
            const place = () => [ds.scale, ...ds.offset].join();
            let last = '';
            for (let still = 0; still < 20; still = place() === last ? still + 1 : 0) {
                last = place();
                await new Promise(requestAnimationFrame);
            }""")

    # Output

    def shoot(self):
        """Return a screenshot of the page, RGB."""
        return Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")

    def measure_heap(self):
        """Return the bytes that the page's scripts hold after garbage collection."""
        for _ in range(3):
            self.driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        return self.driver.execute_cdp_cmd("Runtime.getHeapUsage", {})["usedSize"]

    def measure_work(self):
        """Return the page's counts of layouts and of style calculations so far, and the seconds of its main thread."""
        self.driver.execute_cdp_cmd("Performance.enable", {})
        rows = {
            row["name"]: row["value"] for row in self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        }
        return rows["LayoutCount"], rows["RecalcStyleCount"], rows["TaskDuration"]

    def read_text(self):
        """Return the text that the page shows, toasts and dialogs included."""
        return self.driver.execute_script("return document.body.innerText")

    def list_violations(self, selector):
        """Return axe's findings of serious or critical impact in a part of the page: [(rule, elements)]."""
        if not self.js("return typeof axe === 'object';"):
            source = importlib.resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
            self.driver.execute_script(source)
        return self.js("""
            const found = await axe.run(args[0]);
            return found.violations.filter(one => ['serious', 'critical'].includes(one.impact))
                .map(one => [one.id, one.nodes.map(node => `${node.html} ${node.failureSummary}`)]);""",
            selector)  # fmt: skip

    def list_faint(self, selector):
        """Return texts in a part of the page with less contrast than WCAG 2.1 requires (1.4.3): [text and contrast].

        axe does not check colors mixed in the style sheet, nor elements over the graph.
        """
        return self.js(CONTRAST, selector)

    def read_errors(self, ignore=NOISE):
        """Return console errors and uncaught exceptions so far, without those that an ignored pattern matches."""
        self.errors += [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in self.errors if not any(re.search(pattern, message) for pattern in ignore)]


def find_program(names, variable, package):
    """Return the path of the first installed program, or of the program that an environment variable names."""
    named = os.environ.get(variable)
    for name in [named] if named else names:
        path = shutil.which(name)
        if path:
            return path
    raise BrowserError(f"no {names[0]} found: install Debian's package {package} or set {variable} to the program")
