"""Variants of the adapter types, which `adapter_args` chooses."""

# Name of the module in peft's layer that drops ranks, see `dropouts`.
NAME = "structure_dropout"
