"""Training in processes of its own: launcher, worker, provenance of the model."""
