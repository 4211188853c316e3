"""Device memory: autograd helpers, checkpointing, offloading, byte counts, out-of-memory errors."""
