"""Communication with ComfyUI's page: messages, commands, progress, routes."""
