"""Import of the settings of other trainers."""
