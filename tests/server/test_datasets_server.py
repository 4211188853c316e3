"""Tests of datasets in the real server: skipped files, allowed folders, core's own loaders, and variation."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support import graphs, models
from tests.support.server import PromptError, PromptRefused
from tests.support.videos import write_video
from tests.toy import world


@pytest.fixture
def folder(server, request):
    """Copy the concept's pictures into a fresh folder below input/, named like the test."""
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    path = server.path("input", name)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(world.CONCEPT_FOLDER / "toy", path)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def inspection(folder, clip=True, **widgets):
    """Return a prompt that inspects a folder; node 4 shows the result."""
    prompt = graphs.training(folder, 2)
    prompt["2"]["inputs"].update(widgets)
    del prompt["3"]
    prompt["4"] = graphs.node("GraftInspectDataset", dataset=["2", 0], model=["1", 0], vae=["1", 2])
    if clip:
        prompt["4"]["inputs"]["clip"] = ["1", 1]
    return prompt


def report_of(server, prompt):
    return server.run(prompt)["outputs"]["4"]["text"][0]


def test_what_is_left_out_is_named_by_inspection_and_by_training(server, tiny_base, folder):
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "04.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    Image.new("RGB", (3, 3)).save(folder / "tiny.png")
    text = server.run(graphs.training(folder.name, 2, trigger="sks"))["outputs"]["3"]["text"][0]
    report = report_of(server, inspection(folder.name, trigger="sks"))
    for name, reason in (("03.png", "picture format is unknown"), ("04.png", "UTF-8"), ("tiny.png", "too small")):
        for said in (text, report):
            assert name in said, said
            assert reason in said, said
    (run,) = server.path("output", "graft").glob(f"{folder.name}-*")
    assert len(json.loads((run / "recipe.json").read_text())["left_out"]) == 3


def test_files_of_every_kind_are_trained_on_or_named(server, tiny_base, folder):
    """A rotated TIFF, a transparent mask, captions by case-folded names, a 16-bit picture, and files of no dataset."""
    shutil.rmtree(folder)
    (folder / "202311_shoot").mkdir(parents=True)
    rng = np.random.RandomState(0)
    picture = Image.fromarray(rng.randint(0, 255, (64, 96, 3)).astype(np.uint8))
    picture.save(folder / "turned.tif", tiffinfo={274: 6})
    picture.save(folder / "IMG_1.PNG")
    (folder / "img_1.txt").write_text("a sks thing")
    picture.save(folder / "202311_shoot" / "a.jfif", format="JPEG")
    Image.fromarray(rng.randint(0, 65535, (64, 96)).astype(np.uint16)).save(folder / "deep.png")
    mask = np.full((64, 96, 4), 255, np.uint8)
    mask[:, 48:, 3] = 0
    Image.fromarray(mask).save(folder / "deep-masklabel.png")
    (folder / "gone.txt").write_text("nobody's")
    (folder / "a.arw").write_bytes(b"raw")
    text = server.run(graphs.training(folder.name, 2, trigger="sks"))["outputs"]["3"]["text"][0]
    report = report_of(server, inspection(folder.name, trigger="sks"))
    assert "4 pictures" in report
    buckets = [tuple(map(int, row)) for row in re.findall(r"bucket (\d+)x(\d+): (\d+)", report)]
    assert sum(count for width, height, count in buckets if width < height) == 1, "the TIFF stands"
    assert "without a caption of their own: deep.png, turned.tif" in report
    assert "202311 times" in report
    for said, begin in ((text, "Skipped files: "), (report, "2 left out: ")):
        assert begin in said
        assert "gone.txt: a caption without its picture" in said
        assert "a.arw: Graft cannot read this format" in said


