"""Tools for trained adapters: merge, resize, extract, inspect, compare and plot."""
