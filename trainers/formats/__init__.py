"""The files that are written and read: adapters, their metadata, anything in safetensors."""
