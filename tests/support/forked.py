"""Tests in processes of their own, forked from one that has registered the simulated GPU and loaded ComfyUI.

    @forked
    def test_something(tmp_path): ...

torch registers a device for the lifetime of a process, so no other test may share it. The first such test starts the
process to fork from, which takes as long as ComfyUI's imports; every test takes a fork.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import traceback

from .host import ROOT

# Importing these takes longer than any test.
HEAVY = [
    "comfy.sample",
    "comfy.samplers",
    "comfy.sd",
    "diffusers.training_utils",
    "graft_pack.nodes.host.actions.train",
    "graft_pack.trainers.engine.session",
    "peft.tuners.lora",
    "prodigyopt",
    "pytest",
    "tests.support.diffusers_host",
    "tests.support.models",
    "tests.toy.host",
    "torch._dynamo",
    "torch.utils.checkpoint",
    "transformers.optimization",
]
SECONDS = 240


def forked(test):
    """Run a test in a process of its own. Its arguments must be picklable."""

    @functools.wraps(test)
    def run(**arguments):
        report = start_origin().run(test.__module__, test.__name__, arguments)
        assert report is None, f"failed in its own process:\n{report}"

    run.is_forked = True
    return run


@functools.cache
def start_origin():
    """Return the process that forks, started once."""
    origin = Origin()
    atexit.register(origin.close)
    return origin


class Origin:
    """The process that forks."""

    def __init__(self):
        # One thread, because threads do not survive a fork.
        names = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "tests.support.forked"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **names},
        )

    def run(self, module, name, arguments):
        """Run a test. Return the report of a failure, None for success."""
        asked = {"module": module, "name": name, "arguments": pickle.dumps(arguments).hex()}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            return f"the process that forks has ended:\n{self._errors.read()[-20_000:]}"
        return json.loads(answer)["report"]

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait(20)


def serve():
    """Load everything, then run one test for each line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from . import pack, simulated_device

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    for name in HEAVY:
        importlib.import_module(name)
    simulated_device.register()
    # A collection in a fork would visit, and so copy, all memory that the forks share.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps({"report": fork(json.loads(line))}) + "\n")
        answers.flush()


def fork(asked):
    """Run a test in a fork. Return the report of a failure, None for success."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        # No clean-up: the parent's exit handlers would delete its folders, and the device ends with the process.
        os._exit(call(asked))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        printed = pipe.read().decode(errors="replace")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == 0 else f"exit code {status}\n{printed[-20_000:]}"


def call(asked):
    """Call a test's own function. Return an exit code."""
    import numpy as np
    import torch

    signal.alarm(SECONDS)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        test = getattr(importlib.import_module(asked["module"]), asked["name"])
        test.__wrapped__(**pickle.loads(bytes.fromhex(asked["arguments"])))
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve()
