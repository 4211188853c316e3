"""Datasets: folder scans, captions, masks, buckets and class images."""
