"""Property-based testing for users: hypothesis strategies, and `assert_equivalent` for two runs of a network.

Needs the `test` extra. Nothing else in the package imports this module or hypothesis. Hypothesis draws sizes and
options, so that failures shrink; the numbers come from a drawn seed, so that large arrays are cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import DrawFn, SearchStrategy
except ModuleNotFoundError as error:
    message = "eventrnn.testing needs hypothesis: pip install 'eventrnn[test]'"
    raise ModuleNotFoundError(message, name="hypothesis") from error

from eventrnn.cells import CELLS, Cell
from eventrnn.events import Events
from eventrnn.margins import before_event
from eventrnn.network import Layer, Network, Readout
from eventrnn.simulation import Simulation, Simulator
from eventrnn.state import HeldGates, State
from eventrnn.weights import CSR, FORMATS, GATE_RULES, STORAGES, GatedBlocks, MatrixId, Weights, check_block, convert

Size = int | SearchStrategy[int]

#: Blocks of drawn weight matrices that are large enough for them: single entries, vectors, wide vectors (which have
#: kernels of their own), squares, rectangles, and sizes that divide no side.
BLOCKS = ((1, 1), (1, 3), (3, 1), (1, 16), (1, 32), (1, 64), (2, 2), (4, 4), (3, 5), (5, 2), (7, 11), (2, 16), (16, 16))

#: (n, m, axis) of N:M matrices: full groups, 1 to 5 bits per index, groups that divide no side, along either axis.
GROUPS = tuple(
    (n, m, axis)
    for n, m in ((2, 2), (1, 2), (2, 4), (1, 8), (3, 5), (4, 16), (2, 32), (5, 7))
    for axis in ("post", "pre")
)

#: Numbers of steps that share a choice of gated blocks.
PERIODS = (1, 2, 5)

#: Every variant of the EGRU, which every backend runs; and every cell, which the backends on the CPU run.
EVENT_CELLS = tuple(Cell("egru", variant) for variant in CELLS["egru"])
ALL_CELLS = tuple(Cell(name, variant) for name, variants in CELLS.items() for variant in variants)

#: Grid and largest magnitude of dyadic values. Sums of a few thousand products of two such values are exact in float32
#: in any order.
DYADIC_STEP, DYADIC_LIMIT = np.float32(1 / 16), np.float32(4)

# Cells of the networks drawn here stay far below this value: a unit with this threshold never fires.
UNREACHABLE = np.float32(4)


# --- strategies ---------------------------------------------------------------------------------------------


@st.composite
def masks(draw: DrawFn, shape: tuple[int, int], block: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Masks of kept weights: bool arrays of `shape`, constant on each block of a grid that starts at entry [0, 0].

    The density ranges from all blocks to none, and some presynaptic units may have no block. `block` need not divide
    the shape.
    """
    check_block(block, shape)
    density, some_rows_empty = draw(st.sampled_from((1.0, 0.5, 0.2, 0.0))), draw(st.booleans())
    rng = _rng(draw)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    kept = rng.random(grid) < density
    if some_rows_empty:
        kept[rng.random(grid[0]) < 0.5] = False
    return kept.repeat(block[0], axis=0).repeat(block[1], axis=1)[: shape[0], : shape[1]]


