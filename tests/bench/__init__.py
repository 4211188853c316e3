"""Benchmarks of training cost against its lower bound and against other trainers: `make bench`."""