def test_inspection_finds_what_there_is_to_find(server, tiny_base, folder):
    Image.open(folder / "00.png").save(folder / "copy.jpg", quality=90)
    rng = np.random.RandomState(0)
    Image.fromarray(rng.randint(0, 255, (60, 400, 3)).astype(np.uint8)).save(folder / "long.png")
    (folder / "long.txt").write_text("word, " * 90)
    (folder / "02.txt").write_text("word, square")
    Image.new("L", (64, 64), 0).save(folder / "01-masklabel.png")
    entry = server.run(inspection(folder.name, trigger="zzz", flip=True, shuffle_tags=True, keep_tokens=1))
    report = entry["outputs"]["4"]["text"][0]
    for words in (
        "copy.jpg like 00.png",
        "cropped by more than a fifth: long.png (loses",
        "more than 75 tokens (encoded in parts, not cut): long.png",
        "with a caption without the trigger (Graft puts it in front)",
        "1 with a mask",
        "without a caption of their own: copy.jpg",
        "tags shuffled, the first 1 kept, half mirrored",
        "Graft encodes up to ",
        " versions of a caption.",
        "word (2)",
        "MB; you can delete them at any time",
    ):
        assert words in report, report
    (picture,) = entry["outputs"]["4"]["images"]
    sheet = Image.open(io.BytesIO(server.view(**picture)))
    assert sheet.width >= 3 * 192
    again = report_of(server, inspection(folder.name, trigger="yyy"))
    assert "copy.jpg like 00.png" in again


def test_inspection_shows_how_well_a_run_learned_each_picture(server, tiny_base, folder):
    """From the trainer's wire, and by the run's name once it is on disk."""
    (folder / "03.txt").write_text("a large black ring on a white background")
    wired = graphs.training(folder.name, 30)
    wired["4"] = graphs.node("GraftInspectDataset", dataset=["2", 0], loss=["3", 3])
    (first,) = [line for line in report_of(server, wired).splitlines() if "hardest" in line]
    assert "means a wrong caption or an odd picture): 03.png (" in first
    (run,) = server.path("output", "graft").glob(f"{folder.name}-*")
    named = inspection(folder.name)
    named["4"]["inputs"]["run"] = run.name
    assert first in report_of(server, named)
    named["4"]["inputs"]["run"] = "../x"
    with pytest.raises(PromptRefused, match="There is no run '../x' in output/graft"):
        server.run(named)
    without = graphs.training(folder.name, 1)
    without["4"] = graphs.node("GraftInspectDataset", dataset=["2", 0], loss=["3", 3])
    with pytest.raises(PromptError, match="input 'loss': The connected loss has no loss by picture"):
        server.run(without)


def test_a_picture_may_have_none_one_or_two_source_pictures(server, tiny_base, folder):
    pictures = sorted(folder.glob("*.png"))
    for name, count in (("before", 3), ("second", 1)):
        (folder / name).mkdir()
        for path in pictures[:count]:
            shutil.copy(path, folder / name)
    controls = {"control_folder": "before", "control_folder_2": "second"}
    report = report_of(server, inspection(folder.name, sources_optional=True, **controls))
    assert f"3 of {len(pictures)} with a source picture" in report and "1 with several source pictures" in report
    assert "3 of 3 with a source picture" in report_of(server, inspection(folder.name, **controls))


def test_cores_own_dataset_loader_feeds_ours(server, tiny_base, folder):
    """It gives pictures and texts as lists; its N_name folders repeat."""
    if "LoadImageTextDataSetFromFolder" not in server.object_info():
        pytest.skip("this host has no such node")
    inner = folder / "2_more"
    inner.mkdir()
    shutil.move(folder / "00.png", inner)
    shutil.move(folder / "00.txt", inner)
    prompt = graphs.training(folder.name, 2)
    prompt["5"] = graphs.node("LoadImageTextDataSetFromFolder", folder=folder.name)
    prompt["2"] = graphs.node(
        "GraftDatasetFromImages", images=["5", 0], captions=["5", 1], trigger="", resolution=64, flip=True
    )
    prompt["4"] = graphs.node("GraftInspectDataset", dataset=["2", 0])
    entry = server.run(prompt)
    count = len(list(folder.glob("*.png")))
    assert f"{count + 2} pictures" in entry["outputs"]["4"]["text"][0]
    assert "half mirrored" in entry["outputs"]["4"]["text"][0]
    assert "2 steps trained" in entry["outputs"]["3"]["text"][0]


