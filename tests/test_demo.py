"""Test of `make demo` after its downloads, with two training steps on the shared server."""

import io

import pytest
from PIL import Image

from tests import demo


def test_progress_is_one_line_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    line = demo.Line(stream)
    line.show("first", 0.1)
    line.show("second", 0.2)
    line.end()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 2


def test_progress_elsewhere_is_a_line_for_each_tenth():
    stream = io.StringIO()
    line = demo.Line(stream)
    for step in range(1, 101):
        line.show(*demo.describe_step("Train", {"step": step, "steps": 100, "loss": 0.5, "seconds": 0.1}, step / 10))
    assert len(stream.getvalue().splitlines()) == 11
    assert "100/100" in stream.getvalue()


@pytest.mark.server
def test_demo_leaves_a_picture_and_a_lora(server, tmp_path):
    stream = io.StringIO()
    demo.copy_pictures(server)
    few = {title: {**demo.TINY[title], "steps": 2} for title in ("Train", "Sample before", "Sample after")}
    workflow, entry = demo.run(server, demo.Line(stream), few)
    assert "2/2" in stream.getvalue()
    assert demo.find_lora(workflow, entry).is_file()
    picture = Image.open(demo.draw_comparison(server, workflow, entry, tmp_path / "picture.png"))
    assert picture.width > demo.PICTURES * 64 * demo.SCALE


def test_a_failure_is_one_readable_message(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    message = demo.main(tmp_path / "demo")
    assert message.startswith("error: ")
    assert "COMFYUI_PATH" in message
