"""Tests of the way from a folder to the model's batches, through filled caches."""

import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.examples import Augmentation, combine
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.engine.session import run_recipe
from graft_pack.trainers.errors import DatasetError, SettingsError
from graft_pack.trainers.preprocessing.prefetch import LRUCache
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.protocols import HOLE, SOURCE
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.steps import step as forward
from graft_pack.trainers.steps.plan import Plan
from PIL import Image

from tests.support import models, odd_files
from tests.support.diffusers_host import PosteriorCodec, WordEncoder, make_dataset, make_host, run_session
from tests.support.host import ROOT


class Counting(WordEncoder):
    """A text encoder that records the captions it encoded; another `name` makes it a different encoder."""

    def __init__(self, name="words"):
        self.name = name
        self.captions = []

    def encode(self, caption):
        self.captions.append(caption)
        return super().encode(caption)

    def fingerprint(self):
        return self.name


class Seeing(PosteriorCodec):
    """A codec that records the pixels it encoded."""

    def __init__(self, seed=5):
        super().__init__(seed)
        self.seen = []

    def encode(self, pixels):
        self.seen.append(pixels[0].numpy())
        return super().encode(pixels)


def made(folder, dataset, seed=5, text="words", **fields):
    """Return (Prepared, host, number of encoded pictures, encoded captions) with caches in a folder."""
    host = replace(make_host(), codec=Seeing(seed), text=Counting(text))
    recipe = models.recipe("SD1", **{"batch_size": 1, "steps": 20, "resolution": dataset.resolution, **fields})
    prepared = prepare(dataset, recipe, host, Folders("", str(folder), "", ""))
    return prepared, host, len(host.codec.seen), sorted(host.text.captions)


def grain(number, size=(64, 64)):
    return np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Create eight pictures with tags, two of them wide."""
    root = tmp_path / "d"
    root.mkdir()
    for number in range(8):
        Image.fromarray(grain(number, (96, 48) if number > 5 else (64, 64))).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"thing {number}, red, big, old, wooden")
    return root


def read(folder, resolution=64, trigger="sks", reading=None, **handling):
    return scan_folder(str(folder), trigger, resolution, 1, Augmentation(**handling), reading)


def batches(prepared, host, steps, **fields):
    """Return the model's inputs in so many steps of a run: rows of (latent, conditioning, weight)."""
    recipe = models.recipe("SD1", **{"batch_size": 1, "steps": steps, **fields})
    items = {"train": prepared.training, "validation": prepared.validation}
    plan = Plan(recipe=recipe, **items, trainables={}, export=dict)
    drawn = plan.batches(0)
    rows = []
    for step in range(steps):
        _, batch = next(drawn)
        for part in forward.micro_batches(plan.samples(batch), recipe, host, forward.BatchRows(step)):
            rows += [(part.x0[place], one.conditioning, one.weight) for place, one in enumerate(part.samples)]
    return rows


@pytest.fixture
def told():
    """Return a function from captions to {their conditioning's bytes: caption}, to read the model's inputs back."""
    return lambda captions: {WordEncoder().encode(text)["cross_attn"].numpy().tobytes(): text for text in captions}


def read_captions(rows, known):
    return [known[one.tensors["cross_attn"].numpy().tobytes()] for _, one, _ in rows]


@pytest.mark.parametrize(
    "change, pictures, texts",
    [
        (lambda root: None, 0, []),
        (lambda root: (root / "3.txt").write_text("new"), 0, ["sks, new"]),
        (lambda root: Image.fromarray(grain(99)).save(root / "3.png"), 1, []),
        (lambda root: Image.fromarray(grain(3)).save(root / "3.png", compress_level=0), 1, []),
        (lambda root: (root / "3.png").rename(root / "moved.png"), 0, ["sks"]),
        (lambda root: (root / "3.png").unlink(), 0, []),
        (lambda root: Image.fromarray(grain(50)).save(root / "added.png"), 1, ["sks"]),
        (lambda root: os.utime(root / "3.png", (1, 1)), 0, []),
    ],
    ids=["nothing", "caption", "picture", "other bytes", "renamed", "removed", "added", "touched"],
)
def test_a_change_to_a_file_makes_just_its_entry_again(folder, tmp_path, change, pictures, texts):
    assert made(tmp_path / "cache", read(folder))[2] == 8
    change(folder)
    assert made(tmp_path / "cache", read(folder))[2:] == (pictures, texts)


