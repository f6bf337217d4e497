"""Where the arrays of a window lie: what the passes of `forward.py` and `backward.py` have in common.

Every layer has a lane. The window is cut into pieces of time: while a layer works on one piece, the layer below works
on the next one (above, in the backward pass). Work that nobody waits for until the end goes to a side lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eventrnn.cuda.training.cell_rules import CELLS
from eventrnn.cuda.training.gated import GatedProduct
from eventrnn.cuda.training.kernels import sums
from eventrnn.cuda.training.lanes import Factor, Lane, bits
from eventrnn.cuda.training.layout import up
from eventrnn.cuda.training.memory import LayerSizes, Memory, Sizes
from eventrnn.weights import MatrixId

if TYPE_CHECKING:
    from eventrnn.cuda.training.flat_arrays import FlatArrays

# Pieces of time into which a window is cut if the network has several layers, and their fewest steps.
PIECES, FEWEST_STEPS = 7, 8

# Products of single steps of several layers run side by side, each by a kernel for this share of the multiprocessors.
# Measured with three layers on an H200: 4.9 ms per update of the recipe `egru-ptb` without shares, 4.6 ms with two.
FORWARD_SHARES, BACKWARD_SHARES = 2, 4


Copies = list[tuple[int, int, int]]


class Group(Protocol):
    """Processes that copy to each other, each with a GPU of its own: `cuda.nccl.Nccl`."""

    def copy(self, queue: Any, sends: Copies, receives: Copies) -> None: ...

    def abort(self) -> None: ...


class Alone:
    """What a window knows of other devices: there are none. `exchange.Exchange` is the same among several.

    rank, ranks : number of this device among those of the run, and how many there are
    """

    rank, ranks = 0, 1

    def ready(self, lane: Lane, *names: str) -> None:
        """The gradients of these parameters will not change after the work that is on the lane so far."""

    def finish(self, lane: Lane) -> None:
        """Let the lane wait until the gradients of all parameters are those of the joined batch."""

    def add(self, lane: Lane, address: int, count: int, kind: str) -> None:
        """Add up an array over all devices, between the work that is on the lane so far and what follows."""

    def share(self, lane: Lane, array: Any) -> None:
        """Copy an array of rank 0 to the same array of all others, in the same place."""

    def connect(self, group: Group, gradients: int) -> None:
        """Exchange with these processes from now on. gradients : address of those of all parameters"""


@dataclass(frozen=True)
class Lanes:
    """The streams of an engine.

    main   : what comes before and after the layers
    layers : one per layer
    side   : what nobody waits for until the end
    """

    main: Lane
    layers: Sequence[Lane]
    side: Lane

    def fork(self) -> None:
        """Let all others wait for the main lane."""
        mark = self.main.record()
        for lane in (*self.layers, self.side):
            lane.wait(mark)

    def join(self) -> None:
        """Let the main lane wait for all others."""
        for lane in (*self.layers, self.side):
            self.main.wait(lane.record())


class Window:
    """A window of `steps` steps and `batch` samples.

    lanes      : where work is put
    memory     : arrays of windows of at least this size
    parameters : the parameters, and where gradients go
    training   : with noise, and with what the backward pass needs
    seed       : of the noise
    exchange   : with the devices that have the other samples of the batch

    `joined_rows` is the number of rows, steps times samples, of the batch of all devices.

    `products` has the products of all matrices of gated blocks, by name.
    """

    def __init__(
        self,
        sizes: Sizes,
        lanes: Lanes,
        memory: Memory,
        parameters: FlatArrays,
        steps: int,
        batch: int,
        *,
        training: bool,
        seed: int = 0,
        exchange: Alone | None = None,
    ):
        self.exchange = exchange or Alone()
        self.sizes, self.lanes, self.memory = sizes, lanes, memory
        # Updates and counts read more of the parameters of a run than a pass does.
        self.parameters: Any = parameters
        self.steps, self.batch, self.rows = steps, batch, steps * batch
        self.joined_rows = self.rows * self.exchange.ranks
        self.training, self.seed = training, seed
        self.precision, self.size = sizes.precision, lanes.main.size
        pieces = PIECES if len(sizes.layers) > 1 else 1
        length = max(FEWEST_STEPS, -(-steps // pieces))
        self.pieces = [(begin, min(begin + length, steps)) for begin in range(0, steps, length)]
        several = len(sizes.layers) > 1
        self.shares = (FORWARD_SHARES, BACKWARD_SHARES) if several else (1, 1)
        offsets = np.cumsum([0, *(sums.UNIT_COUNTS * layer.padded for layer in sizes.layers)])
        self.count_offsets = [int(offset) for offset in offsets]
        offsets = np.cumsum([0, *(layer.padded_inputs for layer in sizes.layers)])
        self.input_count_offsets = [int(offset) for offset in offsets]
        self.products = {
            name: GatedProduct(self, gated, self._matrix(MatrixId(name))) for name, gated in sizes.gated.items()
        }

    def mask(self, name: str, layer: int = 0) -> tuple[int, int, int, int]:
        """Address of a mask of dropout, bytes from one step and from one sample to the next, and the bits of its scale.
        Zeros without the mask."""
        found = self.sizes.mask(name, layer) if self.training else None
        if found is None:
            return 0, 0, 0, 0
        pitch, batched = up(found.sizes(self.steps, self.batch)[-1]), "B" in found.shape
        samples = pitch if batched else 0
        steps = pitch * (self.batch if batched else 1) if "T" in found.shape else 0
        return self.memory.at(("mask", name, layer)), steps, samples, bits(found.scale)

    def mask_after(self, k: int) -> tuple[int, int, int, int]:
        """`mask` of the outputs of layer k."""
        return self.mask("between", k) if k + 1 < len(self.sizes.layers) else self.mask("top")

    def sent_up(self, k: int) -> int:
        """Address of the operands (T, B, N') that layer k sends to what is above it."""
        if ("next", k) in self.memory and self.training:
            return self.memory.at(("next", k))
        return self.memory.at(("y", k), self.batch * self.sizes.layers[k].padded)

    def received(self, k: int) -> int:
        """Address of the operands (T, B, I') that layer k receives."""
        return self.sent_up(k - 1) if k else self.memory.at("x")

    def weights(self, k: int, role: str) -> int:
        """Address of the operands of a matrix of layer k, with DropConnect."""
        if role == "w_rec" and self.training and self.sizes.mask("recurrent", k) is not None:
            return self.memory.at(("dropped", k))
        return self.parameters.operand_at(f"layers.{k}.{role}")

    def _matrix(self, name: MatrixId) -> Factor:
        """A matrix of the network as a factor, with DropConnect."""
        if name.layer is None:
            return Factor(self.parameters.operand_at(name), self.sizes.layers[-1].padded, transposed=True)
        layer = self.sizes.layers[name.layer]
        return Factor(self.weights(name.layer, name.role), layer.gates * layer.padded)

    def before(self, k: int, t: int) -> tuple[int, int]:
        """Address of the cells before step t, and whether they are those carried into the window."""
        if t == 0:
            return self.memory.at(("cells", k)), 1
        return self.tape_at(k, t - 1, CELLS), 0

    def tape_at(self, k: int, t: int, plane: int = 0) -> int:
        """Address of step t of an array of the tape of layer k."""
        return self.memory.at(("tape", k), t * self.batch * self.sizes.layers[k].padded) + plane * self.plane(k)

    def sent_at(self, k: int, t: int = 0) -> int:
        """Address of step t of what layer k sends where it is above the threshold."""
        return self.tape_at(k, t, self.sizes.layers[k].rule.output)

    def plane(self, k: int) -> int:
        """Bytes between two arrays of the tape of layer k."""
        return 4 * self.rows * self.sizes.layers[k].padded

    def surrogate(self, layer: LayerSizes) -> tuple[int, float, float]:
        rule = layer.cell.surrogate
        return rule.code, rule.dampening, rule.support
