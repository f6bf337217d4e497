"""Numba kernels of the CPU backend."""