@pytest.mark.parametrize(
    "other, pictures, texts",
    [
        ({"resolution": 48}, 8, 0),
        ({"trigger": "other"}, 0, 8),
        ({"seed": 6}, 8, 0),
        ({"text": "another"}, 0, 8),
        ({"flip": True}, 8, 0),
        ({"resolutions": (48,)}, 8, 0),
        ({"caption_dropout": 0.5}, 0, 1),
        ({"upscale": True}, 0, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_change_of_setting_makes_just_what_it_touches_again(folder, tmp_path, other, pictures, texts):
    made(tmp_path / "cache", read(folder))
    rest = {name: other[name] for name in ("seed", "text") if name in other}
    own = {name: value for name, value in other.items() if name not in rest}
    _, _, encoded, captions = made(tmp_path / "cache", read(folder, **own), **rest)
    assert (encoded, len(captions)) == (pictures, texts)
    assert made(tmp_path / "cache", read(folder))[2:] == (0, []), "what was there before is still there"


def test_other_runs_share_the_entries(folder, tmp_path):
    ways = {"shuffle_tags": True, "tag_dropout": 0.2, "caption_variants": 3}
    made(tmp_path / "cache", read(folder, **ways), steps=100)
    assert made(tmp_path / "cache", read(folder, **ways), steps=100)[2:] == (0, [])
    # Another seed visits the same variants in another order.
    other = models.recipe("SD1", seed=9, steps=100, batch_size=1)
    host = replace(make_host(), codec=Seeing(), text=Counting())
    prepare(read(folder, **ways), other, host, Folders("", str(tmp_path / "cache"), "", ""))
    assert (host.codec.seen, host.text.captions) == ([], [])


def test_after_the_first_epoch_neither_codec_nor_encoder_is_called(folder, tmp_path):
    ways = {"shuffle_tags": True, "tag_dropout": 0.3, "caption_dropout": 0.2, "flip": True, "wildcards": True}
    prepared, host, pictures, _ = made(tmp_path / "cache", read(folder, **ways), steps=80)
    captions = list(host.text.captions)
    batches(prepared, host, 80)
    assert pictures == len(host.codec.seen) == 16
    assert host.text.captions == captions


def test_what_training_holds_does_not_grow_with_the_pictures(tmp_path, monkeypatch):
    """Live tensors after two visits of each picture: ten times the pictures need no more than the budget."""
    budget = 20_000
    monkeypatch.setattr("graft_pack.trainers.preprocessing.samples.LRUCache", lambda: LRUCache(budget))

    def held(count):
        pictures = [grain(number) for number in range(count)]
        dataset = from_arrays(pictures, [f"picture {number}" for number in range(count)], "", 64)
        prepared, *_ = made(tmp_path / str(count), dataset, steps=2 * count)
        before = alive()
        for item in prepared.training * 2:
            item.show(0)
        return alive() - before

    few, many = held(12), held(120)
    assert 0 < few <= many <= budget + 5_000, (few, many)


def alive():
    """Return the bytes of all live tensors."""
    gc.collect()
    return sum(one.nbytes for one in gc.get_objects() if type(one) is torch.Tensor)


def test_everything_still_varies_when_everything_is_cached(folder, tmp_path, told):
    """Checked on the model's inputs: 60 epochs of a second run that encodes nothing."""
    epochs = 60
    ways = {"shuffle_tags": True, "keep_tokens": 1, "tag_dropout": 0.25, "caption_dropout": 0.2, "flip": True}
    for number in (0, 3):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :16] = 255
        Image.fromarray(mask).save(folder / f"{number}-masklabel.png")
    first = made(tmp_path / "cache", read(folder, **ways), steps=8 * epochs)
    known = told(first[3])
    prepared, host, pictures, captions = made(tmp_path / "cache", read(folder, **ways), steps=8 * epochs)
    assert (pictures, captions) == (0, [])
    rows = batches(prepared, host, 8 * epochs)
    total = len(rows)
    assert total == 8 * epochs

    texts = read_captions(rows, known)
    spread = 6 * math.sqrt(total * 0.2 * 0.8)
    assert abs(texts.count("") - 0.2 * total) <= spread
    shown = [text.split(", ") for text in texts if text]
    assert all(tags[0] == "sks" and tags[1].startswith("thing") for tags in shown)
    chances = 3 * 0 + 4 * len(shown)
    dropped = chances - sum(len(tags) - 2 for tags in shown)
    # Few variants repeat, so their number bounds the deviation, not the number of visits.
    assert abs(dropped / chances - 0.25) <= 6 * math.sqrt(0.25 * 0.75 / (4 * len(set(texts))))
    orders = {tuple(tags[2:]) for tags in shown}
    assert len(orders) > 30
    by_thing = Counter((tags[1], tuple(tags[2:])) for tags in shown)
    assert max(by_thing.values()) < epochs / 2, "no picture sticks to one version"

    # The mask shows a flip: its white side is the left one.
    masked = [weight for _, _, weight in rows if weight is not None]
    assert len(masked) == 2 * epochs
    left = sum(float(weight[..., 0].mean()) == 1.0 and float(weight[..., -1].mean()) == 0.0 for weight in masked)
    right = sum(float(weight[..., 0].mean()) == 0.0 and float(weight[..., -1].mean()) == 1.0 for weight in masked)
    assert left + right == len(masked)
    assert abs(left - right) <= 12 * math.sqrt(len(masked) / 4)

    latents = {row[0].numpy().tobytes() for row in rows}
    assert len(latents) == total, "each showing has its own sample of the posterior"


@pytest.mark.parametrize("takes", ["", SOURCE, HOLE])
def test_what_is_encoded_is_counted_up_to_its_total_and_not_beyond(tmp_path, takes):
    pictures = [grain(number) for number in range(3)]
    beside = [grain(number) for number in range(10, 13)] if takes == SOURCE else []
    dataset = from_arrays(pictures, ["one", "two", "three"], "", 64, source_images=beside)
    told = []
    host = replace(make_host(lambda event, payload: event == "cache" and told.append(payload)), codec=PosteriorCodec())
    host.denoiser.conditioning_kind = takes
    prepare(dataset, models.recipe("SD1"), host, Folders("", str(tmp_path), "", ""))
    assert [one["done"] for one in told] == list(range(1, len(told) + 1))
    assert all(one["done"] <= one["total"] for one in told) and told[-1]["done"] == told[-1]["total"]


def test_samples_are_those_of_the_posterior(folder, tmp_path):
    prepared, host, _, _ = made(tmp_path / "cache", read(folder))
    item = prepared.training[0]
    with torch.no_grad():
        mean, logvar = PosteriorCodec().encode(torch.from_numpy(grain(0).astype(np.float32) / 255)[None])
    scale = float(host.denoiser.scale_latents(torch.ones(1, 1, 1, 1)))
    draws = torch.cat([item.show(turn).latent for turn in range(800)]) / scale
    error = (draws.mean(0) - mean[0]).abs() / (torch.exp(0.5 * logvar[0]) / math.sqrt(800))
    assert float(error.max()) < 6
    assert torch.allclose(draws.std(0), torch.exp(0.5 * logvar[0]), rtol=0.2)
    assert torch.allclose(item.show(None).latent / scale, mean, atol=1e-5), "without a turn it is the mean"
    assert torch.equal(item.show(3).latent, item.show(3).latent)


def test_a_codec_without_a_posterior_says_so(tmp_path):
    found = run_session(tmp_path / "mean")
    assert "mean alone" in (tmp_path / "mean" / "runs" / found.run.name / "recipe.json").read_text()
    host = replace(make_host(), codec=PosteriorCodec())
    found = run_session(tmp_path / "both", host=host)
    assert "log-variance" in (tmp_path / "both" / "runs" / found.run.name / "recipe.json").read_text()


def test_a_varied_run_that_was_stopped_goes_on_to_the_same_bits(folder, tmp_path):
    class Stop(Exception):
        pass

    def report(event, payload):
        if event == "step" and payload["step"] == 7:
            raise Stop

    ways = {"shuffle_tags": True, "tag_dropout": 0.3, "caption_dropout": 0.2, "flip": True}

    def session(name, report=lambda event, payload: None):
        host = replace(make_host(report), codec=PosteriorCodec())
        return run_session(tmp_path / name, host=host, dataset=read(folder, **ways), steps=12, batch_size=3)

    straight = session("straight")
    with pytest.raises(Stop):
        session("stopped", report)
    resumed = session("stopped")
    assert resumed.resumed_from == 7
    assert resumed.losses == straight.losses
    assert all(torch.equal(resumed.adapter[key], straight.adapter[key]) for key in straight.adapter)


def test_size_and_crop_are_those_of_each_picture(tmp_path):
    """SDXL's conditioning: the picture's own size, the crop's place in the scaled picture, and the crop's size."""
    sizes = [(200, 100), (101, 77), (64, 64)]
    dataset = from_arrays(
        [grain(n, size) for n, size in enumerate(sizes)], ["x"], "", 64, handling=Augmentation(flip=True)
    )
    prepared, *_ = made(tmp_path, dataset)
    for item, size in zip(prepared.training, sizes, strict=True):
        seen = {}
        for turn in range(40):
            one = item.show(turn).conditioning
            assert (one.original_size, one.target_size) == (size, item.bucket)
            seen[one.crop] = seen.get(one.crop, 0) + 1
        plain = item.show(None).conditioning.crop
        factor = max(item.bucket[0] / size[0], item.bucket[1] / size[1])
        mirrored = (max(item.bucket[0], round(size[0] * factor)) - item.bucket[0] - plain[0], plain[1])
        assert set(seen) == {plain, mirrored}


def test_a_mirrored_picture_is_encoded_mirrored(tmp_path):
    dataset = from_arrays([grain(1)], ["x"], "", 64, handling=Augmentation(flip=True))
    _, host, count, _ = made(tmp_path, dataset)
    assert count == 2
    assert np.allclose(host.codec.seen[0], host.codec.seen[1][:, ::-1], atol=1e-6)


def test_each_resolution_that_is_reached_has_its_bucket_and_none_is_enlarged(tmp_path):
    sizes = [(128, 128), (70, 70), (40, 40)]
    pictures = [grain(n, size) for n, size in enumerate(sizes)]
    dataset = from_arrays(pictures, ["x"], "", 64, handling=Augmentation(resolutions=(128, 32)))
    prepared, *_ = made(tmp_path / "a", dataset)
    buckets = {}
    for item in prepared.training:
        buckets.setdefault(item.name, []).append(item.bucket)
    assert buckets == {
        "image 1": [(32, 32), (64, 64), (128, 128)],
        "image 2": [(32, 32), (64, 64)],
        "image 3": [(32, 32)],
    }
    enlarging = Augmentation(resolutions=(128,), upscale=True)
    prepared, *_ = made(tmp_path / "b", from_arrays(pictures, ["x"], "", 64, handling=enlarging))
    assert Counter(item.bucket for item in prepared.training) == {(64, 64): 3, (128, 128): 3}


def test_no_small_bucket_is_dropped_and_repeats_balance(tmp_path):
    sizes = [(64, 64)] * 5 + [(96, 48)] + [(48, 96)]
    dataset = from_arrays([grain(n, size) for n, size in enumerate(sizes)], ["x"], "", 64)
    examples = [replace(one, repeats=1 + place % 3) for place, one in enumerate(dataset.examples)]
    prepared, *_ = made(tmp_path, replace(dataset, examples=tuple(examples)), batch_size=4)
    recipe = models.recipe("SD1", batch_size=4)
    plan = Plan(recipe=recipe, train=prepared.training, trainables={}, export=dict)
    shown = Counter()
    for epoch, batch in plan.batches(0):
        if epoch == 5:
            break
        shown.update(prepared.training[index].name for index, _ in batch)
    assert shown == {f"image {place + 1}": 5 * (1 + place % 3) for place in range(7)}


def test_masks_weigh_with_their_minimum_and_are_cut_like_the_picture(tmp_path):
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 255
    pictures = [grain(1, (200, 100))]
    for minimum in (0.0, 0.25):
        dataset = from_arrays(pictures, ["x"], "", 64, [mask], Augmentation(mask_minimum=minimum))
        prepared, *_ = made(tmp_path / str(minimum), dataset)
        (item,) = prepared.training
        weight = item.show(0).weight[0, 0]
        assert tuple(weight.shape) == (item.bucket[1] // 8, item.bucket[0] // 8)
        half = weight.shape[1] // 2
        assert torch.allclose(weight[:, : half - 1], torch.full_like(weight[:, : half - 1], minimum))
        assert torch.allclose(weight[:, half + 1 :], torch.ones_like(weight[:, half + 1 :]))


def test_a_mask_that_leaves_nothing_is_named(tmp_path):
    masks = [np.zeros((64, 64), np.uint8), np.full((64, 64), 255, np.uint8)]
    dataset = from_arrays([grain(1), grain(2)], ["x"], "", 64, masks)
    prepared, *_ = made(tmp_path / "a", dataset)
    assert [item.name for item in prepared.training] == ["image 2"]
    assert "mask excludes the whole crop" in str(prepared.left_out)
    lifted = from_arrays([grain(1), grain(2)], ["x"], "", 64, masks, Augmentation(mask_minimum=0.1))
    assert len(made(tmp_path / "b", lifted)[0].training) == 2


def test_validation_is_a_folder_a_share_or_both(folder, tmp_path):
    (folder / "check").mkdir()
    for number in (6, 7):
        (folder / f"{number}.png").rename(folder / "check" / f"{number}.png")
    marked = read(
        folder, reading=ScanOptions(validation_folder="check"), flip=True, shuffle_tags=True, caption_dropout=0.5
    )
    prepared, host, _, _ = made(tmp_path / "a", marked)
    assert [item.name for item in prepared.validation] == ["check/6.png", "check/7.png"]
    assert len(prepared.training) == 6
    both, *_ = made(tmp_path / "b", marked, validation_fraction=0.5)
    assert (len(both.training), len(both.validation)) == (3, 5)
    combined, *_ = made(tmp_path / "c", combine(marked, make_dataset(3)))
    assert (len(combined.training), len(combined.validation)) == (9, 2)
    first, again = (forward.fixed_losses(prepared.validation, models.recipe("SD1"), host) for _ in range(2))
    assert torch.equal(first, again), "nothing varies there"
    with pytest.raises(SettingsError, match="leaves none"):
        made(tmp_path / "d", make_dataset(1), validation_fraction=0.5)


def test_two_hundred_odd_files_train_right_or_are_named(tmp_path):
    root, outside = tmp_path / "odd", tmp_path / "outside"
    for path in (root, outside):
        path.mkdir()
    expected = odd_files.make(str(root), str(outside))
    assert len(expected) == 200
    opened = []
    sys.addaudithook(lambda event, given: opened.append(given[0]) if event == "open" else None)
    dataset = scan_folder(str(root), "sks", 0, 1, None, None, str(tmp_path / "index"))
    prepared, host, _, _ = made(tmp_path / "cache", dataset, resolution=96)
    assert not [path for path in opened if isinstance(path, str) and path.startswith(str(outside))]

    trained = {item.name for item in prepared.training}
    named = {row.name: row.reason for row in prepared.left_out}
    assert trained | set(named) == set(expected)
    assert not trained & set(named)
    shown = iter(host.codec.seen)
    by_name = {}
    for example in dataset.examples:
        if example.source.name in trained and example.digest not in by_name:
            by_name[example.digest] = next(shown)
    wrong = []
    for name, odd in expected.items():
        if odd.picture is None:
            if name not in named or odd.reason not in named[name]:
                wrong.append((name, named.get(name)))
            continue
        if name in named:
            wrong.append((name, named[name]))
            continue
        example = next(one for one in dataset.examples if one.source.name == name)
        seen = by_name[example.digest] * 255
        if seen.shape != odd.picture.shape or np.abs(seen - odd.picture).mean() > odd.tolerance + 1e-3:
            wrong.append((name, seen.shape, float(np.abs(seen - odd.picture).mean())))
    assert not wrong, wrong


def test_odd_files_train_and_are_named_in_one_report(tmp_path):
    root, outside = tmp_path / "odd", tmp_path / "outside"
    for path in (root, outside):
        path.mkdir()
    expected = odd_files.make(str(root), str(outside))
    dataset = scan_folder(str(root), "sks", 96, 1)
    result = run_session(tmp_path / "run", dataset=dataset, steps=3, resolution=96)
    assert all(math.isfinite(loss) for loss in result.losses)
    assert {row.name for row in result.left_out} == {name for name, odd in expected.items() if odd.picture is None}


def test_pictures_that_are_all_too_small_are_refused_by_name(tmp_path):
    with pytest.raises(DatasetError, match=r"Graft cannot train on any of the 2 pictures.*image 1.*too small"):
        made(tmp_path, from_arrays([grain(1, (4, 4)), grain(2, (300, 5))], ["x"], "", 64))


FILL = """
import sys, time
sys.path.insert(0, {root!r})
from tests.support import pack
pack.hide_root(); pack.load_pack()
from tests.support.diffusers_host import PosteriorCodec, make_host
from tests.support import models
from dataclasses import replace
from graft_pack.trainers.data.scan import scan_folder
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.runs.folders import Folders

class Slow(PosteriorCodec):
    def encode(self, pixels):
        time.sleep(0.02)
        return super().encode(pixels)

def report(event, payload):
    if event == "cache":
        print("tick", payload["name"], flush=True)

host = replace(make_host(report), codec=Slow())
prepare(scan_folder({folder!r}, "sks", 64, 1), models.recipe("SD1", steps=1), host, Folders("", {cache!r}, "", ""))
print("done", flush=True)
"""


def fill(folder, cache, kill_after=None):
    """Encode in another process, kill it with -9 after so many names, and return the names."""
    code = FILL.format(root=str(ROOT), folder=str(folder), cache=str(cache))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    names = []
    for line in process.stdout:
        if line.startswith("tick"):
            names.append(line.split()[1])
        if kill_after is not None and len(names) == kill_after:
            time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
    return [name for name in names if name.endswith(".png")]


@pytest.mark.soak
def test_a_kill_while_caching_costs_little_and_leaves_nothing_wrong(tmp_path, trials):
    root = tmp_path / "d"
    root.mkdir()
    for number in range(96):
        Image.fromarray(grain(number)).save(root / f"{number:03}.png")
    for place in trials([70], list(range(5, 96, 6))):
        cache = tmp_path / f"cache-{place}"
        first = fill(root, cache, kill_after=place)
        second = fill(root, cache)
        assert len(first) == place
        lost = set(first) & set(second)
        assert len(lost) <= 33, "at most the shard that was not yet full"
        assert set(first) | set(second) == {path.name for path in root.glob("*.png")}
        dataset = scan_folder(str(root), "sks", 64, 1)
        prepared, _, encoded, _ = made(cache, dataset)
        assert encoded == 0
        fresh, *_ = made(tmp_path / f"fresh-{place}", dataset)
        for one, other in zip(prepared.training, fresh.training, strict=True):
            assert torch.equal(one.show(None).latent, other.show(None).latent)


def test_a_finished_run_needs_no_pictures_at_all(folder, tmp_path):
    folders = Folders(str(tmp_path / "runs"), str(tmp_path / "cache"), str(tmp_path / "loras"), str(tmp_path / "emb"))
    recipe = models.recipe("SD1", steps=2)
    dataset = read(folder)
    run_recipe(recipe, dataset, make_host(), folders)
    for path in folder.iterdir():
        path.unlink()
    assert run_recipe(recipe, dataset, make_host(), folders).resumed_from == 2
