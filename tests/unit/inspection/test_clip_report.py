"""Tests of the report and the contact sheet of a dataset with clips."""

import numpy as np
import pytest
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.inspection import contact_sheet
from graft_pack.trainers.inspection.report import inspect, report
from graft_pack.trainers.protocols import Geometry
from PIL import Image

from tests.support.videos import shade, write_video


def findings_of(folder, snap, frames=7, **options):
    dataset = scan_folder(str(folder), "sks", 32, 1, None, ScanOptions(frames=frames, **options))
    return inspect(dataset, {0: Geometry(32, 8)}, None, snap=snap)


def by_four(frames):
    return (frames - 1) // 4 * 4 + 1


def no_clips(frames):
    return 0


def test_lengths_rates_buckets_and_short_clips_are_reported(tmp_path):
    write_video(tmp_path / "long.mp4", 18)
    write_video(tmp_path / "short.mp4", 2, rate=24)
    Image.fromarray(shade(3)).save(tmp_path / "still.png")
    findings = findings_of(tmp_path, by_four, pieces="whole")
    assert dict(findings.buckets) == {(32, 24, 5): 3, (32, 24): 2}
    flags = {row.example.source.name: row.flags for row in findings.rows}
    assert "short clip" in flags["short.mp4"] and "short clip" not in flags["long.mp4"]
    lines = report(findings).splitlines()
    for line in (
        "- Dataset '{}': 3 pictures, 5 in an epoch.",
        "- bucket 32x24: 2",
        "- bucket 32x24 x 5 frames: 3",
        "- 2 clips of 2 to 18 frames.",
        "- Frames per second of the files: 8 (1), 24 (1).",
        "- 1 shorter than frames: short.mp4",
    ):
        assert line.format(tmp_path.name) in lines


def test_a_vae_of_stills_is_reported(tmp_path):
    write_video(tmp_path / "a.mp4", 18)
    text = report(findings_of(tmp_path, no_clips))
    assert "1 clips that this VAE cannot encode: a.mp4" in text


@pytest.mark.parametrize("size", [(32, 24), (24, 32)])
def test_the_sheet_shows_three_frames_of_a_clip(tmp_path, size):
    write_video(tmp_path / "a.mkv", 21, size=size, codec="ffv1", pix_fmt="yuv444p")
    findings = findings_of(tmp_path, by_four)
    (finding,) = findings.rows
    strip = np.asarray(contact_sheet._whole(finding)).astype(int)
    assert strip.shape[0] <= 200 and strip.shape[1] <= 200
    axis = 0 if size[0] > size[1] else 1
    # The right part of each frame has the gray level of its number.
    thirds = np.array_split(strip, 3, axis=axis)
    levels = [np.median(third[third.shape[0] // 2, third.shape[1] * 3 // 4]) for third in thirds]
    assert np.abs(np.array(levels) - [20 + 5 * number for number in (0, 10, 20)]).max() <= 2
    assert contact_sheet.contact_sheet(findings).shape[2] == 3


def test_a_sheet_survives_a_clip_that_ends_early(tmp_path):
    draw = lambda number, size: np.random.RandomState(number).randint(0, 256, (24, 32, 3), np.uint8)  # noqa: E731
    write_video(tmp_path / "a.mkv", 40, codec="ffv1", draw=draw)
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) * 3 // 4])
    contact_sheet.contact_sheet(findings_of(tmp_path, by_four))