def test_prompts_that_the_graph_encodes_train(server, tiny_base, folder):
    """An encoder node gives a list for a list of texts; the run is found again and exported."""
    if "LoadImageTextDataSetFromFolder" not in server.object_info():
        pytest.skip("this host has no such node")
    prompt = graphs.training(folder.name, 2)
    prompt["5"] = graphs.node("LoadImageTextDataSetFromFolder", folder=folder.name)
    prompt["6"] = graphs.node("CLIPTextEncode", clip=["1", 1], text=["5", 1])
    fields = {"captions": "", "trigger": "", "resolution": 64}
    prompt["2"] = graphs.node("GraftDatasetFromImages", images=["5", 0], conditioning=["6", 0], **fields)
    prompt["4"] = graphs.node("GraftInspectDataset", dataset=["2", 0], clip=["1", 1])
    prompt["9"] = graphs.node("GraftExportJob", **{**prompt["3"]["inputs"], "train": "LoRA"})
    entry = server.run(prompt)
    assert "2 steps trained" in entry["outputs"]["3"]["text"][0]
    report = entry["outputs"]["4"]["text"][0]
    assert "caption of their own" not in report and "neither caption" not in report
    prompt["3"]["inputs"]["options"] = ["7", 0]
    prompt["7"] = graphs.options("GraftRunOptions", graphs.defaults_of(server.object_info()["GraftRunOptions"]))
    assert "returned without training" in server.run(prompt)["outputs"]["3"]["text"][0]
    prompt["8"] = graphs.node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["6", 0])
    prompt["2"]["inputs"]["conditioning"] = ["8", 0]
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    message = caught.value.error["exception_message"]
    assert "Graft Dataset from Images" in message and "'conditioning': A conditioning has 2 entries" in message


def test_combined_datasets_train_together(server, tiny_base, folder):
    """A folder and core's lists combined, each with its own trigger, repeats and augmentations."""
    if "LoadImageTextDataSetFromFolder" not in server.object_info():
        pytest.skip("this host has no such node")
    prompt = graphs.training(folder.name, 2, trigger="one")
    prompt["2"]["inputs"].update(repeats=3, shuffle_tags=True)
    prompt["5"] = graphs.node("LoadImageTextDataSetFromFolder", folder=folder.name)
    lists = {"images": ["5", 0], "captions": ["5", 1]}
    prompt["6"] = graphs.node("GraftDatasetFromImages", **lists, trigger="two", resolution=64, flip=True)
    prompt["7"] = graphs.node("GraftCombineDatasets", dataset_a=["2", 0], dataset_b=["6", 0])
    prompt["3"]["inputs"]["dataset"] = ["7", 0]
    prompt["4"] = graphs.node("GraftInspectDataset", dataset=["7", 0])
    entry = server.run(prompt)
    report = entry["outputs"]["4"]["text"][0]
    count = len(list(folder.glob("*.png")))
    for words in (
        f"{2 * count} pictures, {4 * count} in an epoch",
        f"Repeats: 1 (pictures: {count}), 3 (pictures: {count})",
        "Trigger: one, two",
        "Varied: tags shuffled.",
        "Varied: half mirrored.",
        f"{count} look like another picture",
    ):
        assert words in report, report
    assert "2 steps trained" in entry["outputs"]["3"]["text"][0]
    prompt["6"]["inputs"]["resolution"] = 128
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    message = caught.value.error["exception_message"]
    for words in ("Graft Combine Datasets", "'dataset_b'", "64 and 128", "the same resolution, or 0"):
        assert words in message


def test_variation_reaches_the_run_and_the_old_graph_stays_as_it_was(server, tiny_base, folder):
    """A graph saved before these inputs existed gives the same run as the default inputs."""
    old = graphs.training(folder.name, 2)
    assert set(old["2"]["inputs"]) == {"folder", "trigger", "resolution", "repeats"}
    server.run(old)
    new = graphs.training(folder.name, 2)
    defaults = graphs.defaults_of(server.object_info("GraftLoadDataset")["GraftLoadDataset"])
    new["2"]["inputs"] = {**defaults, **old["2"]["inputs"]}
    assert "returned without training" in server.run(new)["outputs"]["3"]["text"][0]
    varied = graphs.training(folder.name, 2)
    varied["2"]["inputs"].update(flip=True, caption_dropout=0.5, more_resolutions="48, 32")
    assert "returned without training" not in server.run(varied)["outputs"]["3"]["text"][0]
    assert len(list(server.path("output", "graft").glob(f"{folder.name}-*"))) == 2


