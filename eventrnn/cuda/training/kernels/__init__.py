"""Numba kernels of training on a GPU."""
