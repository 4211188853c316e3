"""Tests of an adapter file that a training starts from, as the nodes train."""

import torch

from tests.support.diffusers_host import make_dataset
from tests.toy import host as toy


def train(graph, name, rank, **options):
    from graft_pack.nodes.host.actions.train import TrainInputs
    from graft_pack.nodes.host.actions.train import train as run
    from graft_pack.trainers.engine.resolve import Options

    chosen = Options({("run", "name"): name, **{("adapter", key): value for key, value in options.items()}})
    with torch.inference_mode():
        return run(*graph, make_dataset(2), TrainInputs("LoRA", 1, 1e-12, rank, 1, 0), chosen, "7")


def test_a_file_to_start_from_is_read_once(comfy, tiny_base, monkeypatch, tmp_path):
    """Also with rank 0, which takes the file's ranks before anything else is known."""
    from graft_pack.nodes.host import paths
    from graft_pack.trainers.formats import files
    from graft_pack.trainers.formats.adapter import save_adapter
    from graft_pack.trainers.formats.network import ranks_of

    with torch.inference_mode():
        graph = toy.load(tiny_base, comfy.path)
    path = str(tmp_path / "first.safetensors")
    save_adapter(path, train(graph, "first", 3).adapter, "first")
    monkeypatch.setattr(paths, "adapter_path", lambda name: path)
    read, real = [], files.read_tensors
    monkeypatch.setattr(files, "read_tensors", lambda given, *more: read.append(given) or real(given, *more))
    for rank in (0, 3):
        read.clear()
        done = train(graph, f"second-{rank}", rank, start_from="first.safetensors")
        assert read.count(path) == 1
        assert ranks_of(done.adapter)["rank"] == 3
