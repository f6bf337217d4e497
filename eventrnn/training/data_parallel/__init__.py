"""Training on several GPUs of one machine: an update is that of the joined batch, of which each GPU has some samples.

One process per GPU. The process of the trainer is rank 0: it has the data, the pruning, the validations and the
checkpoints. The others are started by it (`crew`), hold a copy of the parameters, and do the same update on the samples
that they are sent (`worker`). Gradients are summed on the GPUs (`cuda.training.exchange`) while the backward pass goes
on; then every rank clips by the joined norm and applies the update rule, so that all copies keep the same bits.

Noise is that of the joined batch, whatever the number of devices: masks that the samples share are the same everywhere.
So the number of devices changes rounding only, and a checkpoint can be continued with another number.

messages : what the processes tell each other
crew     : starts the other processes, and notices when one of them ends or hangs
worker   : the other processes
engine   : what the trainer calls
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventrnn._gpus import VARIABLE, visible_gpus

if TYPE_CHECKING:
    from eventrnn.backend import TrainingEngine


def need_devices(devices: int) -> list[str]:
    """The names of the GPUs that this process may use. Raises ValueError if there are fewer than `devices`."""
    names = visible_gpus()
    if len(names) < devices:
        there = {0: "no GPU is", 1: "one GPU is"}.get(len(names), f"{len(names)} GPUs are")
        raise ValueError(f"devices: got {devices}, but {there} here (nvidia-smi, {VARIABLE}); use at most as many")
    return names


def DataParallelEngine(*arguments: Any) -> TrainingEngine:
    """The engine of `engine.py`, which imports the CUDA packages."""
    from eventrnn.training.data_parallel.engine import DataParallelEngine as Engine

    return Engine(*arguments)
