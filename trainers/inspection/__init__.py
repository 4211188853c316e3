"""Reports on a dataset before training: findings, contact sheet, near duplicates, warnings."""
