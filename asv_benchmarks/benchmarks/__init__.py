"""Benchmarks of lowrank over its history; lower is better for every one of them."""
