"""Runs on disk: folders, checkpoints, records, history, loss statistics."""
