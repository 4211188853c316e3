"""House rules of language: first lines of docstrings, names that were replaced, and filler variables.

    python -m tests.support.language    list what breaks them; exit status 1 if anything does

Part of `make lint`.
"""

import ast
import io
import re
import sys
import tokenize

from .host import ROOT

FOLDERS = ("trainers", "nodes", "tests", "benchmarks", "docs")
SHIPPED = ("trainers/**/*.py", "nodes/**/*.py", "job.py")
# A first line is a noun phrase or an imperative.
OPENINGS = re.compile(r"(What|Which|How|Where|Who|Whoever|Whether|That)\b")
# Names that were replaced by the field's own; as identifiers they are not to come back.
REPLACED = {
    "Account": "DevicePeakMemory",
    "Ahead": "Prefetcher",
    "Apart": "PerParameterOptimizer",
    "Board": "MessageStore",
    "Carrier": "WeightTransfer",
    "Conveyor": "BlockPrefetcher",
    "Desk": "TrainingRegistry",
    "Differences": "FullDiff",
    "Handling": "Augmentation",
    "HoleCache": "InpaintMaskCache",
    "Hurried": "PreviewSkipped",
    "Ladder": "OOMFallback",
    "LevelLosses": "LossByTimestep",
    "Mapped": "MmapTransfer",
    "Meter": "TensorTracker",
    "Mover": "ParameterUpdater",
    "Parted": "PeerLostError",
    "Resident": "ProcessMemory",
    "Shards": "ShardedWeights",
    "Shown": "Sample",
    "SideStream": "StreamTransfer",
    "Widgets": "TrainInputs",
    "Wish": "UserCommand, ClassImageRequest, CompareRequest",
    "_Crew": "WorkerGroup",
    "_Member": "Worker",
    "_drifts": "prior_losses",
    "attended": "run_controlled",
    "bring_back": "onload",
    "check_slopes": "check_gradients",
    "hold_back": "mark_offloaded",
    "host_layer": "export_layer",
    "is_reserved": "is_windows_reserved",
    "keep_away": "offload_blocks",
    "native_layer": "peft_layer",
    "part_of": "crop_sample",
    "passes_of": "forward_passes",
    "stays_away": "is_offloaded",
    "take_back": "discard_gradients",
    "terms_of": "loss_terms",
    "why_costly": "regex_problem",
    "with_word": "with_embedding",
}
# A variable of such a name does not say what it holds: its reader has to look up each assignment.
FILLERS = {"found", "made", "one", "said", "some", "things", "told"}
BRITISH = re.compile(
    r"(optim|quant|normal|parameter|initial|serial|random|synchron|regular)is[ei]|colour|neighbour|grey|centred|_centre$",
    re.I,
)


def problems_in(text, path):
    """Yield one line for each broken rule in a Python file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            opening = OPENINGS.match(ast.get_docstring(node) or "")
            if opening:
                yield f"{path}:{getattr(node, 'lineno', 1)}: the docstring begins with {opening.group()}"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.NAME:
            continue
        if token.string in REPLACED:
            yield f"{path}:{token.start[0]}: {token.string} is now {REPLACED[token.string]}"
        elif BRITISH.search(token.string):
            yield f"{path}:{token.start[0]}: {token.string}: American spelling in identifiers"


def spellings_in(text, path):
    """Yield one line for each British spelling in a JavaScript file."""
    for number, line in enumerate(text.splitlines(), 1):
        for word in re.findall(r"\w+", line):
            if BRITISH.search(word):
                yield f"{path}:{number}: {word}: American spelling in identifiers"


def fillers_in(text, path):
    """Yield one line for each variable or parameter of a Python file that has a filler name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            name = node.name
        else:
            continue
        if name in FILLERS:
            yield f"{path}:{node.lineno}: {name} is a filler: name what the variable holds"


def list_problems():
    """All broken rules in the tree, one line each."""
    lines = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name != "tests/support/language.py":
                lines += problems_in(path.read_text(encoding="utf-8"), name)
    for path in sorted((ROOT / "web").rglob("*.js")):
        lines += spellings_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    for pattern in SHIPPED:
        for path in sorted(ROOT.glob(pattern)):
            lines += fillers_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    return lines


if __name__ == "__main__":
    problems = list_problems()
    print("\n".join(problems))
    sys.exit(bool(problems))
