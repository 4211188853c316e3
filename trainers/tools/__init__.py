"""What is done with adapters once they are trained: merged, resized, extracted, looked at."""
