"""Numba kernels of losses and optimisers."""
