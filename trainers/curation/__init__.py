"""Edits of a dataset's folder: captions, masks, choices, pictures; what a page shows of it."""
