"""The recipe: all options of a run, and its identity."""
