"""Preprocessing of examples into batches: crops, latents, conditionings, caches, the sampler, prefetching."""
