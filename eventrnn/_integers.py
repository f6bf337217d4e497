"""Integer arithmetic that every part of the package shares; kernels may call it too."""

from __future__ import annotations


def ceil_div(a, b):
    """a / b, rounded up to a whole number; b > 0."""
    return -(-a // b)


def round_up(a, multiple):
    """The smallest multiple of `multiple` that is not below a."""
    return -(-a // multiple) * multiple
