"""Sums over the GPUs that share the batch of an update, beside the work of the backward pass.

Every rank owns a part of an array. It receives that part of all others, adds them up in the order of ranks, and sends
the sum back; so all ranks hold the same bits, and every run gives the same. A gradient is exchanged as soon as it is
complete, on a stream of its own, while the other lanes compute those of the layers below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.training.kernels import joined_sums
from eventrnn.cuda.training.lanes import Lane
from eventrnn.cuda.training.window import Alone, Group

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.training.layout import Layout

# Bytes per number of each kind.
SIZES = {"float32": 4, "float64": 8, "int64": 8}

# Parts of an array begin at multiples of so many numbers, so that copies are of whole words of 16 bytes.
PART_NUMBERS = 64


class Exchange(Alone):
    """The exchange of one rank.

    Parameters
    ----------
    device, precision : where, and the type of operands
    rank, ranks       : of this process
    layout            : of the parameters
    further           : the most numbers that are added up besides the gradients
    """

    def __init__(self, device: Device, precision: str, rank: int, ranks: int, layout: Layout, further: int):
        self.rank, self.ranks, self.layout = rank, ranks, layout
        self.lane = Lane(device, precision, urgent=True)
        self.group: Group | None = None
        self.gradients = 0
        self.scratch = device.empty((self.nbytes(layout, ranks, further),), np.uint8)
        self._joined: set[str] = set()

    @staticmethod
    def nbytes(layout: Layout, ranks: int, further: int) -> int:
        """Bytes of what a rank receives."""
        largest = max(4 * layout.size, 8 * further)
        return (ranks - 1) * (largest // ranks + 8 * 2 * PART_NUMBERS)

    # --- what windows call ---

    def ready(self, lane: Lane, *names: str) -> None:
        """See `Alone.ready`: their exchange starts."""
        self._joined.update(names)
        self._after(lane)
        for first, count in self._spans(names):
            self._add(self.gradients + 4 * first, count, "float32")

    def finish(self, lane: Lane) -> None:
        """See `Alone.finish`: what was not exchanged yet follows."""
        self.ready(lane, *(segment.name for segment in self.layout if segment.name not in self._joined))
        self._joined.clear()
        lane.wait(self.lane.record())

    def add(self, lane: Lane, address: int, count: int, kind: str) -> None:
        """See `Alone.add`."""
        self._after(lane)
        self._add(address, count, kind)
        lane.wait(self.lane.record())

    # --- what the engine calls ---

    def connect(self, group: Group, gradients: int) -> None:
        """See `Alone.connect`."""
        self.group, self.gradients = group, gradients

    def share(self, lane: Lane, array: Any) -> None:
        """See `Alone.share`."""
        assert self.group is not None
        others = range(1, self.ranks)
        self._after(lane)
        sends = [] if self.rank else [(array.data.ptr, array.nbytes, peer) for peer in others]
        receives = [(array.data.ptr, array.nbytes, 0)] if self.rank else []
        self.group.copy(self.lane.queue, sends, receives)
        lane.wait(self.lane.record())

    # --- one sum ---

    def _after(self, lane: Lane) -> None:
        self.lane.wait(lane.record())

    def _spans(self, names: tuple[str, ...]) -> list[tuple[int, int]]:
        """First element and number of elements of these parameters; neighbours are one span."""
        spans: list[tuple[int, int]] = []
        for segment in sorted((self.layout[name] for name in names), key=lambda segment: segment.first):
            if spans and sum(spans[-1]) == segment.first:
                spans[-1] = spans[-1][0], spans[-1][1] + segment.size
            else:
                spans.append((segment.first, segment.size))
        return spans

    def _add(self, address: int, count: int, kind: str) -> None:
        """Add up an array over all ranks, on the lane of the exchange."""
        assert self.group is not None
        size, rank = SIZES[kind], self.rank
        bounds = [min(count, -(-count * k // self.ranks // PART_NUMBERS) * PART_NUMBERS) for k in range(self.ranks)]
        bounds.append(count)
        parts = [(address + size * low, size * (high - low)) for low, high in zip(bounds, bounds[1:], strict=False)]
        others = [peer for peer in range(self.ranks) if peer != rank]
        own_at, nbytes = parts[rank]
        # As many bytes apart as the part has, rounded up to whole words.
        apart = -(-nbytes // (size * PART_NUMBERS)) * PART_NUMBERS
        places = [self.scratch.data.ptr + size * apart * place for place in range(len(others))]
        given = [(*parts[peer], peer) for peer in others if parts[peer][1]]
        own = list(zip(places, [nbytes] * len(others), others, strict=True)) if nbytes else []
        self.group.copy(self.lane.queue, given, own)
        if nbytes:
            self.lane.each(
                ("add_parts", kind),
                lambda: joined_sums.add_parts_kernel(kind),
                nbytes // size,
                own_at,
                self.scratch.data.ptr,
                apart,
                nbytes // size,
                rank,
                self.ranks,
            )
        self.group.copy(self.lane.queue, [(own_at, nbytes, peer) for peer in others] if nbytes else [], given)
