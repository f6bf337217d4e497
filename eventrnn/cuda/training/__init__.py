"""Training on NVIDIA GPUs, behind the same `Trainer` as on the CPU.

Parameters, optimiser state and windows stay on the GPU. Factors of products are rounded to bfloat16 (or TF32, or stay
float32); sums, cells, gradients and parameters are float32. An update is one CUDA graph per size of window. Two runs
with one seed give the same bits: every sum has a fixed order, and random numbers are a function of seed, step and
place.

layout     : where each parameter lies in the flat array of all parameters
mirror     : host arrays that follow what is on the GPU
lanes      : streams side by side, with their cuBLAS handles
memory     : arrays of a window, with their size stated beforehand
flat_arrays: parameters, gradients and operands, and addresses in them
parameters : the same of a run, with optimiser state, masks, and the update
tensor_parameters : the same of a caller, who keeps them in arrays of its own
gated      : the product of a matrix of gated blocks; gated_sizes : its arrays
window     : where the arrays of a window lie; its lanes
cell_rules : what each cell has: arrays, kernels of a step
forward    : the forward pass, the loss, counts of events
backward   : the backward pass and penalties
program    : an update for one size of window, as graphs
evaluation : the forward pass without noise
engine     : what the trainer calls
module     : windows on arrays of a caller, for modules of other libraries
exchange   : sums over the GPUs of a run, each of which has such an engine (`training.data_parallel`)
kernels/   : device code
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eventrnn.backend import TrainingEngine


def CudaTrainingEngine(*arguments: Any) -> TrainingEngine:
    """The engine of `engine.py`, which imports the CUDA packages."""
    from eventrnn.cuda.training.engine import CudaTrainingEngine as Engine

    return Engine(*arguments)
