"""README of an exported job: the files that it needs, and the commands that check and run it elsewhere."""

import os
import shlex
from typing import Any

_PACK = os.path.basename(os.path.abspath(os.path.join(__file__, "..", "..", "..", "..")))

_TEXT = """# {name}: a training for Graft

Copy this folder below ComfyUI's folder on the other machine. That ComfyUI needs Graft and these model files:

{files}

Run the commands in ComfyUI's folder, with its Python. First see what is missing there; this starts nothing:

    python {job} --check {folder}

One GPU, or the CPU with --cpu at the end:

    python {job} {folder}

Two GPUs, with accelerate or with torchrun:

    accelerate launch --multi_gpu --num_processes 2 {job} {folder}
    torchrun --standalone --max-restarts 3 --nproc_per_node 2 {job} {folder}

One or two machines of four GPUs, on each of them. HOST is the first one's address, and all see one `output` folder:

    torchrun --max-restarts 3 --nnodes 1:2 --nproc_per_node 4 \
--rdzv_backend c10d --rdzv_endpoint HOST:29500 {job} {folder}

If a process or a machine other than HOST is lost, or a machine joins, torchrun starts all again from the last save.

Two machines with SLURM, from its login machine:

    sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 4 --wrap "srun torchrun --nnodes 2 --nproc_per_node 4 \
--rdzv_backend c10d --rdzv_endpoint \\$(scontrol show hostnames \\$SLURM_JOB_NODELIST | head -n 1):29500 {job} {folder}"

A job that ended early continues when it is started again, with any number of processes. The result is in
`output/graft/RUN`. ComfyUI's own options, such as --output-directory, follow the folder.
"""


def job_readme(name: str, base: dict[str, Any]) -> str:
    """Return the text of the README of a job folder `name` with this base, see `provenance.describe`."""
    files = "\n".join(
        f"- `models/{row['list']}/{row['name']}`, {row['bytes'] / 1e6:.0f} MB, SHA-256 {row['sha256']}"
        for row in base["files"]
    )
    job, folder = shlex.quote(f"custom_nodes/{_PACK}/job.py"), shlex.quote(f"output/graft/jobs/{name}")
    return _TEXT.format(name=name, files=files, job=job, folder=folder)
