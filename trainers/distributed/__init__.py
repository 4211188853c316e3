"""Several processes that train together, by accelerate and FSDP2."""
