"""Check of a job folder: list all that this machine lacks to run it, before anything starts."""

import logging
import os
import shutil
from collections.abc import Iterator

import comfy.model_management
import folder_paths

from ....trainers.engine.job import Job, cache_problems, read_job
from ....trainers.errors import GraftError
from .. import paths
from . import provenance
from .launcher import count_devices
from .worker import DONE, FAILED, set_paths

log = logging.getLogger(__name__)


def main(folder: str) -> int:
    """Print what the job in a folder needs and lacks here, and return the exit status: 0 if nothing is missing."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    set_paths()
    try:
        job = read_job(folder)
    except GraftError as error:
        log.error("MISSING %s", error)
        return FAILED
    log.info("ok      the job '%s': %d pictures, %d steps", folder, len(job.dataset.examples), job.recipe.steps)
    missing = [str(error) for error in (*cache_problems(folder, job), *provenance.problems(job.base))]
    missing += _problems_of_output()
    for note in _notes(job):
        log.info("note    %s", note)
    for problem in missing:
        log.error("MISSING %s", problem)
    log.info("Graft: %s", f"{len(missing)} things are missing." if missing else "nothing is missing.")
    return FAILED if missing else DONE


def _problems_of_output() -> list[str]:
    folder = _existing(paths.folders().runs)
    can_write = os.path.isdir(folder) and os.access(folder, os.W_OK)
    return [] if can_write else [f"The output folder '{folder}' cannot be written."]


def _existing(path: str) -> str:
    """Return a path, or the first of the folders above it that exists."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _notes(job: Job) -> Iterator[str]:
    device = comfy.model_management.get_torch_device()
    memory = comfy.model_management.get_total_memory(device) / 1e9
    yield f"{count_devices(device)} device(s), {comfy.model_management.get_torch_device_name(device)}, {memory:.1f} GB"
    output = _existing(folder_paths.get_output_directory())
    yield f"{shutil.disk_usage(output).free / 1e9:.0f} GB free in {output}"
    exported = job.base.get("versions")
    for name, here in provenance.versions().items():
        there = exported.get(name, here) if isinstance(exported, dict) else here
        if there != here:
            yield f"{name} is {here} here and was {there} at the export. Results may differ in their last digits."
