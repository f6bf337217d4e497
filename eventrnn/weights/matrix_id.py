"""Names of weight matrices, which carry the layer and the role of a matrix."""

from __future__ import annotations


class MatrixId(str):
    """The name of a weight matrix or of another parameter of a network: a `str` that knows its layer and its role.

    >>> name = MatrixId("layers.2.w_rec")
    >>> name.layer, name.role, name.gated
    (2, 'w_rec', True)
    >>> MatrixId("readout").layer is None, MatrixId("readout").role
    (True, 'readout')
    """

    __slots__ = ()

    @classmethod
    def of(cls, layer: int, role: str) -> MatrixId:
        """The matrix with this role in layer `layer`, counted from the input."""
        return cls(f"layers.{layer}.{role}")

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
    def gated(self) -> bool:
        """Whether the columns of the matrix are the rows of three gates (u, r, g)."""
        return self.role in ("w_in", "w_rec")
