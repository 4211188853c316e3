"""Tests of clips: video files, animations, folders of frames; what is read of them, and what is refused."""

import gc
import json
import os
import random
import sys
import weakref

import numpy as np
import pytest
from graft_pack.trainers import video
from graft_pack.trainers.data import arrays, clips
from graft_pack.trainers.data.examples import Augmentation
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.errors import DatasetError
from PIL import Image

from tests.support.videos import number_of, shade, write_sound, write_video


def read(folder, frames=5, index=None, **options):
    return scan_folder(str(folder), "sks", 64, 1, None, ScanOptions(frames=frames, **options), index)


def one(folder, **options):
    dataset = read(folder, **options)
    assert not dataset.left_out
    (example,) = dataset.examples
    return example


def numbers(example, start=0, count=None, rate=None):
    clip = example.clip
    rate = clip.rate if rate is None else rate
    count = clip.count - start if count is None else count
    return [number_of(frame) for frame in example.source.frames(start, count, rate)]


def frames_of(count, size=(32, 24)):
    return [Image.fromarray(shade(number, size)) for number in range(count)]


def animate(path, count=7, **more):
    first, *rest = frames_of(count)
    first.save(path, save_all=True, append_images=rest, duration=100, **more)


KINDS = {
    "clip.mp4": {},
    "clip.m4v": {},
    "clip.mov": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none:crf=4"}},
    "clip.mkv": {"codec": "ffv1", "pix_fmt": "yuv444p"},
    "clip.webm": {"codec": "libvpx-vp9", "options": {"lossless": "1"}},
    "old.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "crf": "4", "b": "1M"}},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("start", [0, 5])
def test_each_format_gives_its_frames(tmp_path, name, start):
    write_video(tmp_path / name, 11, **KINDS[name])
    example = one(tmp_path)
    assert example.size == (32, 24) and example.clip.count == 11
    assert numbers(example, start) == list(range(start, 11))
    assert number_of(example.source.open()) == 0


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.apng"])
def test_animations_are_clips_and_stills_stay_stills(tmp_path, name):
    more = {"lossless": True} if name == "a.webp" else {"format": "PNG"} if name == "a.apng" else {}
    animate(tmp_path / name, **more)
    frames_of(1)[0].save(tmp_path / f"still{name[1:]}", **({"format": "PNG"} if name == "a.apng" else {}))
    moving, still = read(tmp_path).examples
    assert moving.clip.count == 7 and numbers(moving, 2) == [2, 3, 4, 5, 6]
    assert moving.clip.shown == 10.0
    assert still.clip is None


def test_a_folder_of_numbered_frames_with_a_caption_is_a_clip(tmp_path):
    walk = tmp_path / "walk.v2"
    walk.mkdir()
    for number, frame in enumerate(frames_of(12)):
        frame.save(walk / f"f{number + 1}.png")
    (tmp_path / "walk.v2.txt").write_text("a walk")
    frames_of(1)[0].save(tmp_path / "still.png")
    clip, still = sorted(read(tmp_path, frame_rate=4.0).examples, key=lambda example: example.clip is None)
    assert clip.source.name == "walk.v2.frames" and clip.captions == ("a walk",)
    # f10 comes after f9, and frames without times are not chosen by a rate.
    assert clip.clip.count == 12 and numbers(clip) == list(range(12))
    assert still.clip is None


@pytest.mark.parametrize("change", ["no caption", "gap", "own captions", "two stems"])
def test_other_folders_hold_stills(tmp_path, change):
    walk = tmp_path / "walk"
    walk.mkdir()
    for number, frame in enumerate(frames_of(3)):
        frame.save(walk / f"f{number}.png")
    if change != "no caption":
        (tmp_path / "walk.txt").write_text("a walk")
    if change == "gap":
        os.remove(walk / "f1.png")
    if change == "own captions":
        (walk / "f1.txt").write_text("a step")
    if change == "two stems":
        os.rename(walk / "f2.png", walk / "g2.png")
    assert all(example.clip is None for example in read(tmp_path).examples)


def test_frames_of_several_sizes_are_named(tmp_path):
    (tmp_path / "walk").mkdir()
    for number in range(3):
        frames_of(1, (32, 24 + number))[0].save(tmp_path / "walk" / f"{number}.png")
    (tmp_path / "walk.txt").write_text("a walk")
    with pytest.raises(DatasetError, match="walk.frames: its frames have 3 sizes"):
        read(tmp_path)


def test_rotated_files_are_upright(tmp_path):
    write_video(tmp_path / "a.mp4", 3, rotation=90)
    example = one(tmp_path)
    assert example.size == (24, 32)
    pixels = np.asarray(example.source.open()).mean(axis=(1, 2))
    # Counterclockwise: the brighter left half becomes the lower one.
    assert pixels[24] - pixels[8] > 30


def test_odd_sides_are_kept(tmp_path):
    write_video(tmp_path / "a.mp4", 3, size=(33, 25), pix_fmt="yuv444p")
    example = one(tmp_path)
    assert example.size == (33, 25) == example.source.open().size


@pytest.mark.parametrize(
    "rate, expected",
    [
        (0.0, [0, 1, 2, 3, 4, 5]),
        (10.0, [0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5]),
        (20.0, [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 5]),
        (2.0, [0, 4, 5]),
    ],
)
def test_a_variable_rate_is_read_by_its_times(tmp_path, rate, expected):
    write_video(tmp_path / "a.mp4", 6, times=[0, 100, 250, 310, 900, 1000])
    example = one(tmp_path, frame_rate=rate)
    assert example.clip.count == len(expected)
    assert numbers(example) == expected
    assert numbers(example, 1, 2) == expected[1:3]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_files_own_rate_changes_nothing(tmp_path, name):
    """Matroska rounds times to milliseconds."""
    write_video(tmp_path / name, 30, rate=24)
    example = one(tmp_path, frame_rate=24.0)
    assert numbers(example) == list(range(30))


def test_unusable_files_are_named(tmp_path):
    write_sound(tmp_path / "sound.mp4")
    os.rename(write_video(tmp_path / "whole.mp4"), tmp_path / "cut.mp4")
    content = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.webm").write_bytes(random.Random(0).randbytes(4000))
    (tmp_path / "empty.mkv").write_bytes(b"")
    # A list of other files must not be followed.
    write_video(tmp_path / "good.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    dataset = read(tmp_path)
    assert [example.source.name for example in dataset.examples] == ["good.mp4"]
    reasons = {row.name: row.reason for row in dataset.left_out}
    assert reasons.keys() == {"sound.mp4", "cut.mp4", "noise.webm", "empty.mkv", "list.mp4"}
    assert reasons.pop("sound.mp4") == "cannot be read (it has no pictures, only sound)"
    assert all("damaged" in reason and str(tmp_path) not in reason for reason in reasons.values())


def noise(number, size):
    return np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3), np.uint8)


