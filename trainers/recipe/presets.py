"""Presets: values of options for a purpose, which fill the fields that the user leaves unset."""

from typing import Any

# {(node, input): value} by preset. docs/sources.md names the source of each.
PRESETS: dict[str, dict[tuple[str, str], Any]] = {
    "SDXL character": {
        ("optimizer", "optimizer"): "Prodigy",
        ("optimizer", "beta2"): 0.99,
        ("objective", "weighting"): "min-SNR",
        ("objective", "min_snr_gamma"): 5.0,
    },
    "SDXL style": {("adapter", "targets"): "style"},
    "Flux character": {
        ("optimizer", "ema_decay"): 0.99,
        ("objective", "timesteps"): "sigmoid",
        ("memory", "checkpointing"): "on",
    },
    "low memory": {
        ("optimizer", "optimizer"): "Adafactor",
        ("memory", "checkpointing"): "on",
        ("memory", "micro_batch"): 1,
        ("memory", "offload"): "on",
        ("memory", "base_dtype"): "fp8 (scaled)",
    },
}
