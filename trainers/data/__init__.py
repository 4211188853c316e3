"""From a folder to batches: scan, captions, crops, caches, order."""
