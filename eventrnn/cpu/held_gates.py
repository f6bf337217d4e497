"""Where the engine keeps the gates that a state holds: of gated blocks whose choices some steps share.

Every thread chooses all blocks of a matrix by itself (`kernels/gated_products.py`), and keeps what it has chosen at the
end of its own scratch array (`tables.py` has the layout). Before a run every thread gets the gates of the state; after
it, all threads have the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from eventrnn._integers import round_up
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.tables import Workspace
from eventrnn.state import HeldGates, State

if TYPE_CHECKING:
    from eventrnn.network import Network


class HeldLayout:
    """Places of held gates; arrays of them are float32.

    shared : `Network.shared_gates`
    """

    def __init__(self, network: Network):
        self.shared = network.shared_gates()
        widths = [LANES + round_up(blocks, LANES) for blocks, _ in self.shared.values()]
        self._begins = dict(zip(self.shared, (np.cumsum(widths) - widths).tolist(), strict=True))
        self._pitch = sum(widths)

    def header(self, name: str) -> tuple[int, int, int]:
        """The fields PERIOD, HELD and HELD_PITCH of the tiles of a matrix."""
        return (self.shared[name][1], self._begins[name], self._pitch) if name in self.shared else (1, 0, 0)

    def size(self, batch: int) -> int:
        """Numbers of the gates that so many samples hold, and of what says how many samples these are."""
        return batch * self._pitch + LANES if self.shared else 0

    def views(self, numbers: np.ndarray) -> dict[str, HeldGates]:
        """The gates of every matrix as views of the numbers (`size`,) of one thread."""
        found, samples = {}, numbers[:-LANES].reshape(-1, max(1, self._pitch))
        for name, (blocks, _) in self.shared.items():
            begin = self._begins[name]
            gates = samples[:, begin + LANES : begin + LANES + blocks]
            found[name] = HeldGates(gates, samples.view(np.int64)[:, begin // 2])
        return found

    def numbers(self, state: State) -> np.ndarray:
        """The gates of a state as the numbers of one thread."""
        numbers = np.zeros(self.size(state.batch), np.float32)
        for name, into in self.views(numbers).items():
            into.gates[...], into.left[...] = state.gates[name].gates, state.gates[name].left
        if self.shared:
            numbers.view(np.int64)[-1] = state.batch
        return numbers

    def give(self, state: State, workspace: Workspace, batch: int) -> None:
        """Give all threads the gates of a state. Raises ValueError for gates of other matrices or shapes."""
        # Most networks share no choices; their runs of a few steps are not to take longer.
        if self.shared or state.gates:
            state.need_gates(self.shared, batch)
            workspace.scratch[:, -self.size(batch) :] = self.numbers(state)

    def read(self, workspace: Workspace, batch: int) -> Mapping[str, HeldGates]:
        """Copies of what the threads hold after a run."""
        if not self.shared:
            return {}
        views = self.views(workspace.scratch[0, -self.size(batch) :])
        return {name: HeldGates(each.gates.copy(), each.left.copy()) for name, each in views.items()}
