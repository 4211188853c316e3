"""Datasets: folder scans, captions, masks, buckets, class images and reports."""
