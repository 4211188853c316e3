"""Recipe of a run: all of its options, and its identity."""
