"""A training step: its plan, its batches, its loss."""
