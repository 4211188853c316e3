"""Table of adapter types, file formats and readers in docs/formats.md, measured with the makers' own libraries.

    python -m docs.build.make_formats

Each cell is the largest error of a reader over the families that it reads, relative to the adapter's effect. A test
repeats the measurements.
"""

import functools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support import pack
from tests.support.host import ROOT

PAGE = ROOT / "docs" / "formats.md"
MARK = "<!-- measured -->"

TYPES = ("LoRA", "LoRA with conv", "rsLoRA", "PiSSA", "DoRA", "LoHa", "LoKr", "OFT", "BOFT", "IA3")
# Readers of each format.
COLUMNS = {
    "kohya": ("ComfyUI", "Graft", "sd-scripts", "LyCORIS", "diffusers"),
    "LyCORIS": ("LyCORIS",),
    "diffusers": ("diffusers", "Graft"),
    "peft": ("peft", "Graft"),
}
FAMILIES = ("SD1", "SDXL", "SD3", "Flux")
# Readers that apply a file by another formula than ComfyUI's, for which the file is made. The page names the cure.
OTHER_FORMULA = {("DoRA", "kohya", "LyCORIS"), ("DoRA", "kohya", "diffusers")}
BAR = 1e-3
NO = "-"


@dataclass(frozen=True)
class Cell:
    """A measurement.

    Attributes:
        error: relative to the adapter's effect; None if the reader does not read the file.
        reason: of a refusal, by Graft or by the reader.
    """

    error: float | None
    reason: str = ""


@functools.cache
def measure(family: str, kind: str, format: str, reader: str) -> Cell:
    """Save an adapter of a type and read it."""
    from graft_pack.trainers.errors import GraftError

    from tests.interop import makers

    trained = makers.train(family, kind)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = makers.save(trained.adapter, Path(folder), format)
        except GraftError as error:
            return Cell(None, error.message)
        return _read(trained, reader, path)


def _read(trained, reader: str, path: Path) -> Cell:
    """Read a file. Whatever a reader raises is its refusal."""
    from tests.interop import makers

    try:
        return Cell(trained.error(makers.READERS[reader](trained.family, path)))
    except Exception as error:
        return Cell(None, f"{type(error).__name__}: {error}"[:200])


def bound_of(error: float) -> float:
    """Return the power of ten that is at least five times an error, and at least a millionth."""
    return 10.0 ** max(-6, math.ceil(math.log10(max(5 * error, 1e-12))))


def text_of(kind: str, format: str, reader: str) -> str:
    """Return a cell's text: the bound of the error over all families that the reader reads."""
    cells = {family: measure(family, kind, format, reader) for family in FAMILIES}
    errors = {family: cell.error for family, cell in cells.items() if cell.error is not None}
    if (kind, format, reader) in OTHER_FORMULA:
        return "use LyCORIS"
    if not errors:
        return NO
    bound = f"{bound_of(max(errors.values())):.0e}".replace("e-0", "e-")
    return bound if len(errors) == len(cells) else f"{bound} ({', '.join(errors)})"


def table() -> list[str]:
    """Return the rows of the table in Markdown."""
    columns = [(format, reader) for format, readers in COLUMNS.items() for reader in readers]
    rows = [
        "| type | " + " | ".join(f"{format}: {reader}" for format, reader in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    rows += [f"| {kind} | " + " | ".join(text_of(kind, *column) for column in columns) + " |" for kind in TYPES]
    return rows


def read_table() -> dict[tuple[str, str, str], str]:
    """Return the page's cells by (type, format, reader)."""
    lines = [line for line in PAGE.read_text().split(MARK)[1].splitlines() if line.startswith("|")]
    head, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    columns = [tuple(name.split(": ")) for name in head[1:]]
    return {(row[0], *column): cell for row in rows for column, cell in zip(columns, row[1:], strict=True)}


def main() -> None:
    """Write the table into the page."""
    pack.hide_root()
    pack.use_comfy()
    pack.load_pack()
    before, _, after = PAGE.read_text().split(MARK)
    PAGE.write_text(before + MARK + "\n\n" + "\n".join(table()) + "\n\n" + MARK + after)


if __name__ == "__main__":
    main()
