"""`make demo`: train a LoRA inside a real ComfyUI on the tiny base, and show its effect.

The workflow is the one that users open; only its values fit the tiny base. Everything lies below demo/. A second run
reuses it, the finished training included.
"""

import contextlib
import io
import shutil
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from docs.build.make_workflows import TINY
from tests.support.base import get_tiny_base
from tests.support.host import ROOT, HostError, find_comfyui
from tests.support.pack import hide_root
from tests.support.server import ComfyServer, PromptError, ServerError, link
from tests.support.workflow import WorkflowError, find_nodes, read_workflow, to_prompt

FOLDER = ROOT / "demo"
WORKFLOW = ROOT / "example_workflows" / "Train a LoRA.json"
CONCEPTS = ROOT / "tests" / "toy" / "concepts"
CONCEPT = TINY["Photos"]["folder"]
PICTURES = 4
SCALE = 3


class Line:
    """One terminal line that is overwritten; without a terminal, a line per tenth of the work."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.shown = None

    def show(self, text, done=None):
        """Show text; `done` is the finished fraction, if known."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r" + text[:width].ljust(width))
        elif done is None or self._is_new(done):
            self.stream.write(text + "\n")
        self.stream.flush()

    def end(self):
        """Keep the shown text and go to the next line."""
        self.shown = None
        if self.live:
            self.stream.write("\n")
            self.stream.flush()

    def _is_new(self, done):
        tenth = int(done * 10)
        if tenth == self.shown:
            return False
        self.shown = tenth
        return True


def prepare(folder, line):
    """Prepare a ComfyUI base directory with the pack, the tiny base and the pictures; return the stopped server."""
    line.show("Getting ComfyUI ...")
    comfy = find_comfyui()
    line.show("Assembling the tiny base ...")
    base = get_tiny_base()
    server = ComfyServer(folder / "comfyui", comfy=comfy)
    link(base, server.path("models", "checkpoints", base.name))
    copy_pictures(server)
    return server


def copy_pictures(server):
    """Copy the concept's pictures and captions below the server's input folder."""
    shutil.copytree(CONCEPTS / CONCEPT, server.path("input", CONCEPT), dirs_exist_ok=True)


def run(server, line, overrides=None):
    """Queue the example on the server and follow it; return (workflow, history entry)."""
    workflow = read_workflow(WORKFLOW)
    values = {**TINY, "Size and number": {**TINY["Size and number"], "batch_size": PICTURES}, **(overrides or {})}
    prompt = to_prompt(workflow, server.object_info(), values)
    with server.listen() as events:
        prompt_id = server.queue(prompt, client_id=events.client_id)
        with contextlib.suppress(ConnectionError):
            # If the server dies, wait() reports it and shows its log.
            follow(events, prompt_id, prompt, line)
    return workflow, server.wait(prompt_id)


def follow(events, prompt_id, prompt, line):
    """Show the progress of a prompt until it ends."""
    titles = {node: entry["_meta"]["title"] for node, entry in prompt.items()}
    started = time.monotonic()
    for event in events.follow(prompt_id, timeout=3600):
        if event.type == "graft.progress" and event.data.get("event") == "step":
            line.show(*describe_step(titles[event.data["node"]], event.data, time.monotonic() - started))
        elif event.type == "executing" and event.data.get("node") in titles:
            line.show(f"{titles[event.data['node']]} ...")
            started = time.monotonic()
    line.end()


def describe_step(title, step, seconds):
    """Return (text, finished fraction) for one training step."""
    done = step["step"] / step["steps"]
    left = int(step["seconds"] * (step["steps"] - step["step"]))
    bar = ("#" * int(done * 24)).ljust(24, ".")
    text = f"{title} [{bar}] {step['step']}/{step['steps']}  loss {step['loss']:.4f}"
    return f"{text}  {int(seconds)} s, {left} s to go", done


def draw_comparison(server, workflow, entry, path):
    """Write a PNG with three rows: the training pictures, then the same prompt and seeds before and after training."""
    shown = [Image.open(picture) for picture in sorted((CONCEPTS / CONCEPT).glob("*.png"))[:PICTURES]]
    rows = [("what it was shown", shown)]
    for title in ("Before", "After"):
        node = find_nodes(workflow, title)[0]
        pictures = [Image.open(io.BytesIO(data)) for data in server.download(entry, str(node["id"]))]
        rows.append((f"{title.lower()}: {TINY['Prompt']['value']}", pictures))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_rows(rows).save(path)
    return path


def draw_rows(rows, gap=8, head=26):
    """Draw [(label, pictures)] as one picture, enlarged without smoothing."""
    width, height = (side * SCALE for side in rows[0][1][0].size)
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + len(rows) * (head + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for row, (label, pictures) in enumerate(rows):
        top = gap + row * (head + height + gap)
        draw.text((gap, top), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            large = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (gap + column * (width + gap), top + head))
    return sheet


def find_lora(workflow, entry):
    """Return the path of the file that the save node reports."""
    node = find_nodes(workflow, "GraftSaveAdapter")[0]
    return Path(entry["outputs"][str(node["id"])]["text"][0])


def main(folder=FOLDER):
    hide_root()
    line = Line()
    started = time.monotonic()
    try:
        server = prepare(folder, line)
        line.show("Starting ComfyUI ...")
        with server:
            line.show(f"ComfyUI runs at {server.url}")
            line.end()
            workflow, entry = run(server, line)
            picture = draw_comparison(server, workflow, entry, folder / "before_after.png")
    except (HostError, ServerError, PromptError, WorkflowError, OSError) as error:
        line.end()
        return f"error: {error}"
    print(f"picture: {picture}")
    print(f"LoRA:    {find_lora(workflow, entry)}")
    print(f"log:     {server.log}")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
