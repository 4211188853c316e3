"""Tests of the contact sheet: the parts of a picture that it shows, and the pictures that it chooses."""

from dataclasses import replace

import numpy as np
import pytest
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.inspection import contact_sheet
from graft_pack.trainers.inspection.report import inspect, report
from graft_pack.trainers.protocols import Geometry

GEOMETRIES = {0: Geometry(128, 16)}


def grain(number, size=(128, 128)):
    return np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)


def look(dataset):
    return inspect(dataset, GEOMETRIES, None)


def drawn(findings):
    return np.round(contact_sheet.contact_sheet(findings) * 255).astype(np.uint8)


def test_the_sheet_shows_the_cut_the_mask_and_the_frame():
    """The pixels show it: white pictures, one longer than its bucket with its left half masked out."""
    long, fitting = np.full((128, 768, 3), 255, np.uint8), np.full((128, 128, 3), 255, np.uint8)
    mask = np.zeros((128, 768), np.uint8)
    mask[:, 384:] = 255
    whole = np.full((128, 128), 255, np.uint8)
    dataset = from_arrays([fitting, long], ["a, b"], "", 0, [whole, mask])
    findings = inspect(replace(dataset, examples=dataset.examples[::-1]), {0: Geometry(128, 64)}, None)
    first, second = findings.rows
    assert first.flags[0] == "loses 33%"
    picture = drawn(findings)
    assert picture.shape[1] == 3 * contact_sheet._CELL
    head = picture.shape[0] - contact_sheet._CELL - contact_sheet._TEXT

    def at(column, x, y):
        return tuple(int(value) for value in picture[head + y, column * contact_sheet._CELL + x])

    middle = contact_sheet._CELL // 2
    assert at(0, middle + 20, middle) == (255, 255, 255), "learnt"
    assert at(0, contact_sheet._CELL - 10, middle) == (85, 85, 85), "cut away"
    red, green, blue = at(0, middle - 20, middle)
    assert red > green + 90 < 256 > green == blue, "masked out"
    assert at(0, 10, middle) == (red // 3, green // 3, blue // 3), "masked out and cut away"
    assert at(0, 1, 1) == contact_sheet._AMBER
    assert second.flags == ["like image 2"]


@pytest.mark.parametrize(
    "name",
    ["line\nbreak", "\u732b \u043a\u043e\u0448\u043a\u0430", "bad \udcff byte", "x" * 3000, "tab\tand \x00", ""],
    ids=ascii,
)
def test_no_name_or_caption_stops_the_sheet(name):
    dataset = from_arrays([grain(1)], [""], "", 0)
    example = replace(dataset.examples[0], captions=(name,))
    example.source.name = name
    findings = look(replace(dataset, examples=(example,), name=name))
    assert drawn(findings).ndim == 3
    assert report(findings)


def test_sixty_are_drawn_those_to_look_after_first():
    dataset = from_arrays([grain(n, (60, 60) if n % 10 == 9 else (128, 128)) for n in range(90)], ["x"], "", 0)
    rows = contact_sheet.chosen(look(dataset))
    assert len(rows) == len({row.example.source.name for row in rows}) == 60
    assert [bool(row.flags) for row in rows] == [True] * 9 + [False] * 51
