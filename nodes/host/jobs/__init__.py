"""Training in separate processes: launcher, worker, provenance of the model."""
