"""Runs in a separate process, so that a measurement excludes other work's memory, threads and imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

# Followed by an order: the arguments of that module's `_one`.
OPTION = "--one"


def subprocess_run(module: str, environment: dict[str, str] | None = None, **order: Any) -> Any:
    """Run a module's `_one` for an order in its own process and return the result; both are JSON-serializable."""
    command = [sys.executable, "-m", module, OPTION, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise SystemExit(f"{module} {order} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
