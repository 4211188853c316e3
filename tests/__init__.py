"""Tests, sorted by their needs: no ComfyUI (unit), ComfyUI in process (comfy), a server (server), a browser (web)."""

import os
import sys

# OpenMP's waiting threads spin, which made a step 15 times slower on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# pytest finds this package below one named after the checkout's folder; imports always use `tests`.
sys.modules["tests"] = sys.modules[__name__]
