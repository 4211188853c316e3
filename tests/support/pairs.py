"""Pairs of two shapes for one ambiguous caption of the toy world, as a folder of the dataset node."""

import numpy as np
from PIL import Image

from tests.toy import world

# The tiny base draws either for the unknown word, depending on the colors.
WORD = "object"
BETTER, WORSE = "diamond", "circle"


def list_colors():
    """Return all (color, background) in a fixed random order."""
    colors = [(color, background) for color in world.COLORS for background in world.BACKGROUNDS if color != background]
    return [colors[place] for place in np.random.RandomState(0).permutation(len(colors))]


def describe(color, background):
    """Return the ambiguous caption of a pair."""
    return world.describe(f"{color} {WORD}", background)


def write_pairs(folder, count):
    """Write pairs with the first colors into a folder, the worse pictures into its folder `worse`."""
    rng = np.random.RandomState(1)
    (folder / "worse").mkdir(parents=True, exist_ok=True)
    for number, colors in enumerate(list_colors()[:count]):
        (folder / f"{number:02}.txt").write_text(describe(*colors))
        for shape, place in ((BETTER, folder), (WORSE, folder / "worse")):
            Image.fromarray(world.draw(world.place(rng, shape, *colors))).save(place / f"{number:02}.png")
