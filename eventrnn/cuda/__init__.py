"""The CUDA engine: the bits of the CPU engine, a whole stack and sequence in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eventrnn.cuda.engine import CudaEngine
    from eventrnn.network import Network


class CudaBackend:
    """One NVIDIA GPU; the exact tier. Opening it is left to the first engine, so that any machine can name it."""

    name = "cuda"
    exact = True

    def engine(self, network: Network, *, threads: int = 1) -> CudaEngine:
        """Pack the weights and put them on the GPU. Raises BackendUnavailable where there is none."""
        if threads != 1:
            raise ValueError(f"threads: got {threads}, but the cuda backend has its own; use 1")
        from eventrnn.cuda.engine import CudaEngine

        return CudaEngine(network)
