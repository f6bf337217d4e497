"""The CUDA engine: the bits of the CPU engine, a whole stack and sequence in one launch.

Same bits: every drive takes its terms in ascending presynaptic order, one FMA a term; the rules of `cells.py` are
compiled again over CUDA's primitives, with IEEE division and no contraction (`device.compile_ptx`).

One launch: tiles of up to 32 units belong to blocks, all of them resident at once. What a unit sends goes to its own
word in a record of the run that starts out full of "not sent yet"; whoever needs it looks until it is there
(`kernels.py`). No grid barrier, no buffer to reuse, no order to keep between layers: a layer follows the one below as
its events come. The same record gives read-out, counts and what a caller asked to see.

Plans: with sparse weights, a layer of a stream lives in one cluster of blocks, which write what they send into each
other's shared memory (`cluster_plan.py`, `cluster.py`); the record then serves the layers above and who reads
afterwards, and what a layer adds to the drives of the next is worked out by a cluster of its own. Else (`plan.py`) one
sample has a block a tile, with as little code as can be (`single.py`), and many samples are dealt out in groups,
whose blocks own more tiles each. Weights stay in shared memory where they fit, else in L2. Products that need not wait,
of the first layer's input and of the read-out, are done for all steps together (`products.py`).

device   : the door to the CUDA packages; compiling, loading, launching;  transfer: large copies to and from the host
ptx      : instructions that Numba lacks
tables   : what the kernels' tables hold
packing  : weights as strips;  matrix: one on the GPU, and its products
walks    : one strip times one list of events
lookup   : one strip times what those few units sent that reach it
kernels  : `layers`, any number of tiles and samples a block;  single: one;  cluster: tiles shared out in a cluster
launch   : what these are told, and which of them it is
piece    : the memory of a run, kept between runs
arrays   : arrays and states that stay on the GPU;  borders: kernels that look at what comes and goes
stepper  : single steps, as a graph
tensor   : layers of many streams through tensor cores, not exact;  rounded: their kernels
engine   : a network on the GPU
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eventrnn.cuda.engine import CudaEngine
    from eventrnn.network import Network


PRECISIONS = ("float16", "bfloat16", "tf32")


class CudaBackend:
    """One NVIDIA GPU. Opened by the first engine only, so that any machine can name it.

    exact     : False lets layers of 4 streams or more go through tensor cores, where that is measured to be faster: at
                the first run of each batch size, on what it is fed; steps measure nothing, and go as the last run of
                their batch size went, exactly before one. `Simulation.paths` says which. Layers of the paper's variant,
                and those with weights that float16 cannot hold where that is asked for, stay exact
    precision : of weights and events there, "float16" (where none is given), "bfloat16" or "tf32"; sums and cells are
                float32. Only with exact=False

    Raises ValueError for a precision that is none of these, or that an exact run would not use.
    """

    name = "cuda"

    def __init__(self, exact: bool = True, precision: str | None = None):
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision: got {precision!r}, need one of {', '.join(PRECISIONS)}")
        if exact and precision is not None:
            raise ValueError(
                f"precision: got {precision!r}, but exact runs round nothing; give exact=False with it, or leave it out"
            )
        self.exact, self.precision = exact, None if exact else precision or PRECISIONS[0]

    def engine(self, network: Network, *, threads: int = 1) -> CudaEngine:
        """Pack the weights and put them on the GPU; kernels are compiled at the first run of each plan, in seconds.

        Raises BackendUnavailable with the reason where there is no GPU, and ValueError for `threads` other than 1.
        """
        if threads != 1:
            raise ValueError(f"threads: got {threads}, but the cuda backend brings its own; leave it out")
        from eventrnn.cuda.engine import CudaEngine

        return CudaEngine(network, self.precision)
