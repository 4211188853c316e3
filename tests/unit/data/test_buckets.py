"""Tests of bucket selection for pictures."""

import pytest
from graft_pack.trainers.data.buckets import bucket_sizes, choose_crop
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.protocols import Geometry
from hypothesis import given
from hypothesis import strategies as st

GEOMETRIES = [Geometry(512, 64), Geometry(1024, 64), Geometry(1024, 32), Geometry(64, 8), Geometry(100, 16)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_buckets_are_multiples_within_the_area(geometry):
    sizes = bucket_sizes(geometry)
    assert len(sizes) == len(set(sizes))
    for width, height in sizes:
        assert width % geometry.step == height % geometry.step == 0
        assert 0 < width * height <= geometry.resolution**2
        assert (height, width) in sizes
        assert max(width, height) <= 2 * geometry.resolution


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_square_is_among_them(geometry):
    side = geometry.resolution // geometry.step * geometry.step
    assert (side, side) in bucket_sizes(geometry)


@given(st.integers(64, 6000), st.integers(64, 6000), st.sampled_from(GEOMETRIES[:4]))
def test_every_picture_is_cut_within_itself(width, height, geometry):
    crop = choose_crop((width, height), geometry, "x")
    assert crop.bucket[0] % geometry.step == crop.bucket[1] % geometry.step == 0
    assert crop.bucket[0] * crop.bucket[1] <= geometry.resolution**2
    for side in (0, 1):
        assert 0 <= crop.offset[side] <= crop.scaled[side] - crop.bucket[side]
        assert crop.scaled[side] <= (width, height)[side], "never enlarged"
    assert crop.scaled[0] == crop.bucket[0] or crop.scaled[1] == crop.bucket[1]
    assert crop.scaled[0] / crop.scaled[1] == pytest.approx(width / height, rel=0.02 + 1 / min(crop.scaled))


@pytest.mark.parametrize(
    "size, bucket, offset",
    [
        ((512, 512), (512, 512), (0, 0)),
        ((2048, 2048), (512, 512), (0, 0)),
        ((1024, 768), (576, 448), (10, 0)),
        ((768, 1024), (448, 576), (0, 10)),
        ((4000, 1000), (1024, 256), (0, 0)),
        ((300, 300), (256, 256), (0, 0)),
    ],
)
def test_cuts_of_known_sizes(size, bucket, offset):
    crop = choose_crop(size, Geometry(512, 64), "x")
    assert (crop.bucket, crop.offset) == (bucket, offset)


def test_a_picture_below_the_step_is_refused_by_name():
    with pytest.raises(DatasetError, match=r"thumb\.png.*63x900.*64"):
        choose_crop((63, 900), Geometry(512, 64), "thumb.png")
