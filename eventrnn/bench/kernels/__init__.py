"""Numba kernels that only benchmarks use: probes of bandwidth and arithmetic."""
