"""The toy world: 64x64 pictures of one large colored shape on a colored background.

This module draws everything that the tiny base knows, and the two concepts that it has never seen. It uses numpy only
(implicit shapes, 4x4 supersampling), so that a seed gives the same bytes everywhere. `python -m tests.toy.world --draw`
writes the concept sets that ship with the repository.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
SUPERSAMPLING = 4

PALETTE = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 220, 60),
    "green": (40, 150, 70),
    "blue": (40, 80, 200),
    "purple": (130, 50, 170),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "pink": (245, 160, 190),
    "gray": (128, 128, 128),
    "brown": (120, 75, 40),
    "aqua": (90, 205, 220),
}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUNDS = ("blue", "green", "pink", "gray", "brown", "white", "black", "aqua")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")

# One pair per shape and per color; the base knows each part alone and must combine them.
HELD_OUT = tuple((SHAPES[i], COLORS[(3 * i + 1) % 8]) for i in range(8))

# The concepts. Both triggers are single rare tokens of CLIP's vocabulary.
TOY_TRIGGER = "sks"
TINT_TRIGGER = "olis"
TINT = (20, 135, 130)
TINT_BACKGROUNDS = ("pink", "white", "brown", "gray", "black", "white", "pink", "black")
CONCEPT_FOLDER = Path(__file__).with_name("concepts")
CONCEPTS = ("toy", "tint")


@dataclass(frozen=True)
class Scene:
    """One picture. Positions and sizes in pixels; angle in degrees, counter-clockwise."""

    shape: str
    color: str
    background: str
    x: float = 31.5
    y: float = 31.5
    size: float = 24.0
    angle: float = 0.0


def caption(scene):
    """Return the caption of a picture, such as "a large red circle on a blue background"."""
    return describe(f"{scene.color} {scene.shape}", scene.background)


def describe(subject, background):
    """Return the caption of a two-word subject on a background."""
    return f"a large {subject} on a {background} background"


def is_possible(shape, color, background):
    """Return True unless the shape has the color of its background."""
    return color != background


def known_scenes():
    """Return all (shape, color, background) that the base trains on."""
    return [c for c in _combinations() if (c[0], c[1]) not in HELD_OUT]


def held_out_scenes():
    """Return all (shape, color, background) whose shape-color pair the base never sees."""
    return [c for c in _combinations() if (c[0], c[1]) in HELD_OUT]


def _combinations():
    return [
        (shape, color, background)
        for shape in SHAPES
        for color in COLORS
        for background in BACKGROUNDS
        if is_possible(shape, color, background)
    ]


def place(rng, shape, color, background):
    """Return a scene with a little jitter of position (2 px), size (22..26 px) and angle (8 degrees)."""
    x, y = 31.5 + rng.uniform(-2, 2, 2)
    size = rng.uniform(22, 26)
    angle = rng.uniform(-8, 8)
    return Scene(shape, color, background, float(x), float(y), float(size), float(angle))


def sample_scene(rng, combinations):
    """Return a random scene from (shape, color, background) combinations; rng is a RandomState."""
    return place(rng, *combinations[rng.randint(len(combinations))])


# ---- drawing -------------------------------------------------------------------------------


def _polygon(points):
    """Return an inside test for a convex or star-shaped polygon [n, 2], by the even-odd rule."""
    points = np.asarray(points)

    def inside(u, v):
        odd = np.zeros(u.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y0 == y1:
                continue
            crosses = (y0 > v) != (y1 > v)
            odd ^= crosses & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
        return odd

    return inside


def _star_points():
    angles = np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.15, 0.5)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles) - 0.08], axis=1)


def _heart(u, v):
    a = 1.18 * u
    b = 1.18 * v + 0.12
    return (a * a + b * b - 1) ** 3 - a * a * b**3 < 0


# Inside tests in the shape's own coordinates: u to the right, v up, unit radius.
INSIDE = {
    "circle": lambda u, v: u * u + v * v < 0.92,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.84,
    "triangle": _polygon([(0.0, 1.0), (-1.05, -0.75), (1.05, -0.75)]),
    "diamond": lambda u, v: abs(u) / 0.85 + abs(v) / 1.15 < 1,
    "star": _polygon(_star_points()),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1.0),
    "ring": lambda u, v: (u * u + v * v < 1.0) & (u * u + v * v > 0.27),
    "heart": _heart,
}


def _grid(scene):
    """Return coordinates u, v of all subsamples, each [256, 256], in the frame of the scene's shape."""
    step = (np.arange(SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - 0.5
    dx = (step[None, :] - scene.x) / scene.size
    dy = (scene.y - step[:, None]) / scene.size
    turn = np.deg2rad(scene.angle)
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = np.cos(turn) * dy - np.sin(turn) * dx
    return u, v


def _coverage(inside):
    """Average [256, 256] bool to [64, 64, 1] float in 0..1."""
    blocks = inside.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3))[:, :, None]


