"""The tests: they mirror the tree, on a real ComfyUI, a tiny pretrained base and a real browser."""

import os
import sys

# On a shared machine OpenMP's threads, spinning while they wait, made a step 15 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# pytest finds this package below one that is named after the checkout's folder; ours is `tests`, always.
sys.modules["tests"] = sys.modules[__name__]
