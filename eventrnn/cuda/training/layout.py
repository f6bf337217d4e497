"""Where each parameter lies in the flat float32 array that holds all of them on the GPU.

Tensor cores and rows of 16 bytes want every dimension to be a multiple of 8. So rows and columns are padded with zeros,
each gate on its own, and parameters keep the order that products need:

    layers.k.w_in     (I, GN)  ->  (I', G, N')   gates g, u, r; of an LSTM i, f, g, o
    layers.k.w_rec    (N, GN)  ->  (N', G, N')   gates u, r, g; of an LSTM i, f, g, o
    layers.k.bias_in  (GN,)    ->  (G, N')       as w_in
    layers.k.bias_rec (GN,)    ->  (G, N')       as w_rec
    layers.k.threshold, readout.bias             padded
    embedding         (V, E)   ->  (V', E')
    readout           (N, V)   ->  (V', N')      transposed, so that a tied read-out is the embedding

With the candidate first in the input product and last in the recurrent one, the gradients of both drives overlap in one
row (g, u, r, q): its first three parts belong to the input product, its last three to the recurrent one. The two drives
of an LSTM have the same gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from eventrnn.weights import MatrixId

# Every dimension is padded to a multiple of this.
PADDED_TO = 8

#: gates per unit -> which gate of the host array stands at each place of the input product
INPUT_ORDERS = {3: (2, 0, 1), 4: (0, 1, 2, 3)}

# Parameters whose columns are the rows of several gates.
OF_INPUT, OF_GATES = ("w_in", "bias_in"), ("w_in", "bias_in", "w_rec", "bias_rec")


def up(size: int) -> int:
    """The size, padded."""
    return -(-size // PADDED_TO) * PADDED_TO


@dataclass(frozen=True)
class Segment:
    """The place of one parameter.

    Attributes
    ----------
    name       : of the parameter
    shape      : of the host array
    first      : first element in the flat array
    rows, gates, columns : of the array (rows, gates, columns) before padding, transposed if `transposed`
    order      : which gate of the host array stands at each place
    """

    name: str
    shape: tuple[int, ...]
    first: int
    rows: int
    gates: int
    columns: int
    order: tuple[int, ...]
    transposed: bool

    @property
    def padded(self) -> tuple[int, int, int]:
        """(rows, gates, columns), padded. A vector has one row."""
        return self.rows if len(self.shape) == 1 else up(self.rows), self.gates, up(self.columns)

    @property
    def size(self) -> int:
        """Elements in the flat array."""
        return int(np.prod(self.padded))

    def pack(self, array: np.ndarray) -> np.ndarray:
        """The host array as it lies on the GPU, flat."""
        packed = np.zeros(self.padded, array.dtype)
        packed[: self.rows, :, : self.columns] = self._view(array)[:, self.order]
        return packed.reshape(-1)

    def unpack(self, packed: np.ndarray, out: np.ndarray) -> None:
        """Copy what lies on the GPU into the host array."""
        inner = packed.reshape(self.padded)[: self.rows, :, : self.columns]
        target = self._view(out)
        for place, gate in enumerate(self.order):
            target[:, gate] = inner[:, place]

    def _view(self, array: np.ndarray) -> np.ndarray:
        if self.transposed:
            return array.T[:, None, :]
        return array.reshape(self.rows, self.gates, self.columns)


class Layout:
    """The segments of all parameters, in their order.

    size : elements of the flat array
    """

    def __init__(self, parameters: Mapping[str, np.ndarray]):
        self.segments: dict[str, Segment] = {}
        first = 0
        for name, array in parameters.items():
            segment = _segment(name, array.shape, first, _gates(name, parameters))
            self.segments[name] = segment
            first += segment.size
        self.size = first

    def __getitem__(self, name: str) -> Segment:
        return self.segments[name]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments.values())

    def __len__(self) -> int:
        return len(self.segments)

    def chunks(self, size: int) -> np.ndarray:
        """(chunks, 3) int64: segment, begin and end in the flat array, of chunks of at most `size` elements."""
        rows = []
        for number, segment in enumerate(self):
            end = segment.first + segment.size
            rows += [(number, begin, min(begin + size, end)) for begin in range(segment.first, end, size)]
        return np.array(rows, np.int64)


def _gates(name: str, parameters: Mapping[str, np.ndarray]) -> int:
    """The gates per unit whose rows are the columns of a parameter; 1 for others."""
    matrix = MatrixId(name)
    if matrix.role not in OF_GATES:
        return 1
    layer = f"layers.{matrix.layer}"
    return len(parameters[f"{layer}.bias_in"]) // len(parameters[f"{layer}.threshold"])


def _segment(name: str, shape: tuple[int, ...], first: int, gates: int) -> Segment:
    order = INPUT_ORDERS[gates] if MatrixId(name).role in OF_INPUT else tuple(range(gates))
    transposed = name == "readout"
    if transposed:
        shape_there = shape[::-1]
    else:
        shape_there = shape if len(shape) == 2 else (1, *shape)
    return Segment(name, shape, first, shape_there[0], gates, shape_there[1] // gates, order, transposed)
