"""Benchmarks of training cost against its lower bound and against other trainers: `make bench`.

The modules that `python -m benchmarks.NAME` runs are step, memory, datasets, start_up, offload, estimate and scaling.
"""

# tests sets how OpenMP's threads wait, which must happen before torch is imported.
import tests  # noqa: F401
