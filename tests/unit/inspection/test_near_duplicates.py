"""Tests that the search finds copies of a picture and nothing else."""

import io
from dataclasses import replace

import numpy as np
import pytest
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.inspection.near_duplicates import find_near_duplicates, signatures
from PIL import Image


def grain(number, size=(128, 128)):
    return np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)


def recompressed(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


def count(done, total):
    """Ignore the progress."""


def pairs(pictures):
    found, broken = signatures(from_arrays(pictures, ["x"], "", 0).examples, None, count)
    assert not broken
    return find_near_duplicates(found)


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda image: image.resize((112, 112), Image.LANCZOS), True),
        (lambda image: image.point(lambda value: min(255, value + 6)), True),
        (recompressed, True),
        (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), False),
        (lambda image: image.point(lambda value: 255 - value), False),
        (lambda image: image.transpose(Image.Transpose.ROTATE_90), False),
    ],
    ids=["smaller", "brighter", "recompressed", "mirrored", "negative", "turned"],
)
def test_copies_are_found_and_other_pictures_are_not(change, same):
    def smooth(number):
        return Image.fromarray(grain(number, (6, 5))).resize((128, 128), Image.BICUBIC)

    pictures = [np.asarray(smooth(number)) for number in range(30)]
    pictures.append(np.asarray(change(smooth(7))))
    assert pairs(pictures) == ([(7, 30)] if same else [])


def photo(number):
    """Return a picture with coarse and fine shapes, each twice as faint as the next coarser ones."""
    sizes = [(4, 3), (9, 8), (30, 28), (120, 110)]
    shapes = [Image.fromarray(grain(10 * number + level, size)) for level, size in enumerate(sizes)]
    layers = [np.asarray(shape.resize((256, 256), Image.BICUBIC)) / 2**level for level, shape in enumerate(shapes)]
    return Image.fromarray((sum(layers) * 0.5).astype(np.uint8))


def test_a_cropped_photo_is_a_copy():
    """The crop removes 5 % of each length."""
    assert pairs([np.asarray(photo(n)) for n in range(4)] + [np.asarray(photo(2).crop((6, 6, 250, 250)))]) == [(2, 4)]


def test_the_same_shapes_in_other_colors_are_not_alike():
    """Their hashes agree, because the hash sees gray alone."""
    shapes = np.asarray(Image.fromarray(grain(1, (6, 5))).convert("L").resize((128, 128), Image.BICUBIC))[..., None]
    red, blue = ((shapes * np.array(tint)).astype(np.uint8) for tint in ([1, 0.2, 0.2], [0.2, 0.35, 0.9]))
    assert pairs([red, blue]) == []
    assert pairs([red, np.minimum(red, 240)]) == [(0, 1)]


def test_other_shapes_in_the_same_colors_are_not_alike():
    """Fog and snow: the color at each position differs little between pictures."""
    faint = [
        118 + np.asarray(Image.fromarray(grain(n, (6, 5))).resize((128, 128), Image.BICUBIC)) // 12 for n in (1, 2)
    ]
    assert pairs(faint) == []
    assert pairs([faint[0], faint[0] + 1]) == [(0, 1)]


class Unreadable:
    """The source of a picture that must not be opened again."""

    def __init__(self, source):
        self.name, self.digest = source.name, source.digest

    def open(self):
        pytest.fail(f"{self.name} was opened again")


def test_what_pictures_look_like_is_kept(tmp_path):
    examples = from_arrays([grain(n) for n in range(3)], ["x"], "", 0).examples
    first = signatures(examples, str(tmp_path), count)
    unreadable = [replace(one, source=Unreadable(one.source)) for one in examples]
    assert signatures(unreadable, str(tmp_path), count) == first
    for file in tmp_path.iterdir():
        file.write_text("{broken")
    assert signatures(examples, str(tmp_path), count) == first
