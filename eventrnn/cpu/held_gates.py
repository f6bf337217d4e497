"""Where the engine keeps the gates that a state holds: of gated blocks whose choices some steps share.

Every thread chooses all blocks of a matrix by itself (`kernels/gated_products.py`), and keeps what it has chosen in its
own workspace. Before a run every thread gets the gates of the state; after it, all threads have the same ones.
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
    """Places of held gates in the fields `held_gates` and `held_left` of a workspace.

    Matrix lies after matrix, and within a matrix sample after sample.

    shared : `Network.shared_gates`
    """

    def __init__(self, network: Network):
        self.shared = network.shared_gates()
        pitches = [round_up(blocks, LANES) for blocks, _ in self.shared.values()]
        self._ends = np.cumsum([0, *pitches]).tolist()

    def header(self, name: str) -> tuple[int, int, int, int]:
        """The fields PERIOD, HELD, HELD_ORDER and HELD_MATRICES of the tiles of a matrix (`tables.py`)."""
        if name not in self.shared:
            return 1, 0, 0, 0
        order = list(self.shared).index(name)
        return self.shared[name][1], self._ends[order], order, len(self.shared)

    def sizes(self, batch: int) -> tuple[int, int]:
        """Numbers of `held_gates` and of `held_left` for so many samples."""
        return batch * self._ends[-1], batch * len(self.shared)

    def views(self, gates: np.ndarray, left: np.ndarray) -> dict[str, HeldGates]:
        """The gates of every matrix as views of the two fields of one thread."""
        found, batch = {}, len(left) // max(1, len(self.shared))
        for k, (name, (blocks, _)) in enumerate(self.shared.items()):
            whole = gates[batch * self._ends[k] : batch * self._ends[k + 1]].reshape(batch, -1)
            found[name] = HeldGates(whole[:, :blocks], left[k * batch : (k + 1) * batch])
        return found

    def arrays(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """The gates of a state as the two fields of one thread."""
        sizes = self.sizes(state.batch)
        fields = np.zeros(sizes[0], np.float32), np.zeros(sizes[1], np.int64)
        self._write(state, *fields)
        return fields

    def _write(self, state: State, gates: np.ndarray, left: np.ndarray) -> None:
        for name, into in self.views(gates, left).items():
            into.gates[...], into.left[...] = state.gates[name].gates, state.gates[name].left

    def give(self, state: State, workspace: Workspace, batch: int) -> None:
        """Give all threads the gates of a state. Raises ValueError for gates of other matrices or shapes."""
        state.need_gates(self.shared, batch)
        for fields in zip(workspace.held_gates, workspace.held_left, strict=True):
            self._write(state, *fields)

    def read(self, workspace: Workspace) -> Mapping[str, HeldGates]:
        """Copies of what the threads hold after a run."""
        views = self.views(workspace.held_gates[0], workspace.held_left[0])
        return {name: HeldGates(each.gates.copy(), each.left.copy()) for name, each in views.items()}
