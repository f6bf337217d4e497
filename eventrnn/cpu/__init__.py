"""The CPU backend: compiled by Numba, bitwise equal to the reference."""
