"""Products of many rows with dense or gated weights, in tiles of registers (`kernels/row_tiles.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.kernels.gated_row_choice import carry_gates_kernel, choose_rows_kernel
from eventrnn.cuda.kernels.row_tiles import TILE_BYTES, TILE_THREADS, spread_rows_kernel, tile_product_kernel
from eventrnn.cuda.tables import LANES, TILE_INPUTS, TILE_SIDE

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.weights import GatedBlocks

# Rows from which on tiles are used. With fewer, most rows of a tile would be zeros.
MIN_TILED_ROWS = 64

# Rows whose inputs, parts of logits and gates are in memory at a time, about; and bytes of parts of logits, for which
# they are fewer rows. A matrix of 4096 x 12288 weights in blocks of 64 x 64 has 3 MB of them per row.
ROWS_AT_A_TIME, PART_BYTES = 2048, 1 << 28

# Memory of a run, by a name of one product, shape and type (`run_buffers.RunBuffers.scratch`): captured graphs hold its
# addresses, and it goes with the run.
Scratch = Callable[[str, tuple[int, ...], type], Any]

# Threads of a block of `carry_gates`, and of `spread_rows` where no gate says how many.
CARRY_THREADS, SPREAD_THREADS = 128, 256


def spread_rows(
    device: Device, lists: tuple[int, ...], first: int, rows: int, inputs: Any, maxima: Any, threads: int
) -> None:
    """Put the rows of event lists from `first` on into `inputs` (inputs, rows), and their magnitudes into `maxima`."""
    inputs.data.memset_async(0, inputs.nbytes)
    kernel = device.kernel(("spread_rows",), spread_rows_kernel, threads)
    device.launch(kernel, rows, threads, *lists, first, inputs.data.ptr, inputs.shape[1], maxima.data.ptr)


class TiledWeights:
    """Dense weights (n, columns) float32, or uint16 bits of bfloat16, for `tile_product`; packed and copied at once.

    Attributes
    ----------
    n, columns : the shape of the weights
    inputs     : n, rounded up to whole turns of the kernel
    """

    def __init__(self, device: Device, weights: np.ndarray, bias_at: int):
        self.device, self.bias_at, self.narrow = device, bias_at, weights.dtype == np.uint16
        (self.n, self.columns), self.inputs = weights.shape, _rounded(len(weights), TILE_INPUTS)
        padded = np.zeros((self.inputs, _rounded(self.columns, TILE_SIDE)), weights.dtype)
        padded[: self.n, : self.columns] = weights
        with device.on_stream():
            self.values = device.put(padded)

    def multiply(self, inputs: Any, rows: int, out_at: int, part: int | None = None, gates: tuple[int, ...] = ()):
        """Put the sums (parts, rows, columns) float32 on the stream.

        inputs : (inputs, at least the rows) float32
        part   : inputs of a part; None for one sum
        gates  : the arguments of the kernel from `gates_at` to `period`; none where all gates are 1
        """
        part = self.inputs if part is None else part
        tiles = -(-rows // TILE_SIDE) * -(-self.inputs // part)
        kernel = self.device.kernel(
            ("tile_product", self.narrow), lambda: tile_product_kernel(self.narrow), TILE_THREADS
        )
        matrices = self.values.data.ptr, self.values.shape[1], inputs.data.ptr, inputs.shape[1]
        given = *(gates or (0,) * 8), self.inputs, part, self.bias_at, rows, self.columns, out_at
        grid = self.values.shape[1] // TILE_SIDE, tiles
        self.device.launch(kernel, grid, TILE_THREADS, *matrices, *given, shared=TILE_BYTES)


class DenseTiles:
    """The product of a dense matrix with many rows."""

    def __init__(self, device: Device, weights: np.ndarray, bias: np.ndarray):
        self.device = device
        with device.on_stream():
            self.bias = device.put(bias)
        self.weights = TiledWeights(device, weights, self.bias.data.ptr)

    def products(self, lists: tuple[int, ...], rows: int, out: Any, scratch: Scratch) -> None:
        """See `Matrix.products`; lists: addresses of begins, counts, events and the lists of the rows."""
        most = min(rows, ROWS_AT_A_TIME)
        inputs = scratch("inputs", (self.weights.inputs, _rounded(most, TILE_SIDE)), np.float32)
        maxima = scratch("maxima", (most, SPREAD_THREADS // LANES), np.int32)
        for first in range(0, rows, most):
            here = min(most, rows - first)
            spread_rows(self.device, lists, first, here, inputs, maxima, SPREAD_THREADS)
            self.weights.multiply(inputs, here, out.data.ptr + 4 * first * self.weights.columns)


class GatedTiles:
    """The product of a matrix of gated blocks with many rows.

    values : the weights (n_pre, columns) float32, or uint16 bits of bfloat16
    fields : the table of the matrix (tables.GATED_FIELDS,) int64; its columns that say nothing of strips count
    places : the table of shared memory of a choice (tables.PLACE_FIELDS,) int64, and its bytes
    warps  : of a block that chooses
    part   : inputs of a part of a logit
    """

    def __init__(
        self,
        device: Device,
        weights: GatedBlocks,
        values: np.ndarray,
        fields: np.ndarray,
        places: tuple[np.ndarray, int],
        warps: int,
        part: int,
    ):
        self.device, self.weights, self.threads, self.shared = device, weights, LANES * warps, places[1]
        # Only that of a single block row may be rounded, which is the only part.
        self.part = _rounded(part, TILE_INPUTS)
        start_at = int(fields[tables.LOGIT_BIAS])
        with device.on_stream():
            if weights.gate_out is not None:
                # Of two factors the first one is multiplied in tiles, from zeros on.
                self.out, self.zeros = (
                    device.put(weights.gate_out),
                    device.put(np.zeros(len(weights.gate_out), np.float32)),
                )
                fields[tables.LOGIT_VALUES], start_at = self.out.data.ptr, self.zeros.data.ptr
            self.table, self.places = device.put(fields), device.put(places[0])
        self.blocks = TiledWeights(device, values, int(fields[tables.BIAS]))
        self.logits = TiledWeights(device, weights.gate, start_at)

    @staticmethod
    def fits(weights: GatedBlocks) -> bool:
        """Whether a tile lies in one block column, and a turn of the kernel in one block row."""
        (r, c), (block_rows, block_columns) = weights.block, weights.grid
        return (r % TILE_INPUTS == 0 or block_rows == 1) and (c % TILE_SIDE == 0 or block_columns == 1)

    @property
    def parts(self) -> int:
        """Parts of a logit."""
        return -(-self.logits.inputs // self.part)

    def rows_at_a_time(self, batch: int) -> int:
        """The rows that are multiplied at a time, whole steps and at least one."""
        rows = min(ROWS_AT_A_TIME, PART_BYTES // (4 * self.parts * self.logits.columns))
        return max(1, rows // batch) * batch

    def _arrays(self, rows: int, batch: int, scratch: Scratch) -> tuple[Any, ...]:
        """Inputs, maxima, parts of logits, gates, and `left`, for some rows."""
        blocks = self.weights.n_blocks
        return (
            scratch("inputs", (self.logits.inputs, _rounded(rows, TILE_SIDE)), np.float32),
            scratch("maxima", (rows, self.threads // LANES), np.int32),
            scratch("parts", (self.parts, rows, self.logits.columns), np.float32),
            scratch("gates", (batch + rows, blocks), np.float32),
            scratch("left", (batch,), np.int32),
        )

    def products(
        self,
        lists: tuple[int, ...],
        rows: int,
        out: Any,
        status: Any,
        batch: int,
        held: tuple[int, int, int, int],
        scratch: Scratch,
    ) -> None:
        """See `GatedMatrix.products`; lists: addresses of begins, counts, events and the lists of the rows."""
        most, columns = self.rows_at_a_time(batch), self.blocks.columns
        arrays = self._arrays(min(rows, most), batch, scratch)
        gates_at, left_at = arrays[3].data.ptr, arrays[4].data.ptr
        before_at, left_before_at, held_at, left_after_at = held
        if before_at:
            self._carry(before_at, left_before_at, 0, batch, gates_at, left_at)
        for first in range(0, rows, most):
            here = min(most, rows - first)
            self._some(lists, first, here, out.data.ptr + 4 * first * columns, status, batch, arrays)
            if before_at:
                self._carry(gates_at, left_at, here, batch, gates_at, left_at)
        if before_at:
            self._carry(gates_at, left_at, 0, batch, held_at, left_after_at)

    def _carry(self, gates_at: int, left_at: int, rows: int, batch: int, to_at: int, left_to_at: int) -> None:
        """Put the gates that samples hold after some rows, or those before, in another place (`carry_gates`)."""
        kernel = self.device.kernel(("carry_gates",), carry_gates_kernel, CARRY_THREADS)
        sizes = rows, batch, self.weights.gate_period, self.weights.n_blocks
        self.device.launch(kernel, batch, CARRY_THREADS, gates_at, left_at, *sizes, to_at, left_to_at)

    def _some(
        self,
        lists: tuple[int, ...],
        first: int,
        rows: int,
        out_at: int,
        status: Any,
        batch: int,
        arrays: tuple[Any, ...],
    ) -> None:
        """Put the product of the rows from `first` on on the stream; the gates that samples hold are in place."""
        device, (inputs, maxima, parts, gates, left) = self.device, arrays
        spread_rows(device, lists, first, rows, inputs, maxima, self.threads)
        self.logits.multiply(inputs, rows, parts.data.ptr, self.part)
        kernel = device.kernel(("choose_rows",), choose_rows_kernel, self.threads)
        tables_at = self.table.data.ptr, self.places.data.ptr
        given = parts.data.ptr, len(parts), maxima.data.ptr, gates.data.ptr, left.data.ptr, rows, batch, status.data.ptr
        device.launch(kernel, rows, self.threads, *tables_at, *given, shared=self.shared)
        # One block row, or one block column, may have any size.
        (r, c), (_, block_columns) = self.weights.block, self.weights.grid
        sizes = self.weights.n_blocks, block_columns, _rounded(r, TILE_INPUTS), _rounded(c, TILE_SIDE)
        choices = gates.data.ptr, *sizes, left.data.ptr, batch, self.weights.gate_period
        self.blocks.multiply(inputs, rows, out_at, gates=choices)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
