"""Backpropagation through time over events."""