@pytest.mark.parametrize(
    "widgets, refused, words",
    [
        ({"more_resolutions": "512, large"}, True, ["'more_resolutions'", "large", "512, 768"]),
        ({"validation_folder": "nosuch"}, False, ["'validation_folder'", "nosuch", "holds no picture"]),
    ],
)
def test_wrong_widgets_are_named(server, tiny_base, folder, widgets, refused, words):
    prompt = graphs.training(folder.name, 2)
    prompt["2"]["inputs"].update(widgets)
    with pytest.raises(PromptRefused if refused else PromptError) as caught:
        server.run(prompt)
    message = str(caught.value.node_errors["2"]) if refused else caught.value.error["exception_message"]
    assert all(word in message for word in ["Graft Load Dataset", *words]), message


def test_a_mask_folder_outside_is_refused_before_anything_runs(server, tiny_base, folder):
    prompt = graphs.training(folder.name, 2)
    prompt["2"]["inputs"]["mask_folder"] = "/etc"
    with pytest.raises(PromptRefused) as caught:
        server.queue(prompt)
    assert "'mask_folder'" in str(caught.value.node_errors["2"])


def choices(server):
    info = server.object_info("GraftLoadDataset")["GraftLoadDataset"]["input"]["required"]["folder"]
    return info[1]["options"] if info[0] == "COMBO" else info[0]


def test_a_folder_elsewhere_needs_the_users_leave(server, tiny_base, folder, tmp_path):
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for path in (allowed, other):
        shutil.copytree(folder, path / "toy pictures")
    (server.path("input") / "link").symlink_to(allowed / "toy pictures", target_is_directory=True)
    wanted = f"{allowed}/toy pictures"
    try:
        for before in (wanted, f"{other}/toy pictures", "link"):
            with pytest.raises(PromptRefused, match=".*") as caught:
                server.queue(graphs.training(before, 2))
            assert "allow it in ComfyUI's settings" in str(caught.value.node_errors["2"])
        assert wanted not in choices(server)
        server.post("/settings/Graft.DatasetRoots", f"{allowed}; relative/path; /; /no/such/folder")
        assert wanted in choices(server)
        assert not any(choice.startswith((str(other), "/etc")) for choice in choices(server))
        for now in (wanted, "link"):
            assert server.run(graphs.training(now, 2))["status"]["status_str"] == "success"
        for never in (f"{other}/toy pictures", f"{wanted}/../../other/toy pictures", "/etc"):
            with pytest.raises(PromptRefused):
                server.queue(graphs.training(never, 2))
    finally:
        server.post("/settings/Graft.DatasetRoots", "")
        (server.path("input") / "link").unlink()
    with pytest.raises(PromptRefused):
        server.queue(graphs.training(wanted, 2))


def test_a_datasets_entry_of_the_host_is_a_root(comfy, tmp_path, monkeypatch):
    """The folder that extra_model_paths.yaml calls 'datasets' appears under its folder's name."""
    import folder_paths
    from graft_pack.nodes.host import dataset_folders
    from graft_pack.trainers.errors import DatasetError

    root, outside = tmp_path / "collection", tmp_path / "outside"
    for inner in (root / "cats" / "2_old", root / "empty", outside):
        inner.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "cats" / "2_old" / "a.png")
    before = dataset_folders.dataset_choices()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "datasets", ([str(root)], set()))
    assert sorted(set(dataset_folders.dataset_choices()) - set(before)) == ["collection/cats", "collection/cats/2_old"]
    assert dataset_folders.dataset_path("collection/cats") == str((root / "cats").resolve())
    for elsewhere in ("collection/../outside", str(outside), "collection/cats/../../outside"):
        with pytest.raises(DatasetError, match="lies outside|There is no folder"):
            dataset_folders.dataset_path(elsewhere)
    (root / "link").symlink_to(outside, target_is_directory=True)
    with pytest.raises(DatasetError, match="a link that leads elsewhere does not count"):
        dataset_folders.dataset_path("collection/link")


