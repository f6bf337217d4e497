"""CUDA kernels: factories that return a Python function and its Numba signature for `device.compile_ptx`."""
