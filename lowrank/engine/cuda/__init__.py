"""Chains on an NVIDIA GPU, through CuPy."""
