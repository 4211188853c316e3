"""Tests of an adapter file that a training starts from, as the nodes train."""

import pytest
import torch

from tests.support.diffusers_host import make_dataset
from tests.toy import host as toy


def train(graph, name, rank, subject=None, **options):
    from graft_pack.nodes.host.actions import dreambooth
    from graft_pack.nodes.host.actions.train import TrainInputs
    from graft_pack.nodes.host.actions.train import train as run
    from graft_pack.trainers.engine.resolve import Options

    chosen = Options({("run", "name"): name, **{("adapter", key): value for key, value in options.items()}})
    with torch.inference_mode():
        rest = TrainInputs("LoRA", 1, 1e-12, rank, 1, 0), chosen, "7"
        if subject is not None:
            return dreambooth.train(*graph, make_dataset(2), subject, *rest)
        return run(*graph, make_dataset(2), *rest)


@pytest.mark.parametrize("is_dreambooth", [False, True], ids=["LoRA", "DreamBooth"])
def test_a_file_to_start_from_is_read_once(is_dreambooth, comfy, tiny_base, monkeypatch, tmp_path):
    """Also with rank 0, which takes the file's ranks before anything else is known."""
    from graft_pack.nodes.host import paths
    from graft_pack.nodes.host.actions.dreambooth import Subject
    from graft_pack.trainers.formats import files
    from graft_pack.trainers.formats.adapter import save_adapter
    from graft_pack.trainers.formats.kohya import ranks_of

    with torch.inference_mode():
        graph = toy.load(tiny_base, comfy.path)
    path = str(tmp_path / "first.safetensors")
    save_adapter(path, train(graph, "first", 3).adapter, "first")
    monkeypatch.setattr(paths, "adapter_path", lambda name: path)
    read, real = [], files.read_tensors
    monkeypatch.setattr(files, "read_tensors", lambda given, *more: read.append(given) or real(given, *more))
    subject = Subject("sks circle", "circle", 0, 0.0, "class images") if is_dreambooth else None
    for rank in (0, 3):
        read.clear()
        name = f"second-{'dreambooth' if is_dreambooth else 'lora'}-{rank}"
        done = train(graph, name, rank, subject, start_from="first.safetensors")
        assert read.count(path) == 1
        assert ranks_of(done.adapter)["rank"] == 3
