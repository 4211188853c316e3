"""The calls behind the nodes, one file an action."""
