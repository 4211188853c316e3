"""Documentation. `docs.build` holds the scripts that write generated files."""
