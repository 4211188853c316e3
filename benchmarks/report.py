"""Figures as lines, as a picture and as a part of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from pathlib import Path

from .contestants import Case

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
MEGABYTE = 1 << 20
# Seconds. Below this, a step's fixed cost weighs too much for a bar to mean anything.
BAR_FROM = 0.25
BARS = {"attention": 1.10, "linear + conv": 1.20}
# The limit that a contestant's step is compared with.
LIMIT_OF = {"diffusers": "diffusers' limit"}
RATIOS = ("attention", "linear + conv", "core", "core, bypass", "diffusers")
# Columns of the step table that identify a row's case.
_CASE = ("ComfyUI", "model", "batch")
_OWN = 1  # of (seconds, seconds of processor time)


def ratio(rows: dict[str, list], name: str) -> tuple[float, float, float]:
    """Return the quartiles of a contestant's step over the limit of the same round."""
    limit = rows[LIMIT_OF.get(name, "limit")]
    found = [step[_OWN] / least[_OWN] for step, least in zip(rows[name], limit, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4)
    return middle, low, high


def median(rows: list) -> float:
    """Return the median seconds of processor time."""
    return statistics.median(row[_OWN] for row in rows)


def verdict(rows: dict[str, list]) -> str:
    """Return the bars that a case holds or misses."""
    if median(rows["limit"]) < BAR_FROM:
        return "limit < 250 ms"
    missed = [name for name, bar in BARS.items() if ratio(rows, name)[0] > bar]
    if ratio(rows, "attention")[0] > ratio(rows, "diffusers")[0]:
        missed.append("diffusers")
    core = [median(rows[name]) for name in ("core", "core, bypass") if name in rows]
    if core and min(core) < 2 * median(rows["linear + conv"]):
        missed.append("core")
    return f"missed: {', '.join(missed)}" if missed else "held"


def line(case: Case, rows: dict[str, list], host: str) -> str:
    """Return a case as a row of the table.

    Args:
        host: ComfyUI's version.
    """
    cells = [host, case.model, f"{case.batch}{', checkpointed' if case.checkpointing else ''}"]
    cells += [f"{median(rows[name]) * 1e3:.0f}" for name in ("forward", "limit")]
    for name in RATIOS:
        if name not in rows:
            cells.append("-")
            continue
        middle, low, high = ratio(rows, name)
        cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
    return f"| {' | '.join(cells)} | {verdict(rows)} |"


def steps(found: dict[Case, dict], threads: int, rounds: int, host: str) -> str:
    """Return the whole table."""
    heads = [*_CASE, "forward, ms", "limit, ms", "Graft, attention", "Graft, linear + conv"]
    heads += ["core's node", "core's, bypass", "diffusers", "bars"]
    lines = [
        "A whole step over the bare model's forward and backward (limit), LoRA of rank 8, fp32 on the CPU. Medians and",
        f"quartiles of {rounds} rounds of processor time, torch on {threads} of two cores that other programs use too.",
        "A step below 0.1 s counts as the mean of several, without the first.",
        "core's node trains every layer, as *linear + conv* does, diffusers attention, held against its own network's",
        "limit. Bars, from a limit of 250 ms on: attention 1.10, linear + conv 1.20, core's node twice as long in",
        "either mode, Graft on attention not above diffusers.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    return "\n".join([*lines, *(line(case, rows, host) for case, rows in found.items())])


def growth(found: dict[Case, dict], host: str) -> str:
    """Return a table of the growth of a step's cost with batch size and latent size."""
    one, many, wide = found.items()
    lines = [f"| ComfyUI {host}, from | to | model's operations | limit | step |", "|---|---|---|---|---|"]
    for (case, rows), words in ((many, "pictures in a batch"), (wide, "times the side")):
        more = [rows["operations"] / one[1]["operations"]]
        more += [median(rows[name]) / median(one[1][name]) for name in ("limit", "attention")]
        count = case.batch if case.batch > 1 else 2
        lines.append(f"| 1 | {count} {words} | " + " | ".join(f"x {factor:.2f}" for factor in more) + " |")
    return "\n".join(lines)


def memory(found: dict[str, dict], host: str) -> str:
    """Return the table of peaks, with ours over their allowed memory."""
    bare = found["limit"]["peak"]
    lines = [f"| peak memory, ComfyUI {host}, batch 1 | MB | over bare + adapters + optimizer |", "|---|---|---|"]
    for name, row in found.items():
        allowed = bare + row["adapters"]
        share = f"{row['peak'] / allowed:.3f}" if row["adapters"] else "-"
        lines.append(f"| {'bare model' if name == 'limit' else name} | {row['peak'] / MEGABYTE:.0f} | {share} |")
    return "\n".join(lines)


def draw(found: dict[Case, dict], path: Path) -> None:
    """Draw the ratios as bars, one group per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in RATIOS if any(name in rows for rows in found.values())]
    figure, axes = pyplot.subplots(figsize=(12, 0.42 * len(found) + 1.6), dpi=110)
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        rows = [(row, *ratio(found[case], name)) for row, case in enumerate(found) if name in found[case]]
        at = [row + place * height for row, *_ in rows]
        spread = [[middle - low for _, middle, low, _ in rows], [high - middle for _, middle, _, high in rows]]
        axes.barh(at, [middle for _, middle, _, _ in rows], height, xerr=spread, label=name, error_kw={"lw": 0.8})
    axes.axvline(1.0, color="black", lw=1)
    labels = [f"{case.model}, {case.batch}{' ckpt' if case.checkpointing else ''}" for case in found]
    axes.set_yticks([row + 0.4 for row in range(len(found))], labels)
    axes.invert_yaxis()
    axes.set_xlabel("whole step / forward and backward of the bare model")
    # Above the axes, so that no bar covers it.
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def put_into_docs(text: str) -> None:
    """Each part between the marks in place of the one that begins alike; what was not measured now stays as it is."""
    path = ROOT / "docs" / "benchmarks.md"
    whole = path.read_text(encoding="utf-8")
    head, rest = whole.split(BEGIN)
    known, tail = rest.split(END)
    path.write_text(f"{head}{BEGIN}\n{merged(known.strip(), text)}\n{END}{tail}", encoding="utf-8")


def merged(known: str, fresh: str) -> str:
    """Merge the parts of `fresh` into `known`, replacing parts that begin alike; new parts come last.

    Empty lines separate the parts. Rows of other cases stay in the step table.
    """
    parts = {_beginning(part): part for part in known.split("\n\n") if part}
    for part in fresh.split("\n\n"):
        old = parts.get(_beginning(part), "")
        parts[_beginning(part)] = _with_rows(old, part) if part.startswith(f"| {_CASE[0]} |") else part
    return "\n\n".join(parts.values())


def _beginning(part: str) -> str:
    """Return a table's heads or a text's first words; its numbers may differ."""
    first = part.splitlines()[0]
    return first if first.startswith("|") else " ".join(first.split()[:3])


def _with_rows(old: str, new: str) -> str:
    rows = {tuple(row.split("|")[1 : 1 + len(_CASE)]): row for row in (*old.splitlines()[2:], *new.splitlines()[2:])}
    return "\n".join([*new.splitlines()[:2], *rows.values()])
