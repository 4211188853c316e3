"""Implementations of the nodes, one file per action."""
