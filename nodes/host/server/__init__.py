"""The page: messages, control, progress, routes."""
