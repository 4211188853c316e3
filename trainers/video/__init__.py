"""Frames of video files, and the pieces of clips that are trained on."""
