"""Networks: layers of recurrent units, an optional embedding and read-out, and the initialisation of weights.

A `Network` is a frozen record. `simulation.py` runs it, and `training/` trains it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from eventrnn._arithmetic import standard_arithmetic
from eventrnn._checks import (
    check_finite,
    need_flag,
    need_kind,
    need_number,
    need_whole,
    plain_array,
    said,
)
from eventrnn.cells import Cell
from eventrnn.weights import Dense, GatedBlocks, MatrixId, Weights
from eventrnn.weights.gated import need_matrices
from eventrnn.weights.storage import rounded


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A stack of layers, with an optional embedding below (for symbols as input) and an optional read-out above.

    Attributes
    ----------
    layers    : the layers from input to output, at least one
    embedding : (V, E) float32, or None; row k is the dense input of the first layer for symbol k
    readout   : the read-out of the last layer, or None
    metadata  : strings that a model file keeps, such as a vocabulary or the origin of the weights
    one_hot   : whether the input of a step is one symbol k < I per sample, without an embedding: the one-hot vector of
                the inputs of layer 0, an event of value 1 from input k. `fold` makes such networks

    The arrays are not copied. An edit in place changes the network, and is seen by the next `simulate`; while a
    `Simulator` of the network exists, NumPy refuses it. Values that are not finite, which would be refused here, are
    then refused by a run. To change a network without an edit, see `with_matrices` and `dataclasses.replace`.

    Raises ValueError for sizes that do not fit together, for weights that are not finite, and for a record of weights
    that its full check refuses; TypeError for an embedding that is not float32. Cost: O(stored weights).
    """

    layers: tuple[Layer, ...]
    embedding: np.ndarray | None = None
    readout: Readout | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    one_hot: bool = False

    def __post_init__(self):
        if isinstance(self.layers, Layer) or not isinstance(self.layers, Iterable):
            raise TypeError(f"layers: got {type(self.layers).__name__}, need several layers: (layer,)")
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers: got none, need at least one")
        for k, layer in enumerate(self.layers):
            need_kind(f"layer {k}", layer, Layer, "a Layer")
        self._check_metadata()
        need_flag("one_hot", self.one_hot)
        if self.one_hot and self.embedding is not None:
            raise ValueError("one_hot: the input is a symbol, and the embedding reads it too; give one of the two")
        for k, (below, above) in enumerate(zip(self.layers[:-1], self.layers[1:], strict=True)):
            if above.inputs != below.units:
                raise ValueError(f"layer {k + 1}: takes {above.inputs} inputs, but layer {k} has {below.units} units")
        if self.embedding is not None:
            need_float32("embedding", self.embedding, 2)
            if self.embedding.shape[1] != self.layers[0].inputs:
                raise ValueError(
                    f"embedding: got shape {self.embedding.shape}, need (symbols, {self.layers[0].inputs}) for layer 0"
                )
        if self.readout is not None:
            need_kind("readout", self.readout, Readout, "a Readout, or None")
            if self.readout.weights.shape[0] != self.layers[-1].units:
                raise ValueError(
                    f"readout: takes {self.readout.weights.shape[0]} units, the last layer has {self.layers[-1].units}"
                )
            # Shapes first: the dense matrix is as large as the embedding, or is not made.
            if self.readout.tied and (
                self.embedding is None
                or isinstance(self.readout.weights, GatedBlocks)
                or self.readout.weights.shape != self.embedding.T.shape
                or not np.array_equal(self.readout.weights.to_dense(), self.embedding.T)
            ):
                raise ValueError("readout: tied, but its weights are not the transposed embedding")
        for name, weights in self.matrices().items():
            # Kernels do not check an index, so the full check is needed. Values are checked first, because that
            # message has the position.
            weights.check_finite(name)
            weights.check(full=True)

    def _check_metadata(self) -> None:
        need_kind("metadata", self.metadata, Mapping, "a mapping of text to text")
        for key, value in self.metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"metadata: got {key!r}: {said(value)}, need text (str) for both")

    def __repr__(self) -> str:
        ends = "" if self.embedding is None else f", embedding {self.embedding.shape[0]}x{self.embedding.shape[1]}"
        ends += ", one-hot" * self.one_hot
        ends += "" if self.readout is None else f", readout={self.readout.weights!r}"
        return f"Network({', '.join(map(repr, self.layers))}{ends})"

    @property
    def symbols(self) -> int | None:
        """How many symbols there are, where the input of a step is one of them; None for numbers and events."""
        if self.embedding is not None:
            return len(self.embedding)
        return self.layers[0].inputs if self.one_hot else None

    def matrices(self) -> dict[str, Weights]:
        """Every weight matrix by name: `layers.0.w_in`, `layers.0.w_rec`, …, `readout`.

        The names are of type `MatrixId`, strings that also carry the layer, the role and the number of gates.
        """
        named: dict[str, Weights] = {}
        for k, layer in enumerate(self.layers):
            named[MatrixId.of(k, "w_in", layer.cell.gates)] = layer.w_in
            named[MatrixId.of(k, "w_rec", layer.cell.gates)] = layer.w_rec
        if self.readout is not None:
            named[MatrixId("readout")] = self.readout.weights
        return named

    def shared_gates(self) -> dict[str, tuple[int, int]]:
        """The matrices of gated blocks whose choices some steps share, by name: number of blocks, and period."""
        gated = {name: w for name, w in self.matrices().items() if isinstance(w, GatedBlocks)}
        return {name: (w.n_blocks, w.gate_period) for name, w in gated.items() if w.gate_period > 1}

    def arrays(self) -> Iterator[np.ndarray]:
        """Every array of the network: of its weights in their formats, biases, thresholds, embedding and read-out."""
        for weights in self.matrices().values():
            yield from weights.arrays().values()
        for layer in self.layers:
            yield from (layer.bias_in, layer.bias_rec, layer.threshold)
        if self.embedding is not None:
            yield self.embedding
        if self.readout is not None:
            yield self.readout.bias

    def check_edits(self) -> None:
        """Check what an edit in place can have broken since the network was made and no run would find.

        Kernels do not check an index, a unit whose threshold is NaN is silent, some cells do not read thresholds, and a
        gate that is NaN chooses blocks before anything comes of it. A run refuses other numbers that are not finite by
        what comes of them. Raises ValueError. Cost: a pass over the indices and the gates of blocks.
        """
        for name, weights in self.matrices().items():
            weights.check_index()
            if isinstance(weights, GatedBlocks):
                weights.check_gate(name)
        for k, layer in enumerate(self.layers):
            check_finite(f"threshold of layer {k}", layer.threshold)
            if not layer.cell.thresholded and layer.threshold.any():
                raise ValueError(f"threshold of layer {k}: a cell {layer.cell.name!r} has none; set it back to zeros")

    def with_matrices(self, matrices: Mapping[str, Weights]) -> Network:
        """The network with some matrices replaced.

        matrices : name, as in `matrices()` -> weights of the same shape

        Raises ValueError for an unknown name, and as the constructors of `Layer` and `Network` do.
        """
        need_kind("matrices", matrices, Mapping, "a mapping of names, as in matrices(), to weights")
        unknown = set(matrices) - set(self.matrices())
        if unknown:
            raise ValueError(f"matrices: no {', '.join(sorted(unknown))}; have {', '.join(self.matrices())}")
        layers = tuple(
            replace(
                layer,
                w_in=matrices.get(f"layers.{k}.w_in", layer.w_in),
                w_rec=matrices.get(f"layers.{k}.w_rec", layer.w_rec),
            )
            for k, layer in enumerate(self.layers)
        )
        readout = self.readout
        if readout is not None and "readout" in matrices:
            readout = replace(readout, weights=matrices["readout"])
        return replace(self, layers=layers, readout=readout)

    def dense(self) -> Network:
        """The same network with every matrix in the format "dense", as float32. O(size of the matrices).

        Raises TypeError for gated blocks.
        """
        need_matrices(self.matrices(), "a dense network")
        return self.with_matrices({name: Dense(w.to_dense()) for name, w in self.matrices().items()})

    def untied(self) -> Network:
        """The same network with a read-out of its own, which can be pruned, trained and stored apart.

        A tied read-out is the transposed embedding, so that whatever prunes it prunes the embedding too. The embedding
        of an untied network keeps all its values; a look-up costs no operation. Outputs do not change. A network
        without a tied read-out is returned as it is.
        """
        if self.readout is None or not self.readout.tied:
            return self
        return replace(self, readout=replace(self.readout, tied=False))

    def with_rounded_embedding(self, storage: str, bits: int = 8) -> Network:
        """The network with an embedding of numbers that a narrow storage holds: "bfloat16", or "int8" with a scale per
        symbol. A model file stores such an embedding in a half or a quarter of the bytes.

        bits : of the codes of int8, 2 to 8; see `Weights.stored_as`

        Raises ValueError for an unknown storage, for bits that it does not have, and where there is no embedding or the
        read-out is tied to it.
        """
        if self.embedding is None:
            raise ValueError(f"embedding: got {storage}, but the network has no embedding")
        if self.readout is not None and self.readout.tied:
            raise ValueError(f"embedding: got {storage}, but the read-out is tied to the embedding; untie it first")
        return replace(self, embedding=rounded(self.embedding, storage, bits))

    @classmethod
    @standard_arithmetic
    def random(
        cls,
        units: Sequence[int],
        *,
        rng: np.random.Generator,
        inputs: int | None = None,
        symbols: int | None = None,
        embedding: int | None = None,
        readout: int | None = None,
        tied: bool = False,
        threshold: float | None = None,
        cell: Cell | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Network:
        """A network with random weights, to be trained. It is initialised as EvNN 0.2 initialises its layers.

        Weights are Xavier-normal (variance 2 / (fan-in + fan-out)), biases are zero, and the embedding is uniform in
        [-0.1, 0.1).

        Parameters
        ----------
        units     : units of each layer
        rng       : random generator; the same state gives the same network
        inputs    : number of input units, for dense or event inputs
        symbols   : number of symbols, together with `embedding`, for symbols as inputs
        embedding : size of an embedding row
        readout   : number of outputs of the read-out; None for no read-out
        tied      : make the transposed embedding the read-out; `embedding` must then be the size of the last layer
        threshold : mean m, in [0, 1), of the distribution Beta(3m / (1 - m), 3) of the thresholds; 0 makes all zero. By
                    default 0.3, and 0 for a cell without thresholds, which takes nothing else
        cell      : equations; by default those of EvNN
        metadata  : see `Network`

        Raises TypeError for an `rng` that is not a NumPy generator and for `units` that are not a list, and ValueError
        for sizes below 1 or that do not fit together, for a mean outside [0, 1), and for a mean above 0 where the cell
        has no thresholds.
        """
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: got {type(rng).__name__}, need a numpy Generator: numpy.random.default_rng(seed)")
        if not isinstance(units, Sequence | np.ndarray) or isinstance(units, str):
            raise TypeError(f"units: got {units!r}, need a list with the size of each layer: [128, 64]")
        if len(units) == 0:
            raise ValueError(f"units: got {units}, need at least one layer")
        units = [need_whole(f"units of layer {k}", n, at_least=1) for k, n in enumerate(units)]
        sizes = {"inputs": inputs, "symbols": symbols, "embedding": embedding, "readout": readout}
        for name, size in sizes.items():
            if size is not None:
                need_whole(name, size, at_least=1)
        need_flag("tied", tied)
        if (inputs is None) == (symbols is None) or (symbols is None) != (embedding is None):
            raise ValueError("network: give either inputs, or symbols together with embedding")
        cell = Cell() if cell is None else cell
        need_kind("cell", cell, Cell, "a Cell")
        if threshold is None:
            threshold = 0.3 if cell.thresholded else 0.0
        need_number("threshold", threshold, at_least=0, below=1, what="mean")
        if threshold and not cell.thresholded:
            raise ValueError(f"threshold: got {threshold}, but a cell {cell.name!r} has no thresholds; leave it out")
        table = None if symbols is None else rng.uniform(-0.1, 0.1, (symbols, embedding or 0)).astype(np.float32)
        fan_in = inputs if table is None else table.shape[1]
        layers = []
        for n in units:
            rows = cell.gates * n
            drawn = draw_thresholds(threshold, n, rng) if threshold else np.zeros(n, np.float32)
            layers.append(
                Layer(
                    Dense(_xavier(rng, fan_in or 0, rows)),
                    Dense(_xavier(rng, n, rows)),
                    np.zeros(rows, np.float32),
                    np.zeros(rows, np.float32),
                    drawn,
                    cell,
                )
            )
            fan_in = n
        out = None
        if tied:
            if table is None or readout not in (None, symbols) or table.shape[1] != units[-1]:
                raise ValueError(
                    "tied: needs symbols, an embedding as wide as the last layer and no other readout size"
                )
            out = Readout(Dense(np.ascontiguousarray(table.T)), np.zeros(len(table), np.float32), tied=True)
        elif readout is not None:
            out = Readout(Dense(_xavier(rng, units[-1], readout)), np.zeros(readout, np.float32))
        return cls(tuple(layers), table, out, {} if metadata is None else metadata)


def draw_thresholds(mean: float, units: int, rng: np.random.Generator) -> np.ndarray:
    """Thresholds (units,) float32 drawn from Beta(3m / (1 - m), 3), which has the mean m in (0, 1), as in EvNN 0.2."""
    return rng.beta(3 * mean / (1 - mean), 3, units).astype(np.float32)


def _xavier(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
    """Xavier-normal weights (fan_in, fan_out) float32 (Glorot and Bengio 2010)."""
    return (rng.standard_normal((fan_in, fan_out)) * np.sqrt(2 / (fan_in + fan_out))).astype(np.float32)


@dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """One layer of N units over I inputs. A unit has G gate rows: 3 in an EGRU or a GRU, 4 in an LSTM.

    Attributes
    ----------
    w_in, w_rec       : weights (I, G N) and (N, G N), in any format; gate rows are packed (u, r, g), or (i, f, g, o)
    bias_in, bias_rec : (G N,) float32
    threshold         : (N,) float32, >= 0; zeros for a cell without thresholds
    cell              : the equations of the units

    Raises ValueError for shapes that do not fit together, for a threshold that is negative, or not zero although the
    cell has none, and for numbers that are not finite; TypeError for arrays that are not float32.
    """

    w_in: Weights
    w_rec: Weights
    bias_in: np.ndarray
    bias_rec: np.ndarray
    threshold: np.ndarray
    cell: Cell = Cell()

    def __post_init__(self):
        for name in ("w_in", "w_rec"):
            need_weights(name, getattr(self, name))
        need_kind("cell", self.cell, Cell, "a Cell")
        need_float32("threshold", self.threshold, 1)
        units = self.units
        if units < 1:
            raise ValueError("threshold: got none, need one for each of at least one unit")
        rows = self.cell.gates * units
        if self.w_rec.shape != (units, rows):
            raise ValueError(f"w_rec: got shape {self.w_rec.shape}, need ({units}, {rows}) for {units} thresholds")
        if self.w_in.shape[1] != rows:
            raise ValueError(f"w_in: got shape {self.w_in.shape}, need (inputs, {rows}) for {units} units")
        if self.cell.reset_first and isinstance(self.w_rec, GatedBlocks):
            raise ValueError(
                f"w_rec: got gated blocks, but {self.cell.name}/{self.cell.variant} multiplies outputs and reset "
                "outputs with it, and blocks are chosen from one of them; give w_rec another format, or use the other "
                "variant of the cell"
            )
        for name, size in (("bias_in", rows), ("bias_rec", rows), ("threshold", units)):
            need_vector(name, getattr(self, name), size)
        if (self.threshold < 0).any():
            i = int(np.argmax(self.threshold < 0))
            raise ValueError(f"threshold: got {self.threshold[i]} at unit {i}; need >= 0")
        if not self.cell.thresholded and self.threshold.any():
            i = int(np.argmax(self.threshold != 0))
            raise ValueError(
                f"threshold: got {self.threshold[i]} at unit {i}, but a cell {self.cell.name!r} has no thresholds; "
                "give zeros"
            )

    def __repr__(self) -> str:
        kind = self.cell.variant if self.cell.thresholded else f"{self.cell.name}/{self.cell.variant}"
        return f"Layer({self.units} {kind} units, w_in={self.w_in!r}, w_rec={self.w_rec!r})"

    @property
    def units(self) -> int:
        """N."""
        return len(self.threshold)

    @property
    def inputs(self) -> int:
        """I."""
        return self.w_in.shape[0]


@dataclass(frozen=True, eq=False)
class Readout:
    """Linear read-out of the outputs of the last layer: `output = bias + sum over j of weights[j] * y[j]`.

    Attributes
    ----------
    weights : (N, V), in any format
    bias    : (V,) float32
    tied    : whether the weights are the transposed embedding; a model file then stores them once

    Raises TypeError or ValueError for a bias that is not a finite float32 vector of V numbers.
    """

    weights: Weights
    bias: np.ndarray
    tied: bool = False

    def __post_init__(self):
        need_weights("readout weights", self.weights)
        need_flag("tied", self.tied)
        need_vector("readout bias", self.bias, self.weights.shape[1])

    def safe_magnitude(self) -> float:
        """The magnitude of the units' outputs up to which no output of the read-out can overflow. O(stored)."""
        weights, most = self.weights.floats(), float(np.finfo(np.float32).max)
        largest = max(float(weights.max(initial=0)), -float(weights.min(initial=0)))
        if isinstance(self.weights, GatedBlocks):
            if self.weights.gate_rule == "linear":
                # Its gates have no bound.
                return 0.0
            largest *= self.weights.n_blocks
        # Half of what float32 can hold leaves room for the rounding of the sum.
        room = most / 2 - float(np.abs(self.bias).max(initial=0))
        return room / max(self.weights.shape[0] * largest, 1 / most)


def need_thresholds(network: Network, name: str, instead: str) -> None:
    """Raise ValueError for a network with a layer whose cell has no thresholds, where those are needed.

    name    : the argument that asks for them, and what it got, for the message
    instead : what to do instead
    """
    for k, layer in enumerate(network.layers):
        if not layer.cell.thresholded:
            raise ValueError(
                f"{name}, but layer {k} has the cell {layer.cell.name!r}, whose units have no threshold; {instead}"
            )


def need_weights(name: str, weights: Weights) -> None:
    """Raise TypeError for what is not a record of weights, such as an array."""
    if not isinstance(weights, Weights):
        raise TypeError(
            f"{name}: got {said(weights)} ({type(weights).__name__}), need weights: Dense(array), or another format"
        )


def need_vector(name: str, array: np.ndarray, size: int) -> None:
    """Raise TypeError or ValueError unless an array is a finite float32 vector of that size."""
    need_float32(name, array, 1)
    if len(array) != size:
        raise ValueError(f"{name}: got length {len(array)}, need {size}")


def need_float32(name: str, array: np.ndarray, ndim: int) -> None:
    """Raise TypeError or ValueError unless an array is finite, float32, and has `ndim` dimensions."""
    if isinstance(array, np.ma.MaskedArray):
        plain_array(name, array)
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != ndim:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name}: got {got}, need a float32 array with {ndim} dimension{'s' * (ndim > 1)}")
    check_finite(name, array)
