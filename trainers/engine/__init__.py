"""One training from recipe to adapter: session, loop, updater, checks, fallbacks."""
