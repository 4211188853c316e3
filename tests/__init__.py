"""The tests: they mirror the tree, on a real ComfyUI, a tiny pretrained base and a real browser."""

import sys

# pytest finds this package below one that is named after the checkout's folder; ours is `tests`, always.
sys.modules["tests"] = sys.modules[__name__]
