"""Tests of the real server: it runs prompts, reports faults, and restarts after a crash."""

import io

import pytest
from PIL import Image

from tests.support.server import PromptError, PromptRefused, ServerError

pytestmark = pytest.mark.server


def make_prompt(width=16):
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": width, "height": 16, "batch_size": 2, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "support/blue"}},
    }


def test_runs_a_prompt(server):
    with server.listen() as events:
        prompt_id = server.queue(make_prompt(), client_id=events.client_id)
        entry = server.wait(prompt_id)
        types = [event.type for event in events.follow(prompt_id)]
    pictures = [Image.open(io.BytesIO(data)) for data in server.download(entry, node="2")]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(0, 0, 255)] * 2
    assert types[-1] == "execution_success"
    assert "executing" in types


def test_has_the_core_nodes_the_pack_and_the_tiny_base(server, tiny_base):
    info = server.object_info()
    assert {"KSampler", "CheckpointLoaderSimple", "LoraLoader", "GraftTrainLoRA"} <= set(info)
    assert tiny_base.name in info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]


def test_a_refused_prompt_names_the_node(server):
    prompt = make_prompt(width="wide")
    with pytest.raises(PromptRefused, match="EmptyImage.*width") as caught:
        server.queue(prompt)
    assert set(caught.value.node_errors) == {"1"}


def test_a_failing_prompt_names_the_node(server):
    server.path("models", "checkpoints", "broken.safetensors").write_bytes(b"nothing of the kind")
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "broken.safetensors"}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    with pytest.raises(PromptError, match="CheckpointLoaderSimple") as caught:
        server.run(prompt)
    assert caught.value.error["node_id"] == "1"


def test_comes_back_after_a_crash(server):
    server.run(make_prompt())
    url = server.url
    server.kill()
    with pytest.raises(ServerError, match="not running"):
        server.queue(make_prompt())
    server.start()
    assert server.url == url
    assert server.path("output", "support", "blue_00001_.png").exists()


def test_a_failed_start_shows_the_log(make_server):
    server = make_server(pack=None, arguments=["--no-such-flag"])
    with pytest.raises(ServerError, match="no-such-flag"):
        server.start()
