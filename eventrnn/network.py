"""Networks: layers of event-based GRU units, an optional embedding and read-out, and the initialisation of weights.

A `Network` is a frozen record; `simulation.py` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from eventrnn.cells import Cell
from eventrnn.events import check_finite
from eventrnn.weights import Dense, MatrixId, Weights


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A stack of layers, with an optional embedding below (index input) and read-out above.

    Attributes
    ----------
    layers    : from input to output
    embedding : (V, E) float32 or None; row k is the first layer's dense input for symbol k
    readout   : or None
    metadata  : strings that travel with the model file (a vocabulary, where it came from)
    """

    layers: tuple[Layer, ...]
    embedding: np.ndarray | None = None
    readout: Readout | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers: got none, need at least one")
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
            if self.readout.weights.shape[0] != self.layers[-1].units:
                raise ValueError(
                    f"readout: takes {self.readout.weights.shape[0]} units, the last layer has {self.layers[-1].units}"
                )
            if self.readout.tied and (
                self.embedding is None or not np.array_equal(self.readout.weights.to_dense(), self.embedding.T)
            ):
                raise ValueError("readout: tied, but its weights are not the transposed embedding")
        for name, weights in self.matrices().items():
            # Kernels do not check an index. Values first: their message has the position.
            check_finite(name, weights.floats())
            weights.check(full=True)

    def __repr__(self) -> str:
        ends = "" if self.embedding is None else f", embedding {self.embedding.shape[0]}x{self.embedding.shape[1]}"
        ends += "" if self.readout is None else f", readout={self.readout.weights!r}"
        return f"Network({', '.join(map(repr, self.layers))}{ends})"

    def matrices(self) -> dict[str, Weights]:
        """Every weight matrix by name: `layers.0.w_in`, `layers.0.w_rec`, …, `readout`.

        The names are of type `MatrixId`, strings that also carry `layer` and `role`.
        """
        named: dict[str, Weights] = {}
        for k, layer in enumerate(self.layers):
            named[MatrixId.of(k, "w_in")] = layer.w_in
            named[MatrixId.of(k, "w_rec")] = layer.w_rec
        if self.readout is not None:
            named[MatrixId("readout")] = self.readout.weights
        return named

    def with_matrices(self, matrices: Mapping[str, Weights]) -> Network:
        """The same network with some matrices, named as in `matrices()`, replaced."""
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
        """The dense twin: the same weights, every one of them stored."""
        return self.with_matrices({name: Dense(w.to_dense()) for name, w in self.matrices().items()})

    @classmethod
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
        threshold: float = 0.3,
        cell: Cell | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Network:
        """A network to train: Xavier-normal weights, zero biases, embedding uniform in ±0.1 … as EvNN starts them.

        Give `inputs` (dense or event input) or `symbols` and `embedding` (index input). `threshold` is the mean
        of the Beta(3m / (1 - m), 3) distribution that thresholds are drawn from; 0 gives zeros. With `tied`, the
        read-out is the transposed embedding (`embedding` must equal the last layer's size).
        """
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: got {type(rng).__name__}, need a numpy Generator: numpy.random.default_rng(seed)")
        if isinstance(units, int):
            raise TypeError(f"units: got {units}, need a list with the size of each layer: [{units}]")
        _need_sizes(units=units, inputs=inputs, symbols=symbols, embedding=embedding, readout=readout)
        if (inputs is None) == (symbols is None) or (symbols is None) != (embedding is None):
            raise ValueError("network: give either inputs, or symbols together with embedding")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold: got {threshold}, need a mean in [0, 1)")
        cell = cell or Cell()
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
        return cls(tuple(layers), table, out, dict(metadata or {}))


def _need_sizes(**sizes: int | Sequence[int] | None) -> None:
    for name, size in sizes.items():
        if size is None:
            continue
        each = list(size) if isinstance(size, Sequence | np.ndarray) else [size]
        if not each or any(not isinstance(n, int | np.integer) or n < 1 for n in each):
            raise ValueError(f"{name}: got {size}, need whole numbers >= 1")


def draw_thresholds(mean: float, units: int, rng: np.random.Generator) -> np.ndarray:
    """Thresholds (units,) float32 drawn from Beta(3m / (1 - m), 3), which has the mean m in (0, 1), as in EvNN 0.2."""
    return rng.beta(3 * mean / (1 - mean), 3, units).astype(np.float32)


def _xavier(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
    return (rng.standard_normal((fan_in, fan_out)) * np.sqrt(2 / (fan_in + fan_out))).astype(np.float32)


@dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """One event layer of N units over I inputs.

    Attributes
    ----------
    w_in, w_rec       : weights (I, 3N) and (N, 3N), any format, gate rows (u, r, g)
    bias_in, bias_rec : (3N,) float32
    threshold         : (N,) float32, >= 0
    cell              : which equations
    """

    w_in: Weights
    w_rec: Weights
    bias_in: np.ndarray
    bias_rec: np.ndarray
    threshold: np.ndarray
    cell: Cell = Cell()

    def __post_init__(self):
        units = self.units
        if units < 1:
            raise ValueError("threshold: got none, need one for each of at least one unit")
        rows = self.cell.gates * units
        if self.w_rec.shape != (units, rows):
            raise ValueError(f"w_rec: got shape {self.w_rec.shape}, need ({units}, {rows}) for {units} thresholds")
        if self.w_in.shape[1] != rows:
            raise ValueError(f"w_in: got shape {self.w_in.shape}, need (inputs, {rows}) for {units} units")
        for name, size in (("bias_in", rows), ("bias_rec", rows), ("threshold", units)):
            need_vector(name, getattr(self, name), size)
        if (self.threshold < 0).any():
            i = int(np.argmax(self.threshold < 0))
            raise ValueError(f"threshold: got {self.threshold[i]} at unit {i}; need >= 0")

    def __repr__(self) -> str:
        return f"Layer({self.units} {self.cell.variant} units, w_in={self.w_in!r}, w_rec={self.w_rec!r})"

    @property
    def units(self) -> int:
        return len(self.threshold)

    @property
    def inputs(self) -> int:
        return self.w_in.shape[0]


@dataclass(frozen=True, eq=False)
class Readout:
    """Linear read-out of the last layer's events: `output = bias + sum over fired j of weights[j] * y[j]`.

    Attributes
    ----------
    weights : (N, V), any format
    bias    : (V,) float32
    tied    : the weights are the embedding's transpose (V, N) -> (N, V) and are saved once
    """

    weights: Weights
    bias: np.ndarray
    tied: bool = False

    def __post_init__(self):
        need_vector("readout bias", self.bias, self.weights.shape[1])


def need_vector(name: str, array: np.ndarray, size: int) -> None:
    """Refuse what is not a finite float32 vector of that size. Raises TypeError or ValueError."""
    need_float32(name, array, 1)
    if len(array) != size:
        raise ValueError(f"{name}: got length {len(array)}, need {size}")


def need_float32(name: str, array: np.ndarray, ndim: int) -> None:
    """Refuse what is not a finite float32 array of so many dimensions. Raises TypeError or ValueError."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != ndim:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name}: got {got}, need a float32 array with {ndim} dimension{'s' * (ndim > 1)}")
    check_finite(name, array)