def test_a_file_that_ends_early_is_named_when_it_is_read(tmp_path):
    write_video(tmp_path / "a.mkv", 40, codec="ffv1", draw=noise)
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) * 3 // 4])
    example = one(tmp_path)
    assert 20 < example.clip.count < 40
    with pytest.raises(DatasetError, match="The clip 'a.mkv' cannot be read .only .* of the 60 frames from frame 0 on"):
        list(example.source.frames(0, 60))


def test_a_changed_file_is_named(tmp_path):
    write_video(tmp_path / "a.mp4")
    example = one(tmp_path)
    write_video(tmp_path / "a.mp4", 9)
    with pytest.raises(DatasetError, match="changed after Graft read the dataset"):
        example.source.open()


def test_a_missing_package_is_asked_for(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4")
    frames_of(1)[0].save(tmp_path / "still.png")
    monkeypatch.setitem(sys.modules, "av", None)
    dataset = read(tmp_path)
    assert [str(row) for row in dataset.left_out] == [
        "a.mp4: cannot be read (reading videos needs PyAV; install av into ComfyUI's Python)"
    ]
    assert [example.source.name for example in dataset.examples] == ["still.png"]


def test_captions_masks_repeats_and_held_out_clips_are_as_for_pictures(tmp_path):
    for name in ("3_dogs/a.mp4", "validation/b.webm"):
        (tmp_path / name).parent.mkdir()
        write_video(tmp_path / name, **({"codec": "libvpx"} if name.endswith("webm") else {}))
    (tmp_path / "3_dogs" / "a.txt").write_text("a dog runs")
    Image.new("L", (32, 24), 255).save(tmp_path / "3_dogs" / "a-masklabel.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "validation/b.webm", "text": "a cat"}))
    first, second = read(tmp_path, validation_folder="validation").examples
    assert (first.captions, first.repeats, first.mask.name) == (("a dog runs",), 3, "3_dogs/a-masklabel.png")
    assert (second.captions, second.held_out, second.mask) == (("a cat",), True, None)


def test_masks_that_are_clips_are_named_and_not_trained_on(tmp_path):
    for name in ("a.mp4", "masks/a.mp4", "b.mp4", "b-masklabel.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / name, 5)
    outside = tmp_path.parent / f"{tmp_path.name}-masks"
    outside.mkdir()
    write_video(outside / "a.mp4", 5)
    for options in ({}, {"masks": "off"}, {"mask_folder": str(outside)}):
        dataset = read(tmp_path, **options)
        assert [example.source.name for example in dataset.examples] == ["a.mp4", "b.mp4"]
        named = [row.name for row in dataset.left_out if "a mask that is a clip; save one of its frames" in row.reason]
        assert {"masks/a.mp4", "b-masklabel.mp4"} <= {*named}
        assert ("a.mp4" in named) == ("mask_folder" in options)


def test_a_folder_of_masks_with_a_note_is_no_clip(tmp_path):
    (tmp_path / "masks").mkdir()
    for number, frame in enumerate(frames_of(3)):
        frame.save(tmp_path / f"{number}.png")
        Image.new("L", (32, 24), 255).save(tmp_path / "masks" / f"{number}.png")
    (tmp_path / "masks.txt").write_text("white is learned")
    dataset = read(tmp_path)
    assert [example.mask.name for example in dataset.examples] == [f"masks/{number}.png" for number in range(3)]


def test_a_folder_of_frames_repeats_by_its_own_name(tmp_path):
    (tmp_path / "5_spin").mkdir()
    for number, frame in enumerate(frames_of(6)):
        frame.save(tmp_path / "5_spin" / f"{number}.png")
    (tmp_path / "5_spin.txt").write_text("it spins")
    assert one(tmp_path).repeats == 5


def test_the_still_that_an_apng_shows_elsewhere_is_no_frame(tmp_path):
    first, *rest = frames_of(6)
    first.save(tmp_path / "a.apng", format="PNG", save_all=True, append_images=rest, default_image=True, duration=100)
    example = one(tmp_path)
    assert example.clip.count == 5 and numbers(example) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_the_highest_frame_rate_repeats_frames(tmp_path, name):
    animate(tmp_path / name, 3, **({"lossless": True} if name == "a.webp" else {}))
    assert numbers(one(tmp_path, frame_rate=1000.0))[:2] == [0, 0]


def test_a_clip_has_no_worse_picture(tmp_path):
    write_video(tmp_path / "data.mp4")
    (tmp_path / "worse").mkdir()
    with pytest.raises(DatasetError, match="data.mp4: a clip cannot have a worse picture"):
        read(tmp_path, worse_folder=str(tmp_path / "worse"))


def test_a_second_look_decodes_nothing(tmp_path, monkeypatch):
    folder, index = tmp_path / "data", str(tmp_path / "index")
    folder.mkdir()
    write_video(folder / "a.mp4")
    animate(folder / "b.gif")
    monkeypatch.setattr("graft_pack.trainers.data.index._TIMESTAMP_GRACE_NS", 0)
    first = read(folder, index=index)
    monkeypatch.setattr(clips, "_measure", None)
    assert read(folder, index=index).fingerprint() == first.fingerprint()


@pytest.mark.parametrize("other", [{"frames": 9}, {"frame_rate": 4.0}, {"pieces": "whole"}], ids=str)
def test_the_fingerprint_follows_the_inputs(tmp_path, other):
    write_video(tmp_path / "a.mp4")
    assert read(tmp_path, **other).fingerprint() != read(tmp_path).fingerprint()


def test_without_frames_nothing_changes(tmp_path):
    write_video(tmp_path / "a.mp4")
    animate(tmp_path / "b.gif")
    (tmp_path / "walk").mkdir()
    frames_of(1)[0].save(tmp_path / "walk" / "0001.png")
    frames_of(2)[1].save(tmp_path / "walk" / "0002.png")
    (tmp_path / "walk.txt").write_text("a walk")
    usual = scan_folder(str(tmp_path), "sks", 64, 1, Augmentation())
    assert [example.source.name for example in usual.examples] == ["b.gif", "walk/0001.png", "walk/0002.png"]
    assert all(example.clip is None for example in usual.examples)
    reasons = {row.name: row.reason for row in usual.left_out}
    assert reasons["a.mp4"].startswith("a video; ") and reasons["walk.txt"] == "a caption without its picture"
    assert usual.fingerprint() == read(tmp_path, frames=0, frame_rate=8.0, pieces="whole").fingerprint()


OUT_OF_RANGE = [{"frames": -1}, {"frame_rate": -1.0}, {"frame_rate": float("nan")}]


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_numbers_out_of_range_are_named(tmp_path, options):
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, **options)
    assert [caught.value.input] == list(options)


# What musubi-tuner's docs/dataset_config.md draws for a clip of 40 frames: first frames of the pieces by
# frame_extraction and target_frames, with frame_sample = 4 for "uniform".
EXTRACTED = {
    ("head", 1): [0],
    ("head", 13): [0],
    ("head", 25): [0],
    ("chunk", 13): [0, 13, 26],
    ("chunk", 25): [0],
    ("uniform", 1): [0, 13, 26, 39],
    ("uniform", 13): [0, 9, 18, 27],
    ("uniform", 25): [0, 5, 10, 15],
}
NAMES = {"head": "first", "chunk": "whole", "uniform": "uniform"}
# The same page: the frames of `full` with max_frames = 31, by the length of the clip.
TRIMMED = {20: 17, 25: 25, 35: 29}
# The same page: "truncated to the nearest N*4+1".
ROUNDED = {1: 1, 4: 1, 5: 5, 25: 25, 28: 25, 45: 45, 81: 81}


def by_four(frames):
    return (frames - 1) // 4 * 4 + 1


@pytest.mark.parametrize("how, frames", EXTRACTED)
def test_pieces_are_those_of_musubi_tuner(how, frames):
    expected = [(start, frames) for start in EXTRACTED[how, frames]]
    assert video.choose_pieces(40, frames, NAMES[how], by_four) == expected


@pytest.mark.parametrize("count", TRIMMED)
def test_shorter_clips_are_trimmed_as_by_musubi_tuner(count):
    # Its code trims 31 to 29, since 31 is no 4n+1; the page draws 31.
    assert video.choose_pieces(count, 31, "first", by_four) == [(0, TRIMMED[count])]


@pytest.mark.parametrize("frames", ROUNDED)
def test_lengths_are_rounded_as_by_musubi_tuner(frames):
    assert video.choose_pieces(100, frames, "first", by_four) == [(0, ROUNDED[frames])]


@pytest.mark.parametrize("rate, target", [(30, 16), (30, 24), (60, 16), (25, 16), (24, 16), (50, 24)])
def test_frames_are_skipped_to_a_lower_rate_as_by_musubi_tuner(rate, target):
    """Its source_fps: of the frames i * target / rate, the first one of each whole number is kept."""
    whole = [index * target // rate for index in range(40)]
    kept = [index for index in range(40) if index == 0 or whole[index] != whole[index - 1]]
    times = np.arange(40) / rate
    count = video.count_at_rate(times[-1], 40, target)
    assert video.frames_at_rate(times, target, 0, count).tolist() == kept


def test_random_pieces_follow_the_seed_alone():
    chosen = [video.choose_pieces(1000, 9, "random", by_four, seed) for seed in ("1", "1", "2")]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == video.SAMPLES
    assert all(0 <= start <= 991 and length == 9 for start, length in chosen[0])


QUICK = {"preset": "ultrafast", "crf": "4", "tune": "zerolatency"}


def test_of_three_hours_few_frames_are_decoded_and_held(tmp_path, monkeypatch):
    count = 3 * 60 * 60
    write_video(tmp_path / "a.mp4", count, size=(16, 16), rate=1, keyframes=12, options=QUICK)
    held: list = []
    most, decoded = 0, 0
    real, decode = video._upright, video._decode

    def counting(container, stream):
        nonlocal decoded
        for frame in decode(container, stream):
            decoded += 1
            yield frame

    def counted(frame):
        nonlocal most
        image = real(frame)
        held.append(weakref.ref(image))
        most = max(most, sum(reference() is not None for reference in held))
        return image

    monkeypatch.setattr(video, "_upright", counted)
    monkeypatch.setattr(video, "_decode", counting)
    example = one(tmp_path, pieces="uniform", frames=17)
    assert example.clip.count == count and decoded == 1
    for start, length in video.choose_pieces(count, 17, "uniform", by_four):
        got = [number_of(frame) for frame in example.source.frames(start, length)]
        # The gray levels repeat after 36 frames.
        assert got == [(start + place) % 36 for place in range(length)]
    gc.collect()
    # To each piece belong at most the frames from the key frame before it on.
    assert decoded <= 1 + video.SAMPLES * (17 + 12)
    assert most <= 3


def images_of(count):
    return [shade(number) for number in range(count)]


@pytest.mark.parametrize("parts, lengths", [(1, [11]), (2, [5, 5]), (11, [1] * 11)])
def test_a_batch_is_split_into_clips_of_equal_length(parts, lengths):
    split = arrays.split_clips(images_of(11), parts)
    dataset = arrays.from_arrays(split, ["a dog"], "sks", 64)
    assert [example.clip.count for example in dataset.examples] == lengths
    drawn = [number for example in dataset.examples for number in numbers(example)]
    assert drawn == list(range(sum(lengths)))


def test_clips_of_a_batch_have_captions_masks_and_identities_of_their_own():
    split = arrays.split_clips(images_of(10), 2)
    masks = [np.full((24, 32), level, np.uint8) for level in (0, 255)]
    first, second = arrays.from_arrays(split, ["a dog", "a cat"], "", 64, masks).examples
    assert (first.captions, second.captions) == (("a dog",), ("a cat",))
    assert first.mask.digest != second.mask.digest and first.digest != second.digest
    (again, _) = arrays.from_arrays(arrays.split_clips(images_of(10), 2), [""], "", 64).examples
    assert again.digest == first.digest


def test_what_does_not_fit_a_split_batch_is_named():
    with pytest.raises(DatasetError, match="3 images cannot be split into 4 clips"):
        arrays.split_clips(images_of(3), 4)
    with pytest.raises(DatasetError, match="5 captions arrived for 2"):
        arrays.from_arrays(arrays.split_clips(images_of(10), 2), [""] * 5, "", 64)
    with pytest.raises(DatasetError, match="A clip cannot have a worse picture"):
        split = arrays.split_clips(images_of(4), 2)
        arrays.from_arrays(split, [""], "", 64, worse_images=images_of(2))
