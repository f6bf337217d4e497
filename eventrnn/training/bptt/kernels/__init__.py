"""Numba kernels of the backward pass."""
