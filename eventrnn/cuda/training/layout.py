"""Where each parameter lies in the flat float32 array that holds all of them on the GPU.

Tensor cores and rows of 16 bytes want every dimension to be a multiple of 8. So rows and columns are padded with zeros,
each gate on its own, and parameters keep the order that products need:

    layers.k.w_in     (I, 3N)  ->  (I', 3, N')   gates g, u, r
    layers.k.w_rec    (N, 3N)  ->  (N', 3, N')   gates u, r, g
    layers.k.bias_in  (3N,)    ->  (3, N')       gates g, u, r
    layers.k.bias_rec (3N,)    ->  (3, N')       gates u, r, g
    layers.k.threshold, readout.bias             padded
    embedding         (V, E)   ->  (V', E')
    readout           (N, V)   ->  (V', N')      transposed, so that a tied read-out is the embedding

With the candidate first in the input product and last in the recurrent one, the gradients of both drives overlap in one
row (g, u, r, q): its first three parts belong to the input product, its last three to the recurrent one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

# Every dimension is padded to a multiple of this.
PADDED_TO = 8

NATURAL, CANDIDATE_FIRST = (0, 1, 2), (2, 0, 1)


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
            segment = _segment(name, array.shape, first)
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


def _segment(name: str, shape: tuple[int, ...], first: int) -> Segment:
    role = name.rpartition(".")[2]
    gated = name.startswith("layers.") and role != "threshold"
    order = (CANDIDATE_FIRST if role in ("w_in", "bias_in") else NATURAL) if gated else (0,)
    gates, transposed = len(order), name == "readout"
    if transposed:
        shape_there = shape[::-1]
    else:
        shape_there = shape if len(shape) == 2 else (1, *shape)
    return Segment(name, shape, first, shape_there[0], gates, shape_there[1] // gates, order, transposed)
