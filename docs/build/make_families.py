"""Table of trainable model classes in docs/models.md, measured on a small copy of each of ComfyUI's classes.

    python -m docs.build.make_families

Rows of classes that this host lacks stay as another host wrote them: run it with each (`COMFYUI_PATH=...`). A test
checks the measurements against their bars, and the table against the classes.
"""

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support import models, networks, pack
from tests.support.host import ROOT

PAGE = ROOT / "docs" / "models.md"
HEADING = "Measured classes"
HEAD = "| class | predicts | layers | gradient | checkpointed | applied | unread keys |"
LEFT_OUT_HEAD = "| not in the table | why |"
LARGE = {"steps": 3, "learning_rate": 5e-2, "batch_size": 2}
STEP = 0.002  # step of finite differences


@dataclass(frozen=True)
class Row:
    """Measurements of a model class.

    Attributes:
        parameterization: the prediction type.
        layers: number of layers adapted by default.
        plain, checkpointed: the gradient's relative error against finite differences, the larger of those of A and B.
        apart: distance between the gradients with and without checkpointing.
        effect: of three steps, |trained - base| / |base|.
        applied: |applied - trained| / |trained - base|, where core has applied the file.
        unread: keys of the file that core does not read.
        losses: of the three steps.
    """

    parameterization: str
    layers: int
    plain: float
    checkpointed: float
    apart: float
    effect: float
    applied: float
    unread: list[str]
    losses: list[float]


def list_classes() -> list[str]:
    """Return the names of the classes that this host can load."""
    import comfy.supported_models

    return [kind.__name__ for kind in comfy.supported_models.models]


def error_of(training, part: str, step: float) -> float:
    """Return the relative error of the derivative along one direction of all A or all B."""
    from tests.support.gradients import directional_error

    parameters = [value for name, value in training.plan.trainables.items() if f"lora_{part}" in name]
    return directional_error(training.losses, parameters, step=step)[0]


@functools.cache
def measure(name: str) -> Row:
    """Train a small model of a class, and apply the adapter with core's own loader."""
    import torch

    model = load(name, torch.float64)
    errors = []
    gradients = []
    for checkpointing in (False, True):
        with models.in_training(model, name, checkpointing, spread=0.1) as training:
            with models.float64_throughout(training):
                gradients.append(models.joined(training.gradients()))
                errors.append(max(error_of(training, part, STEP) for part in "AB"))
            found = training.denoiser.parameterization, len(training.plan.trainables) // 2
    return Row(*found, *errors, models.distance(gradients[1], gradients[0]), *_apply(load(name, torch.float32), name))


def load(name: str, dtype):
    """Return a MODEL as the graph has it: loaded under inference mode."""
    import torch

    with torch.inference_mode():
        return models.patcher(name, dtype)


def _apply(model, name: str) -> tuple:
    import comfy.sd
    import comfy.utils
    import torch
    from graft_pack.nodes.host.model.lora import unread_keys
    from graft_pack.trainers.formats.adapter import Adapter, save_adapter
    from graft_pack.trainers.objective.noise import spread_sigmas

    x = torch.randn(1, *networks.CLASSES[name].latent, generator=torch.Generator().manual_seed(9))
    one = models.conditioning(name, 9)
    with tempfile.TemporaryDirectory() as folder, models.in_training(model, name, **LARGE) as training:
        sigma = float(spread_sigmas(training.denoiser.sigmas(), 5)[2])
        before = models.denoised(model, x, sigma, one)
        state = models.train(training, Path(folder))
        trained = models.trained_denoised(training, x, sigma, one)
        adapter = Adapter(training.plan.export(state.trainables, 0).adapter)
        path = f"{folder}/adapter.safetensors"
        save_adapter(path, adapter, name)
        tensors = comfy.utils.load_torch_file(path)
    applied = models.denoised(comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0], x, sigma, one)
    moved = (trained - before).norm()
    effect = float(moved / (before - x).norm())
    return effect, float((applied - trained).norm() / moved), unread_keys(model, None, tensors), state.losses


def show(name: str, row: Row) -> str:
    """Return a row of the table."""
    cells = (
        f"`{name}`",
        row.parameterization,
        str(row.layers),
        f"{row.plain:.0e}",
        f"{row.checkpointed:.0e}",
        f"{row.applied:.0e}",
        str(len(row.unread)),
    )
    return f"| {' | '.join(cells)} |"


def read_rows(page: str) -> dict[str, str]:
    """{class: line} of the table on the page."""
    section = page.split(f"\n## {HEADING}\n")[1].split("\n## ")[0].split(LEFT_OUT_HEAD)[0]
    return {match.group(1): match.group(0) for match in re.finditer(r"^\| `(\w+)` \|.*$", section, re.M)}


def list_others() -> list[str]:
    """Return the table of unmeasured classes: those that equal another, and those left out, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, other in networks.ALIKE.items():
        by_reason.setdefault(f"as `{other}` in other sizes", []).append(name)
    for name, reason in networks.LEFT_OUT.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for reason, names in by_reason.items()]
    return [LEFT_OUT_HEAD, "|---|---|", *lines]


def main():
    pack.use_comfy()
    pack.load_pack()
    page = PAGE.read_text(encoding="utf-8")
    rows = read_rows(page)
    here = set(list_classes())
    for name in networks.CLASSES:
        if name in here:
            rows[name] = show(name, measure(name))
            print(rows[name], flush=True)
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1), *(rows[name] for name in networks.CLASSES if name in rows)]
    before = page[: page.index(HEAD)]
    end = page.find("\n## ", len(before))
    after = page[end:] if end >= 0 else ""
    PAGE.write_text("\n".join([before + lines[0], *lines[1:], "", *list_others(), after]), encoding="utf-8")


if __name__ == "__main__":
    main()