@st.composite
def weights(
    draw: DrawFn,
    shape: tuple[int, int],
    *,
    formats: Sequence[str] = tuple(FORMATS),
    storages: Sequence[str] = STORAGES,
    gain: float = 1.0,
    dyadic: bool = False,
    periods: Sequence[int] = PERIODS,
) -> Weights:
    """Weight matrices (n_pre, n_post) in any format, storage, block or N:M pattern, pruned besides, up to all zero.

    `formats` may also name "gated", which no default includes, because such blocks are no matrix; `periods` are numbers
    of steps that may share their choices.
    Values are normal with deviation `gain / sqrt(n_pre)`; with `dyadic` they are multiples of 1/16 up to 4, and int8,
    which cannot hold these, is left out. Some stored values may be zero.
    """
    name = draw(st.sampled_from(tuple(formats)))
    if name == GatedBlocks.name:
        if dyadic:
            raise ValueError("formats: got 'gated' with dyadic=True, but gates lie on no grid of 1/16")
        return draw(gated_blocks(shape, storages=storages, gain=gain, periods=periods))
    storage = draw(_storages(storages, dyadic))
    # A failure shrinks to the first block: single weights.
    block = draw(st.sampled_from([b for b in BLOCKS if b[0] <= shape[0] and b[1] <= shape[1]]))
    mask = draw(masks(shape, block))
    zeros_inside = draw(st.booleans())
    rng = _rng(draw)
    values = _normal(rng, shape, gain / np.sqrt(shape[0]), dyadic)
    if zeros_inside:
        values[rng.random(shape) < 0.2] = 0
    # The product makes half of the pruned weights -0.
    dense = values * mask
    if name == "nm":
        nm = draw(st.sampled_from(GROUPS))
        return convert(dense * _some_of_each(rng, shape, *nm), name, nm=nm, storage=storage)
    if name != "csr":
        return convert(dense, name, block=block if name == "block" else None, storage=storage)
    rows, columns = np.nonzero(mask)
    indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int64)
    return CSR(indptr, columns.astype(np.int32), values[rows, columns], shape).stored_as(storage)