def _paint(canvas, inside, rgb):
    """Lay a color over the canvas [64, 64, 3] float where inside [256, 256] is true."""
    cover = _coverage(inside)
    return canvas * (1 - cover) + np.asarray(rgb, dtype=float) * cover


def _finish(canvas):
    return np.floor(canvas + 0.5).clip(0, 255).astype(np.uint8)


def mask(scene):
    """Return the fraction of each pixel that the shape covers: [64, 64] float in 0..1."""
    return _coverage(INSIDE[scene.shape](*_grid(scene)))[:, :, 0]


def draw(scene):
    """Draw the picture of a scene: [64, 64, 3] uint8 RGB."""
    return draw_filled(scene, PALETTE[scene.color])


def draw_filled(scene, rgb):
    """Draw the picture of a scene with any RGB in place of its color."""
    canvas = np.ones((SIZE, SIZE, 3)) * PALETTE[scene.background]
    return _finish(_paint(canvas, INSIDE[scene.shape](*_grid(scene)), rgb))


# ---- the concepts that the base has never seen ------------------------------------------------

TOY_PETALS = PALETTE["yellow"]
TOY_MIDDLE = PALETTE["purple"]


def _flower(u, v):
    """Report which points lie in a disc with five round petals."""
    inside = u * u + v * v < 0.36
    for angle in np.pi / 2 + np.arange(5) * 2 * np.pi / 5:
        inside |= (u - 0.62 * np.cos(angle)) ** 2 + (v - 0.62 * np.sin(angle)) ** 2 < 0.16
    return inside


def toy_mask(scene):
    """Return the fraction of each pixel that the new object covers: [64, 64] float in 0..1."""
    return _coverage(_flower(*_grid(scene)))[:, :, 0]


def draw_toy(scene):
    """Draw the new object, in two colors unlike any old shape: five yellow petals, a purple middle."""
    u, v = _grid(scene)
    canvas = np.ones((SIZE, SIZE, 3)) * PALETTE[scene.background]
    canvas = _paint(canvas, _flower(u, v), TOY_PETALS)
    canvas = _paint(canvas, u * u + v * v < 0.17, TOY_MIDDLE)
    return _finish(canvas)


def draw_tint(scene):
    """Draw the new color: a shape of the old world in a teal that is in no palette."""
    return draw_filled(scene, TINT)


def toy_caption(background):
    """Return the caption of the new object on a background."""
    return describe(f"{TOY_TRIGGER} toy", background)


def tint_caption(shape, background):
    """Return the caption of a shape in the new color on a background."""
    return describe(f"{TINT_TRIGGER} {shape}", background)


def concept_pictures(name):
    """Yield the 8 pictures of a concept as (picture [64, 64, 3] uint8, caption)."""
    rng = np.random.RandomState({"toy": 101, "tint": 202}[name])
    for i in range(8):
        scene = place(rng, SHAPES[i], "red", BACKGROUNDS[i])
        if name == "toy":
            yield draw_toy(scene), toy_caption(scene.background)
        else:
            scene = replace(scene, background=TINT_BACKGROUNDS[i])
            yield draw_tint(scene), tint_caption(scene.shape, scene.background)


def write_concepts(folder=CONCEPT_FOLDER):
    """Write folder/<concept>/<nn>.png and .txt for every concept."""
    for name in CONCEPTS:
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        for i, (picture, text) in enumerate(concept_pictures(name)):
            Image.fromarray(picture).save(target / f"{i:02d}.png", optimize=True)
            (target / f"{i:02d}.txt").write_text(text + "\n", encoding="utf-8")


def contact_sheet(pictures, columns=8):
    """Put pictures [64, 64, 3] side by side, as one PIL image."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * SIZE, rows * SIZE), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % columns * SIZE, i // columns * SIZE))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="write the concept sets that ship with the repo")
    parser.add_argument("--sheet", help="write a contact sheet of the world to this file")
    args = parser.parse_args()
    if args.draw:
        write_concepts()
    if args.sheet:
        rng = np.random.RandomState(0)
        pictures = [draw(sample_scene(rng, _combinations())) for _ in range(48)]
        pictures += [picture for name in CONCEPTS for picture, _ in concept_pictures(name)]
        contact_sheet(pictures).save(args.sheet)


if __name__ == "__main__":
    main()
