"""File formats: safetensors and JSON, adapters, embeddings and their metadata."""
