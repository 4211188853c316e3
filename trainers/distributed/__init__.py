"""Training with several processes, through accelerate and FSDP2."""
