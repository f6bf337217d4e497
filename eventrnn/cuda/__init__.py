"""The CUDA engine: whole runs of a network on one NVIDIA GPU, with the bits of the CPU engine.

Same bits. Every drive adds its terms in ascending presynaptic order, one FMA per term. The rules of `cells.py` are
compiled over CUDA's primitives (`kernels/ptx.py`), with IEEE division and without contraction (`device.compile_ptx`).

No grid barrier. Neighbouring layers run in one launch that covers all steps, with all of its blocks resident. Each
output has its own word in an event log of the run. The log is filled with UNWRITTEN before the launch, and a warp that
needs a word polls it until it is written. So no buffer is recycled, and a layer follows the layer below as its events
arrive. Read-out, counts and recorded events are computed from the same log after the launch.

A launch follows one of four plans:

- Cluster plan (`cluster_plan.py`, `kernels/cluster.py`): sparse weights, released variant. One layer of a stream lives
  in one thread-block cluster, whose blocks exchange outputs through distributed shared memory. Input drives of all
  layers but the first are computed by clusters of their own. Weights are in shared memory if they fit, otherwise in L2.
- Single-stream plan (`plan.py`, `kernels/single_stream.py`): EGRU, batch 1, one tile of units per block. Blocks
  exchange outputs through the event log. Weights are in shared memory if they fit, otherwise in L2.
- General plan (`plan.py`, `kernels/persistent.py`): every cell, several samples and tiles per block. Samples are
  divided into groups; more groups mean fewer samples but more tiles per block. Weights are in shared memory if they
  fit, otherwise in L2.

- Gated plan (`gated_layer.py`, `kernels/gated_loop.py`): recurrent matrices of gated blocks, one layer per launch.
  Logits travel through a log like events, and every block chooses for itself. Weights are read from L2.

Two kinds of work need no plan. Products without a recurrence (input drives of the first layer, read-out) are computed
for all steps at once (`kernels/batched_products.py`, and `kernels/row_tiles.py` where most inputs are active). With
exact=False, layers of several streams can use tensor cores (`tensor_core_layer.py`): sparse ones in clusters of blocks
(`kernels/tensor_core_cluster.py`), others by cuBLAS (`kernels/tensor_core_cells.py`).

Modules, from the GPU upwards:

device            : the only import of the CUDA packages; compiling, loading, launching, memory
transfer, cublas  : large copies to and from the host; dense products
nccl              : copies between the GPUs of several processes
tables            : constants and table columns that kernels and their callers share
packing, matrix   : weights as strips; one matrix on the GPU and its products
row_tiles         : products of many rows with dense and gated weights
plan, cluster_plan: which block owns which tiles and samples, and what lies in shared memory
run_buffers       : memory of a run, kept between runs; graphs
inputs            : inputs and states on the GPU
launch            : kernel arguments and kernel selection
tensor_core_layer : layers on tensor cores
tensor_core_tiles, tensor_core_loop : sparse weights as tiles, and plans; the time loop of a layer in clusters
gated_matrix, gated_layer : gated blocks: one matrix; a layer whose recurrent matrix has them
device_network    : a network packed for one GPU, and the plans of its launches
run               : a run of one shape: its memory, the work that it enqueues, and its graph
stepper           : single steps, captured as a graph
fused_step        : single steps of sparse networks, one kernel per layer
engine            : inputs, whole sequences in chunks of time, and the memory that is kept between runs
kernels/          : device code; each file says what a thread, a warp and a block own
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eventrnn.cuda.engine import CudaEngine
    from eventrnn.network import Network


# Types to which tensor-core layers can round weights and events.
PRECISIONS = ("float16", "bfloat16", "tf32")


class CudaBackend:
    """One NVIDIA GPU. The driver is opened by the first engine, so the backend can be named on any machine.

    exact     : False allows layers of 4 or more streams to use tensor cores where that is measured to be faster. The
                measurement takes place at the first run of each batch size, on its inputs; `Simulation.paths` reports
                the choice. Single steps measure nothing: they use the choice of the last run of their batch size, and
                are exact before one. Layers of GRU and LSTM cells and of the paper's variant stay exact, and so do
                layers with weights beyond the float16 range if the precision is "float16"
    precision : type of weights and events in those layers: "float16" (the default), "bfloat16" or "tf32"; sums and
                cells are float32. Only with exact=False

    Raises ValueError for an unknown precision, and for a precision together with exact=True.
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
        """Pack the weights and copy them to the GPU. The first run of each plan compiles its kernels, and keeps them.

        Raises BackendUnavailable with the reason if there is no usable GPU, and ValueError for `threads` other than 1.
        """
        if threads != 1:
            raise ValueError(f"threads: got {threads}, but the cuda backend brings its own; leave it out")
        from eventrnn.cuda.engine import CudaEngine

        return CudaEngine(network, self.precision)
