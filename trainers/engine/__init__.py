"""One training from recipe to adapter: session, loop, step, updater, checks, fallbacks."""
