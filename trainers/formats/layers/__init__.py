"""Layers of adapter files: their paths, and their counterparts in diffusers."""
