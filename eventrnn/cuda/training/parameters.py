"""The parameters of a run on the GPU: values, gradients, optimiser state and masks, and the update that changes
them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eventrnn.cuda.training.flat_arrays import F32, FlatArrays
from eventrnn.cuda.training.kernels import threads, updates
from eventrnn.cuda.training.lanes import SUM_THREADS, Lane, bits
from eventrnn.cuda.training.layout import Layout, Segment
from eventrnn.weights import GatedBlocks, MatrixId

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.training.window import Alone

# Columns of the rates of a segment: learning rate, decoupled decay, decay that joins the gradient.
RATES = 3


class Results(NamedTuple):
    """The figures of an update, float64.

    found   : (RESULTS,), see `updates`
    totals  : (layers, 3): events, entries with a surrogate derivative, operations
    sums    : of the losses and penalties of the window
    squares : (segments,), squared norms of the gradients
    """

    found: np.ndarray
    totals: np.ndarray
    sums: np.ndarray
    squares: np.ndarray


class DeviceParameters(FlatArrays):
    """The parameters of a run, with arrays of the same layout for what the optimiser keeps.

    Parameters
    ----------
    device    : where
    parameters: host arrays by name
    layers    : number of layers
    precision : type of operands
    rule      : rule of the thresholds, see `training.thresholds`
    bounds    : smallest and largest parameter that the rule allows
    sums      : number of sums of a window
    gated     : the matrices of gated blocks, by name

    Attributes
    ----------
    states    : name -> float32
    results   : figures of the last update (`updates.RESULTS`), then totals, sums and squares, float64
    """

    def __init__(
        self,
        device: Device,
        parameters: Mapping[str, np.ndarray],
        layers: int,
        precision: str,
        rule: str,
        bounds: tuple[float, float],
        sums: int,
        gated: Mapping[str, GatedBlocks],
    ):
        super().__init__(device, parameters, precision, rule)
        self.layers, self.sums = layers, sums
        segments = len(self.layout)
        self.states: dict[str, Any] = {}
        chunks = self.layout.chunks(updates.CHUNK)
        self.chunks, self.number_of_chunks = device.put(chunks), len(chunks)
        self.chunk_bounds = np.searchsorted(chunks[:, 0], np.arange(segments + 1))
        self.squares = self._zeros(len(chunks), np.float64)
        self.scales = self._zeros(segments, F32)
        #: numbers of a step: those of the optimiser, then the rates of every segment
        self.numbers = self._zeros(updates.NUMBERS + RATES * segments, F32)
        self.limits = self._zeros(2, np.float64)
        self.results = self._zeros(updates.RESULTS + sums + segments + 3 * layers, np.float64)
        self.table = np.zeros((segments, updates.SEGMENT_FIELDS), np.int64)
        self.masks: dict[str, Any] = {}
        for number, segment in enumerate(self.layout):
            layer = MatrixId(segment.name).layer
            low, high = bounds if MatrixId(segment.name).role == "threshold" else (-np.inf, np.inf)
            self.table[number, updates.FIRST] = segment.first
            self.table[number, updates.LAYER] = -1 if layer is None else layer
            self.table[number, [updates.LOWEST_BITS, updates.HIGHEST_BITS]] = bits(low), bits(high)
        self.segments = device.put(self.table)
        self.gated = gated
        #: blocks that an input chooses, of each matrix of gated blocks: now, and in the network
        final = [weights.kept_blocks for weights in gated.values()]
        self.kept_blocks = device.put(np.array([final, final], np.int64)) if gated else None
        #: kept weights of each unit, by matrix; of gated blocks (inputs, block columns), in each of those
        self.kept = {
            segment.name: device.put(self._kept(segment, None)) for segment in self.layout if len(segment.shape) == 2
        }

    def _kept(self, segment: Segment, mask: np.ndarray | None) -> np.ndarray:
        """The numbers of kept weights of a matrix; all are kept without a mask."""
        rows, columns = segment.shape
        width = self.gated[segment.name].block[1] if segment.name in self.gated else max(1, columns)
        parts = [slice(first, min(first + width, columns)) for first in range(0, columns, width)]
        if mask is None:
            return np.tile(np.array([part.stop - part.start for part in parts], np.int64), rows)
        # Much faster than `np.add.reduceat`, and large runs change their masks often.
        counts = [np.count_nonzero(mask[:, part], axis=1) for part in parts]
        return np.ascontiguousarray(np.transpose(counts), np.int64).reshape(-1)

    @staticmethod
    def nbytes(
        parameters: Mapping[str, np.ndarray],
        precision: str,
        states: int,
        masked: Iterable[str],
        gated: Mapping[str, GatedBlocks],
    ) -> int:
        """Bytes of values, gradients, operands, so many further arrays (`state`), the masks of the parameters in
        `masked`, the numbers of kept weights of gated blocks, and the chunks of all with their norms."""
        layout, chunk_bytes = Layout(parameters), 3 * 8 + 8
        masks = sum(layout[name].size for name in masked)
        kept = sum(8 * weights.shape[0] * weights.grid[1] for weights in gated.values())
        arrays = layout.size * (4 * (2 + states) + threads.BYTES[precision])
        return arrays + chunk_bytes * len(layout.chunks(updates.CHUNK)) + masks + kept

    # --- addresses ---

    def kept_at(self, name: str) -> int:
        """Address of the numbers of kept weights of a matrix."""
        return self.kept[name].data.ptr

    def kept_blocks_at(self, name: str, *, final: bool = False) -> int:
        """Address of the number of blocks that an input chooses: now or, with `final`, in the network."""
        assert self.kept_blocks is not None
        return self.kept_blocks.data.ptr + 8 * (list(self.gated).index(name) + final * len(self.gated))

    @property
    def results_at(self) -> int:
        """Address of the results."""
        return self.results.data.ptr

    @property
    def sums_at(self) -> int:
        """Address of the sums of a window, then of those of the segments' squares."""
        return self.totals_at(self.layers)

    def totals_at(self, k: int) -> int:
        """Address of the three totals of a layer. Those of all layers lie before the sums."""
        return self.results_at + 8 * (updates.RESULTS + 3 * k)

    def read_results(self) -> Results:
        """The figures of the last update, on the host."""
        found = np.empty(self.results.shape, np.float64)
        self.device.fetch(self.results, found)
        totals_end = updates.RESULTS + 3 * self.layers
        sums_end = totals_end + self.sums
        totals = found[updates.RESULTS : totals_end].reshape(self.layers, 3)
        return Results(found[: updates.RESULTS], totals, found[totals_end:sums_end], found[sums_end:])

    # --- to and from the host ---

    def send(self, name: str, array: np.ndarray, target: Any) -> None:
        """Copy a host array to its place in an array of the layout."""
        self.device.send(self.layout[name].pack(np.asarray(array, F32)), self._part(target, name))

    def fetch(self, name: str, source: Any, out: np.ndarray) -> None:
        """Copy a place of an array of the layout to a host array."""
        segment = self.layout[name]
        packed = np.empty(segment.size, F32)
        self.device.fetch(self._part(source, name), packed)
        segment.unpack(packed, out)

    def state(self, name: str) -> Any:
        """The array of the layout of that name, made where it is new: "first", "second" and "mean" of the optimiser,
        "kept" for a copy of the values."""
        if name not in self.states:
            self.states[name] = self._zeros(self.layout.size, F32)
        return self.states[name]

    def narrow(self, lane: Lane, name: str | None = None) -> None:
        """Round a parameter, or all of them, to operands."""
        first, size = (0, self.layout.size) if name is None else (self.layout[name].first, self.layout[name].size)
        lane.each(
            ("narrow", self.precision),
            lambda: threads.narrow_kernel(self.precision),
            size,
            self.values.data.ptr + 4 * first,
            size,
            self.operands.data.ptr + self.size * first,
        )

    def set_masks(self, masks: Mapping[str, np.ndarray]) -> None:
        """Take over the masks of pruned weights. Raises MemoryError before anything is changed."""
        self.device.need(sum(self.layout[name].size for name in masks if name not in self.masks))
        kept_bytes = {}
        for number, segment in enumerate(self.layout):
            mask = masks.get(segment.name)
            self.table[number, updates.KEPT] = 0
            if mask is not None:
                if segment.name not in self.masks:
                    self.masks[segment.name] = self.device.empty((segment.size,), np.uint8)
                self.device.send(segment.pack(mask.astype(np.uint8)), self.masks[segment.name])
                self.table[number, updates.KEPT] = self.masks[segment.name].data.ptr
            if len(segment.shape) == 2:
                kept_bytes[segment.name] = self._kept(segment, mask)
        for name, count in kept_bytes.items():
            self.device.send(count, self.kept[name])
        self.device.send(self.table, self.segments)

    def prune(self, lane: Lane) -> None:
        """Set pruned weights to zero."""
        lane.blocks(
            ("prune", self.precision),
            lambda: updates.prune_kernel(self.precision),
            self.number_of_chunks,
            self.values.data.ptr,
            self.operands.data.ptr,
            self.chunks.data.ptr,
            self.segments.data.ptr,
        )

    def set_drops(self, masks: Mapping[str, tuple[int, float]]) -> None:
        """Take over the masks of DropConnect: matrix -> address and scale."""
        for number, segment in enumerate(self.layout):
            address, scale = masks.get(segment.name, (0, 1.0))
            self.table[number, [updates.DROPPED, updates.DROP_BITS]] = address, bits(scale)
        self.device.send(self.table, self.segments)

    # --- the update ---

    def spans(self) -> list[tuple[int, int, int]]:
        """The spans of the segments' sums of squares, for `updates.sum_spans_kernel`."""
        bounds = self.chunk_bounds
        return [
            (self.squares.data.ptr + 8 * int(low), int(high - low), 1)
            for low, high in zip(bounds[:-1], bounds[1:], strict=True)
        ]

    def settle(self, lane: Lane, spans: Any, exchange: Alone) -> None:
        """Masks and norms of the gradients, all sums, and whether and how the update is made.

        exchange : with the devices that have the other samples; gradients, and so their squares, are joined already
        """
        segments = len(self.layout)
        lane.blocks(
            ("square_gradients",),
            updates.square_gradients_kernel,
            self.number_of_chunks,
            self.gradients.data.ptr,
            self.chunks.data.ptr,
            self.segments.data.ptr,
            self.squares.data.ptr,
            threads=SUM_THREADS,
        )
        lane.blocks(
            ("sum_spans",),
            updates.sum_spans_kernel,
            self.sums + segments,
            spans.data.ptr,
            self.sums_at,
            threads=SUM_THREADS,
        )
        exchange.add(lane, self.totals_at(0), 3 * self.layers + self.sums, "float64")
        lane.blocks(
            ("settle",),
            updates.settle_kernel,
            1,
            self.sums_at,
            self.sums,
            self.sums_at + 8 * self.sums,
            segments,
            self.segments.data.ptr,
            self.layers,
            self.limits.data.ptr,
            self.scales.data.ptr,
            self.results_at,
            threads=1,
        )

    def update(self, lane: Lane, rule: str, *, averaged: bool) -> None:
        """Change all parameters by a rule of `updates`, unless the window has failed."""
        with_first, with_second = rule in (updates.ADAM, updates.MOMENTUM_DESCENT), rule.startswith("adam")
        lane.blocks(
            ("update", rule, self.precision, averaged),
            lambda: updates.update_kernel(rule, self.precision, averaged),
            self.number_of_chunks,
            self.values.data.ptr,
            self.gradients.data.ptr,
            self.state("first").data.ptr if with_first else 0,
            self.state("second").data.ptr if with_second else 0,
            self.state("mean").data.ptr if averaged else 0,
            self.operands.data.ptr,
            self.chunks.data.ptr,
            self.segments.data.ptr,
            self.scales.data.ptr,
            self.numbers.data.ptr + 4 * updates.NUMBERS,
            self.numbers.data.ptr,
            self.results_at,
        )
