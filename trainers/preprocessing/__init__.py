"""Examples to batches: crops, latents and conditionings, caches, the sampler, prefetching."""
