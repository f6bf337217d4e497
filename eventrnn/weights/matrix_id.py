"""Names of weight matrices, which carry the layer, the role and the number of gates of a matrix."""

from __future__ import annotations


class MatrixId(str):
    """The name of a weight matrix or of another parameter: a `str` that knows its layer, its role and its gates.

    >>> name = MatrixId("layers.2.w_rec", 3)
    >>> name.layer, name.role, name.gates
    (2, 'w_rec', 3)
    >>> MatrixId("readout").layer is None, MatrixId("readout").role, MatrixId("readout").gates
    (True, 'readout', 1)

    The names of `Network.matrices` state the number of gates of the cell. Other text does not state it, unless it is
    given: `MatrixId("layers.2.w_rec", 4)`.
    """

    _gates: int | None

    def __new__(cls, name: str, gates: int | None = None) -> MatrixId:
        made = super().__new__(cls, name)
        made._gates = gates if gates or not isinstance(name, MatrixId) else name._gates
        return made

    @classmethod
    def of(cls, layer: int, role: str, gates: int | None = None) -> MatrixId:
        """The matrix with this role in layer `layer`, counted from the input."""
        return cls(f"layers.{layer}.{role}", gates)

    @property
    def layer(self) -> int | None:
        """The layer's number from the input, from 0; None for the embedding and the read-out."""
        return int(self.split(".")[1]) if self.startswith("layers.") else None

    @property
    def role(self) -> str:
        """The name within the layer, such as "w_in" or "w_rec"; outside a layer the whole name, such as "readout"."""
        return self.rpartition(".")[2]

    @property
    def recurrent(self) -> bool:
        """Whether the presynaptic units of the matrix are the units of its own layer."""
        return self.role == "w_rec"

    @property
    def of_readout(self) -> bool:
        """Whether the parameter belongs to the read-out: its matrix, its bias, or the gate of its blocks."""
        return self.partition(".")[0] == "readout"

    @property
    def gated(self) -> bool:
        """Whether the columns of the matrix are the rows of several gates."""
        return self.role in ("w_in", "w_rec")

    @property
    def gates(self) -> int:
        """The number of gates whose rows the columns of the matrix are; 1 for a matrix without gates. Raises ValueError
        for a name that does not state it."""
        gates = self.stated_gates
        if gates is None:
            raise ValueError(
                f"{self}: this name does not state the number of gates; take it from Network.matrices(), or give "
                f"MatrixId({str(self)!r}, gates)"
            )
        return gates

    @property
    def stated_gates(self) -> int | None:
        """`gates`, or None for a name that does not state it."""
        return self._gates if self.gated else 1
