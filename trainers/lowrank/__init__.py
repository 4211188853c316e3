"""Layers with a low-rank adapter, computed in few operations."""