def test_a_cache_beyond_its_limit_makes_room(server, tiny_base, folder):
    server.run(graphs.training(folder.name, 2))
    cache = server.path("output", "graft", "cache")
    before = set(cache.rglob("*.safetensors"))
    for path in folder.glob("*.png"):
        Image.open(path).rotate(90).save(path)
    server.post("/settings/Graft.CacheLimit", 0)
    try:
        server.run(graphs.training(folder.name, 2))
    finally:
        server.post("/settings/Graft.CacheLimit", 50)
    left = set(cache.rglob("*.safetensors"))
    assert left - before, "what this run made stays"
    assert not {path for path in before & left if path.parent.name == "latents"}, "what it did not use is gone"


@pytest.mark.parametrize("channels", [4, 16], ids=["SD1", "Flux"])
def test_the_posterior_is_the_vaes_own(comfy, channels):
    """Mean and log-variance equal the network's own outputs; a tiled encoding has none."""
    import torch
    from graft_pack.nodes.host.model.vae import ComfyCodec

    vae = models.kl_vae(channels)
    pixels = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(1))
    mean, logvar = ComfyCodec(vae).encode(pixels)
    assert torch.equal(mean, vae.encode(pixels))
    assert torch.isfinite(mean).all()
    inner = vae.first_stage_model
    with torch.no_grad():
        moments = inner.encoder(vae.process_input(pixels.movedim(-1, 1)))
        if hasattr(inner, "quant_conv"):
            moments = inner.quant_conv(moments)
    first, second = moments.chunk(2, 1)
    assert torch.allclose(mean, first, atol=1e-5)
    assert torch.allclose(logvar, second.clamp(-30, 20), atol=1e-5)
    assert not inner.regularization._forward_pre_hooks
    encode = vae.encode
    vae.encode = lambda given: torch.cat([encode(given[:, :32]), encode(given[:, 32:])], 2)
    assert ComfyCodec(vae).encode(pixels)[1] is None


def test_a_vaes_latents_are_known_by_its_weights_and_its_dtype(comfy):
    import torch
    from graft_pack.nodes.host.model.vae import ComfyCodec

    vae = models.kl_vae(4)
    first = ComfyCodec(vae).fingerprint()
    assert ComfyCodec(models.kl_vae(4)).fingerprint() == first
    vae.vae_dtype = torch.bfloat16
    assert ComfyCodec(vae).fingerprint() != first
    vae.vae_dtype = torch.float32
    with torch.no_grad():
        next(iter(vae.first_stage_model.parameters())).view(-1)[0] += 1
    assert ComfyCodec(vae).fingerprint() != first


def test_a_vae_without_a_posterior_gives_its_mean(comfy, tiny_base):
    import comfy.sd
    import torch
    from graft_pack.nodes.host.model.vae import ComfyCodec

    vae = comfy.sd.load_checkpoint_guess_config(str(tiny_base), output_vae=True, output_clip=False)[2]
    pixels = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(1))
    mean, logvar = ComfyCodec(vae).encode(pixels)
    assert torch.equal(mean, vae.encode(pixels))
    assert logvar is None


def test_clips_are_inspected_and_refused_by_a_model_of_stills(server, tiny_base, folder):
    write_video(folder / "walk.mp4", 12, size=(64, 64))
    (folder / "broken.mp4").write_bytes(b"no video")
    widgets = {"frames": 9, "frame_rate": 4.0, "clips": "whole", "trigger": "sks"}
    report = report_of(server, inspection(folder.name, **widgets))
    assert "1 clips of 6 to 6 frames." in report and "Frames per second of the files: 8 (1)." in report
    assert "1 clips that this VAE cannot encode: walk.mp4" in report
    assert "broken.mp4: cannot be read (it is damaged, or no video" in report
    prompt = graphs.training(folder.name, 2)
    prompt["2"]["inputs"].update(widgets)
    with pytest.raises(PromptError, match="The dataset has 1 clips, but this model"):
        server.run(prompt)
    # Without frames, the folder is one of stills as before.
    assert "walk.mp4: a video; " in report_of(server, inspection(folder.name, trigger="sks"))