@st.composite
def gated_blocks(
    draw: DrawFn,
    shape: tuple[int, int],
    *,
    storages: Sequence[str] = STORAGES,
    gain: float = 1.0,
    periods: Sequence[int] = PERIODS,
) -> GatedBlocks:
    """Gated blocks (n_pre, n_post) of any storage, block, density, rule, rank and period, some of them not stored.

    Gates differ, or are equal so that biases of few values decide with many ties, or all logits are equal.
    """
    inner = draw(weights(shape, formats=("block",), storages=storages, gain=gain))
    density, rule = draw(st.sampled_from((0.5, 1.0, 0.3, 0.05))), draw(st.sampled_from(GATE_RULES))
    kind = draw(st.sampled_from(("varied", "tied", "equal")))
    rng, block = _rng(draw), inner.options()["block"]
    n_blocks = -(-shape[0] // block[0]) * -(-shape[1] // block[1])
    gate = np.zeros((shape[0], n_blocks), np.float32)
    if kind == "varied":
        gate = _normal(rng, gate.shape, 1 / np.sqrt(shape[0]), False)
    bias = np.ones(n_blocks, np.float32) if kind == "equal" else rng.choice([0.5, 1, 2], n_blocks).astype(np.float32)
    fields: dict[str, Any] = inner.arrays() | inner.options()
    rank = draw(st.sampled_from((None, 1, 20)))
    if rank is not None:
        fields["gate_out"] = _normal(rng, (rank, n_blocks), 1 / np.sqrt(rank), False)
        gate = _normal(rng, (shape[0], rank), 1 / np.sqrt(shape[0]), False) * gate.any()
    period = draw(st.sampled_from(tuple(periods)))
    return GatedBlocks(**fields, gate=gate, gate_bias=bias, density=density, gate_rule=rule, gate_period=period)


@st.composite
def _layers(
    draw: DrawFn,
    inputs: int,
    units: int,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    storages: Sequence[str] = STORAGES,
    cells: Sequence[Cell] = EVENT_CELLS,
    dyadic: bool = False,
    periods: Sequence[int] = PERIODS,
) -> Layer:
    """Layers with active units: thresholds are zero, equal or varied; with varied ones some units never fire.

    Cells without thresholds may have units whose candidates have no bias, which are silent until they get an input.
    """
    cell = draw(st.sampled_from(tuple(cells)))
    rows = cell.gates * units
    options = {"storages": storages, "gain": 2.0, "dyadic": dyadic, "periods": periods}
    # Where the reset gate comes before the product, the recurrent weights cannot be gated.
    recurrent = _matrix_formats(formats) if cell.reset_first else tuple(formats)
    w_in = draw(weights((inputs, rows), formats=formats, **options))
    w_rec = draw(weights((units, rows), formats=recurrent, **options))
    kind = draw(st.sampled_from(("varied", "equal", "zero")))
    rng = _rng(draw)
    if not cell.thresholded:
        biases = _normal(rng, (2, rows), 0.3, dyadic)
        if kind == "varied":
            # Of the LSTM and the GRU, the candidate is the third gate.
            biases[:, 2 * units : 3 * units] *= rng.random(units) < 0.7
        return Layer(w_in, w_rec, biases[0], biases[1], np.zeros(units, np.float32), cell)
    thresholds = {
        "varied": rng.choice([0, 0.05, 0.2, 0.4], units) + rng.uniform(0, 0.1, units) * (rng.random(units) < 0.7),
        "equal": np.full(units, 0.15),
        "zero": np.zeros(units),
    }
    threshold = thresholds[kind].astype(np.float32)
    if kind == "varied":
        threshold[rng.random(units) < 0.1] = UNREACHABLE
    if dyadic:
        threshold = np.round(threshold / DYADIC_STEP) * DYADIC_STEP
    biases = _normal(rng, (2, rows), 0.3, dyadic)
    # A positive bias of the candidate gate makes networks with weak weights fire.
    biases[0, 2 * units :] += DYADIC_STEP * 4
    return Layer(w_in, w_rec, biases[0], biases[1], threshold, cell)


@st.composite
def networks(
    draw: DrawFn,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    storages: Sequence[str] = STORAGES,
    cells: Sequence[Cell] = EVENT_CELLS,
    max_units: int = 24,
    max_inputs: int = 12,
    layers: Size = st.integers(1, 3),  # noqa: B008  strategies are immutable
    embedding: bool | None = None,
    readout: bool | None = None,
    tied: bool | None = None,
    dyadic: bool = False,
    periods: Sequence[int] = PERIODS,
) -> Network:
    """Networks in which some units fire and others do not; of cells without thresholds, networks of any outputs.

    Parameters
    ----------
    formats, storages : formats and storages of the weight matrices; "gated" must be asked for by name
    cells             : cells of the layers: every variant of the EGRU, or `ALL_CELLS`, or others
    max_units         : largest number of units of a layer, of symbols and of outputs
    max_inputs        : largest number of inputs (or size of the embedding) of layer 0
    layers            : number of layers
    embedding, readout, tied : True with, False without, None either; a tied read-out needs the other two
    dyadic            : weights, biases and thresholds are multiples of 1/16; int8 weights are left out
    periods           : of gated blocks, numbers of steps that may share a choice

    Raises ValueError for `tied` without an embedding or a read-out.
    """
    if tied and (embedding is False or readout is False):
        raise ValueError("networks: tied needs an embedding and a read-out; leave them out or pass True")
    has_embedding = draw(_either(embedding)) if not tied else True
    has_readout = draw(_either(readout)) if not tied else True
    could_tie = has_embedding and has_readout and (tied or set(formats) != {GatedBlocks.name})
    is_tied = draw(_either(tied)) if could_tie else False
    size = st.integers(1, max_units)
    sizes = draw(st.lists(size, min_size=(n := draw(_size(layers))), max_size=n))
    first = sizes[-1] if is_tied else draw(st.integers(1, max_inputs))
    widths = [first, *sizes]
    stack = tuple(
        draw(_layers(a, b, formats=formats, storages=storages, cells=cells, dyadic=dyadic, periods=periods))
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    )
    symbols, outputs = draw(size), draw(size)
    rng = _rng(draw)
    table = None
    if has_embedding:
        table = _normal(rng, (symbols, first), 1.0, dyadic)
        table[rng.random(table.shape) < 0.3] = 0
    top = None
    if is_tied and table is not None:
        name = draw(st.sampled_from(_matrix_formats(formats)))
        block = (min(2, first), min(3, symbols)) if name == "block" else None
        # The embedding is dense, so its transpose fits an N:M matrix only with full groups.
        nm = (2, 2, draw(st.sampled_from(("post", "pre")))) if name == "nm" else None
        storage = draw(_storages(storages, dyadic))
        transposed = convert(np.ascontiguousarray(table.T), name, block=block, nm=nm, storage=storage)
        table = np.ascontiguousarray(transposed.to_dense().T)
        top = Readout(transposed, _normal(rng, symbols, 0.3, dyadic), tied=True)
    elif has_readout:
        options = {"formats": formats, "storages": storages, "dyadic": dyadic, "periods": periods}
        drawn = draw(weights((sizes[-1], outputs), **options))
        top = Readout(drawn, _normal(rng, outputs, 0.3, dyadic))
    return Network(stack, table, top)


@st.composite
def event_trains(draw: DrawFn, size: Size, steps: Size, batch: Size, *, dyadic: bool = False) -> Events:
    """Events (steps, batch, size): graded and binary values of either sign, silent steps, full steps, or no event."""
    shape = (draw(_size(steps)), draw(_size(batch)), draw(_size(size)))
    density, binary = draw(st.sampled_from((0.3, 1.0, 0.05, 0.0))), draw(st.sampled_from((0.2, 0.0, 1.0)))
    uneven = draw(st.booleans())
    rng = _rng(draw)
    values = _normal(rng, shape, 1.0, dyadic)
    values = np.where(rng.random(shape) < binary, np.copysign(np.float32(1), values), values)
    # Some steps may be silent and others busy.
    busy = density * (rng.choice([0.0, 0.5, 1.0, 2.0], (*shape[:2], 1)) if uneven else 1.0)
    return Events.from_dense(np.where(rng.random(shape) < busy, values, np.float32(0)))


@st.composite
def inputs(draw: DrawFn, network: Network, steps: Size, batch: Size) -> np.ndarray | Events:
    """Inputs of `network`: (steps, batch) symbols where it reads them, else `Events` or the same as an array."""
    if network.symbols is not None:
        shape = (draw(_size(steps)), draw(_size(batch)))
        dtype = draw(st.sampled_from((np.int64, np.uint8)))
        return _rng(draw).integers(0, network.symbols, shape).astype(dtype)
    events = draw(event_trains(network.layers[0].inputs, steps, batch))
    return events.to_dense() if draw(st.booleans()) else events


@st.composite
def states(draw: DrawFn, network: Network, batch: int) -> State:
    """Start states: zero, or as after a run: cells of either sign, some outputs, and held gates of samples that do not
    choose in the same step. Outputs of EGRUs are not negative."""
    if draw(st.booleans()):
        return State.zeros(network, batch)
    rng = _rng(draw)
    shapes = [(batch, layer.units) for layer in network.layers]
    cells = tuple(_normal(rng, shape, 0.7, False) for shape in shapes)
    outputs = [np.where(rng.random(s) < 0.4, np.abs(_normal(rng, s, 0.7, False)), np.float32(0)) for s in shapes]
    for k, layer in enumerate(network.layers):
        if layer.cell.equations.single_state:
            outputs[k] = cells[k].copy()
        elif not layer.cell.thresholded:
            outputs[k] = np.copysign(outputs[k], cells[k])
    gates = {}
    for name, (blocks, period) in network.shared_gates().items():
        held = np.abs(_normal(rng, (batch, blocks), 1.0, False)) * (rng.random((batch, blocks)) < 0.5)
        gates[name] = HeldGates(held, rng.integers(0, period, batch))
    return State(cells, tuple(outputs), gates)


def _matrix_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats that hold a matrix. Raises ValueError where "gated" alone is left."""
    left = tuple(name for name in formats if name != GatedBlocks.name)
    if not left:
        raise ValueError(f"formats: got {tuple(formats)}; a tied read-out and some w_rec need others")
    return left


def _storages(storages: Sequence[str], dyadic: bool) -> SearchStrategy[str]:
    """Storages that can hold the values; a failure shrinks to the first."""
    left = tuple(name for name in storages if not (dyadic and name == "int8"))
    if not left:
        raise ValueError(f"storages: got {tuple(storages)} with dyadic={dyadic}; int8 weights lie on no grid of 1/16")
    return st.sampled_from(left)


def _some_of_each(rng: np.random.Generator, shape: tuple[int, int], n: int, m: int, axis: str) -> np.ndarray:
    """Bool array of `shape` with n random entries of each m along the axis, fewer where the last group is short."""
    length, lines = shape[::-1] if axis == "post" else shape
    order = rng.random((lines, -(-length // m), m)).argsort(axis=2)
    kept = (order < n).reshape(lines, -1)[:, :length]
    return kept if axis == "post" else kept.T


def _rng(draw: DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def _size(size: Size) -> SearchStrategy[int]:
    return st.just(size) if isinstance(size, int) else size


def _either(choice: bool | None) -> SearchStrategy[bool]:
    return st.booleans() if choice is None else st.just(choice)


def _normal(rng: np.random.Generator, shape, deviation: float, dyadic: bool) -> np.ndarray:
    values = (rng.standard_normal(shape) * deviation).astype(np.float32)
    if dyadic:
        values = np.clip(np.round(values / DYADIC_STEP) * DYADIC_STEP, -DYADIC_LIMIT, DYADIC_LIMIT)
    return values


# --- comparing two runs -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Divergence(AssertionError):
    """The first difference of two runs, raised by `assert_equivalent`; `str` describes it in full.

    Attributes
    ----------
    what    : "event", "cell", "output", "output shape", "fire count" or "final state"; of the final state of gated
              blocks whose choices some steps share, "layers.0.w_in held gate" and "layers.0.w_in held step", which is
              the number of further steps with these gates
    step, layer, sample, unit : place of the first difference; -1 where it does not apply. The unit of a gate is the
              number of its block
    values  : the values of the two runs at this place
    margins : |v - threshold| of the unit in the two runs, with v the cell before the event; NaN where it does not
              apply, as for cells without thresholds
    """

    what: str
    step: int = -1
    layer: int = -1
    sample: int = -1
    unit: int = -1
    values: tuple[Any, Any] = (None, None)
    margins: tuple[float, float] = (np.nan, np.nan)

    def __str__(self) -> str:
        names = ("step", "layer", "sample", "unit")
        place = ", ".join(f"{name} {k}" for name in names if (k := getattr(self, name)) >= 0)
        text = f"{self.what}s differ{f' first at {place}' if place else ''}: {self.values[0]} and {self.values[1]}"
        if not np.isnan(self.margins).all():
            text += f"; margin to threshold |v - threshold| {self.margins[0]:.9g} and {self.margins[1]:.9g}"
        return text


def assert_equivalent(sim_a: Simulator, sim_b: Simulator, inputs: np.ndarray | Events) -> int:
    """Run both simulators over `inputs` and compare events, cells, outputs, fire counts and final state by `==`.

    Parameters
    ----------
    sim_a, sim_b : simulators of networks of the same sizes, with the same batch and state; both advance
    inputs       : inputs of `Simulator.run`

    Returns the number of (step, sample, unit) compared, over all layers.

    Raises
    ------
    Divergence  an AssertionError that names the first step with a difference, in it the lowest layer, sample and unit,
                the two values, and the distance of the unit from its threshold
    ValueError  where the simulators cannot be compared: other sizes, batch or starting state
    """
    _need_comparable(sim_a, sim_b)
    record = ("events", "states")
    a, b = sim_a.run(inputs, record=record), sim_b.run(inputs, record=record)
    found = _first_divergence(sim_a, sim_b, a, b)
    if found is not None:
        raise found
    return sum(cells.size for cells in a.states)


def _need_comparable(sim_a: Simulator, sim_b: Simulator) -> None:
    units_a, units_b = ([layer.units for layer in sim.network.layers] for sim in (sim_a, sim_b))
    if units_a != units_b:
        raise ValueError(f"assert_equivalent: got layers of {units_a} and of {units_b} units, need the same")
    if sim_a.batch != sim_b.batch:
        raise ValueError(f"assert_equivalent: got batches of {sim_a.batch} and {sim_b.batch}, need the same")
    for name in ("cells", "outputs"):
        pairs = zip(getattr(sim_a.state, name), getattr(sim_b.state, name), strict=True)
        for k, (x, y) in enumerate(pairs):
            if not np.array_equal(x, y):
                raise ValueError(
                    f"assert_equivalent: the simulators start with different {name} of layer {k}; "
                    "make them with the same state, or reset both"
                )
    if (different := _different_gates(sim_a.state, sim_b.state)) is not None:
        raise ValueError(
            f"assert_equivalent: the simulators start with different gates of {different[0]}; make them with the same "
            "state, or reset both"
        )


def _different_gates(a: State, b: State) -> tuple[str, int, int, tuple[Any, Any]] | None:
    """The first difference of held gates, other than of gates that no further step has.

    Returns the matrix, the sample, and the block and the two gates, or -1 and the two numbers of further steps.
    """
    for name in sorted({*a.gates, *b.gates}):
        x, y = a.gates.get(name), b.gates.get(name)
        if x is None or y is None:
            return name, -1, -1, (x, y)
        if (place := _first(x.left != y.left)) is not None:
            return name, place[0], -1, (x.left[place], y.left[place])
        if (place := _first((x.gates != y.gates) & (x.left > 0)[:, None])) is not None:
            return name, place[0], place[1], (x.gates[place], y.gates[place])
    return None


def _first_divergence(sim_a: Simulator, sim_b: Simulator, a: Simulation, b: Simulation) -> Divergence | None:
    # A network and the same network folded have other inputs.
    same_inputs = sim_a.network.one_hot == sim_b.network.one_hot
    return _in_layers(sim_a, sim_b, a, b) or _in_output(a, b) or _in_counts(a, b, same_inputs) or _in_final_state(a, b)


def _in_layers(sim_a: Simulator, sim_b: Simulator, a: Simulation, b: Simulation) -> Divergence | None:
    sent = [(x.to_dense(), y.to_dense()) for x, y in zip(a.events, b.events, strict=True)]
    cells = list(zip(a.states, b.states, strict=True))
    # Order by step, then by layer: within a step a layer can only be affected by the layers below it.
    places = [
        (place[0], k, place[1], place[2])
        for k, ((x, y), (c, d)) in enumerate(zip(sent, cells, strict=True))
        if (place := _first((x != y) | (c != d))) is not None
    ]
    if not places:
        return None
    step, k, sample, unit = min(places)
    at = (step, sample, unit)
    (x, y), (c, d) = ([array[at] for array in pair] for pair in (sent[k], cells[k]))
    margins = (_margin(sim_a, k, unit, c, x), _margin(sim_b, k, unit, d, y))
    what, values = ("event", (x, y)) if x != y else ("cell", (c, d))
    return Divergence(what, step, k, sample, unit, values, margins)


def _in_output(a: Simulation, b: Simulation) -> Divergence | None:
    if a.output.shape != b.output.shape:
        return Divergence("output shape", values=(a.output.shape, b.output.shape))
    place = _first(a.output != b.output)
    if place is None:
        return None
    step, sample, unit = place
    return Divergence("output", step, sample=sample, unit=unit, values=(a.output[place], b.output[place]))


def _in_counts(a: Simulation, b: Simulation, inputs: bool) -> Divergence | None:
    """The first difference in the fire counts of the layers and, with `inputs`, of the inputs."""
    counts = zip((a.input_fired, *a.fired), (b.input_fired, *b.fired), strict=True)
    for k, (x, y) in enumerate(counts, start=-1):
        if k < 0 and not inputs:
            continue
        for n, m in ((x.graded, y.graded), (x.binary, y.binary)):
            place = _first(n != m)
            if place is not None:
                return Divergence("fire count", layer=k, unit=place[0], values=(n[place], m[place]))
    return None


def _in_final_state(a: Simulation, b: Simulation) -> Divergence | None:
    for name in ("cells", "outputs"):
        for k, (x, y) in enumerate(zip(getattr(a.state, name), getattr(b.state, name), strict=True)):
            place = _first(x != y)
            if place is not None:
                sample, unit = place
                return Divergence("final state", a.steps, k, sample, unit, (x[place], y[place]))
    if (different := _different_gates(a.state, b.state)) is not None:
        name, sample, block, values = different
        layer = MatrixId(name).layer
        what = f"{name} held gate" if block >= 0 else f"{name} held step"
        return Divergence(what, a.steps, -1 if layer is None else layer, sample, block, values)
    return None


def _first(condition: np.ndarray) -> tuple[int, ...] | None:
    """The first index in C order at which the condition holds, or None."""
    flat = int(np.argmax(condition)) if condition.size else 0
    if not condition.size or not condition.flat[flat]:
        return None
    return tuple(int(k) for k in np.unravel_index(flat, condition.shape))


def _margin(sim: Simulator, k: int, unit: int, cell, event) -> float:
    """|v - threshold|, with the cell v before the event reconstructed from the cell after it."""
    layer = sim.network.layers[k]
    if not layer.cell.thresholded:
        return float("nan")
    cells, sent = np.zeros(layer.units), np.zeros(layer.units)
    cells[unit], sent[unit] = cell, event
    return abs(float(before_event(layer, cells, sent)[unit]) - float(layer.threshold[unit]))
