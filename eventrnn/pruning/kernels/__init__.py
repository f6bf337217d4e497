"""Numba kernels of mask search."""
