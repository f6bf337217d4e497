"""The training benchmark: one window, forward and backward, beside PyTorch, interleaved in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from eventrnn._checks import need_choice, need_number, need_pair, need_text, need_whole
from eventrnn.bench.baselines import import_torch, torch_gru
from eventrnn.bench.machine import device, limited, peak, versions
from eventrnn.bench.networks import ACTIVITY_TOLERANCE, at_activity, random_events, random_network
from eventrnn.bench.timing import Run, interleaved
from eventrnn.cells import Surrogate
from eventrnn.counting.backward import BackwardCounts, count_backward
from eventrnn.counting.counts import Counts
from eventrnn.network import Network
from eventrnn.state import State
from eventrnn.training.bptt.model import BACKWARDS, Model, Tape
from eventrnn.weights import check_nm, convert

#: "torch": torch.nn.GRU, a dense model of the same size; "torch-loop": the same cell as a PyTorch loop whose drives of
#: all steps come from one operation; "torch-loop-indexed": the loop of the published code (EvNN's `EGRUScript`), which
#: indexes the drives in every step; "torch-bridge": `eventrnn.torch.EGRU`, this engine as a module; "dense": this
#: engine with the same weights stored dense, so that pruned ones are multiplied and get a gradient
TRAINING_BASELINES = ("torch", "torch-loop", "torch-loop-indexed", "torch-bridge", "dense")

INPUT_GRADIENTS = ("open", "all", "none")

# Largest difference of the loop's gradients from ours over `CHECKED_STEPS`, relative to the largest gradient. It
# covers float32 products in another order; a missing term is orders of magnitude larger.
CHECKED_STEPS, SAME_GRADIENT = 2, 1e-3

Report = Callable[[str], None]


@dataclass(frozen=True)
class TrainingCase:
    """One case to measure. Raises ValueError for options that do not fit together, before any work.

    Attributes
    ----------
    hidden    : units, and inputs, of the layer
    batch     : samples
    steps     : steps of the window
    activity  : share of units, and of inputs, that send an event in a step
    support   : share of (unit, step, sample) with a non-zero surrogate derivative, whether the unit fired or not
    sparsity  : share of blocks left out
    block     : (presynaptic, postsynaptic) sizes of a block; only with a sparsity
    nm        : (n, m, "post" or "pre"), the weights kept of each group, in place of blocks; forward and backward pass
                have the same mask
    backward  : "auto", "sparse" or "dense"
    input_gradient : "open": only where a layer below with the same activity and support could use it; "all"; or "none".
                     PyTorch computes all of it or none, and so does a module of PyTorch around this engine: beside
                     "torch-bridge" it is "all" or "none", so that the same work is timed on both sides. By default
                     "all" beside "torch-bridge", else "open"
    threads   : threads of every side
    against   : baselines, separated by commas, or "none"; `speedup` refers to the first
    repeats   : interleaved rounds
    seed      : seed of everything random
    """

    hidden: int = 1350
    batch: int = 20
    steps: int = 70
    activity: float = 0.1
    support: float = 0.1
    sparsity: float = 0.0
    block: tuple[int, int] | None = None
    nm: tuple[int, int, str] | None = None
    backward: str = "auto"
    input_gradient: str = ""
    threads: int = 1
    against: str = "torch"
    repeats: int = 7
    seed: int = 0

    def __post_init__(self):
        for name in ("hidden", "batch", "steps", "threads"):
            need_whole(name, getattr(self, name), at_least=1)
        need_whole("seed", self.seed, at_least=0)
        need_whole("repeats", self.repeats)
        need_text("against", self.against)
        if self.repeats < 3:
            raise ValueError(f"repeats: got {self.repeats}, need at least 3 for a median")
        for name in ("activity", "support"):
            need_number(name, getattr(self, name), above=0, below=1, what="share")
        need_number("sparsity", self.sparsity, at_least=0, below=1, what="share")
        if self.block is not None:
            need_pair("block", self.block, "two sizes >= 1 (presynaptic x postsynaptic)")
        if self.block is not None and not self.sparsity:
            raise ValueError(f"block: got {self.block} without a sparsity, so nothing is pruned; give one, or no block")
        if self.nm is not None:
            check_nm(*self.nm)
            if self.sparsity:
                raise ValueError(
                    f"nm: got {self.nm} beside a sparsity of {self.sparsity}, but masks fix the share of weights; give "
                    "one of the two"
                )
        need_choice("backward", self.backward, BACKWARDS)
        for baseline in self.baselines:
            if baseline not in TRAINING_BASELINES:
                raise ValueError(f"against: got {baseline!r}, need {', '.join(TRAINING_BASELINES)} or none")
        bridged = "torch-bridge" in self.baselines
        if self.input_gradient == "":
            object.__setattr__(self, "input_gradient", "all" if bridged else "open")
        need_choice("input_gradient", self.input_gradient, INPUT_GRADIENTS)
        if bridged and self.input_gradient == "open":
            raise ValueError(
                "input_gradient: got 'open', but torch-bridge computes the gradient of all inputs; give 'all' or 'none'"
            )

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names in `against`; empty for "none"."""
        return () if self.against == "none" else tuple(self.against.split(","))


def training(*, report: Report = lambda stage: None, **case: Any) -> dict:
    """Time windows forward and backward and return the figures of `eventrnn bench training --json`.

    Parameters are the fields of `TrainingCase`; `report` is called with the name of each stage. An iteration goes from
    the inputs of a window and the gradient of its outputs to the gradients of all parameters and of the inputs. The
    gradient of a pruned matrix is a list of the kept weights' gradients. There is no optimiser. Inputs are graded
    events at the requested activity. A common threshold sets the activity of the units, and the width of the surrogate
    sets the support. Both are measured in the timed window. `open` is the share of (unit, step, sample)
    that fired or has a non-zero surrogate derivative: the part that the backward pass cannot skip.

    Raises ValueError for an impossible case, RuntimeError where a gradient is not finite or a loop's gradient differs
    from ours.
    """
    asked = TrainingCase(**case)
    rng = np.random.default_rng(asked.seed)
    report("making a network")
    block = asked.block or ((1, 64) if asked.sparsity else None)
    form = "nm" if asked.nm else ("block" if block else "dense")
    network = random_network(
        asked.hidden, 1, sparsity=asked.sparsity, format=form, block=block, nm=asked.nm, variant="evnn", rng=rng
    )
    inputs = random_events(asked.steps, asked.batch, asked.hidden, asked.activity, rng)
    x = inputs.to_dense()
    report("setting activity and support")
    network = at_support(at_activity(network, inputs, asked.activity), x, asked.support)
    d_output = rng.standard_normal((asked.steps, asked.batch, asked.hidden), dtype=np.float32) / np.float32(x.size)
    model = Model(network, backward=asked.backward, threads=asked.threads)
    state = State.zeros(network, asked.batch)
    d_inputs: bool | np.ndarray = asked.input_gradient != "none"

    def ours() -> tuple[Tape, dict[str, np.ndarray]]:
        _, _, tape = model.forward(x, state)
        return tape, model.backward(tape, d_output, d_inputs=d_inputs, stored=form != "dense")

    with limited(asked.threads):
        report("compiling")
        started = time.perf_counter()
        tape, gradients = ours()
        if asked.input_gradient == "open":
            d_inputs = _paths_below(x, tape.support, rng)
            tape, gradients = ours()
        compile_seconds = time.perf_counter() - started
        for name, gradient in gradients.items():
            if not np.isfinite(gradient).all():
                raise RuntimeError(f"benchmark: the gradient of {name} is not finite; use fewer steps")
        figures = _measured(asked, network, tape)
        del tape, gradients
        whole = asked.input_gradient != "none"
        baselines = {
            name: _dense_window(asked, network, x, d_output, d_inputs)
            if name == "dense"
            else _baseline(name, network, x, d_output, whole, asked.threads)
            for name in asked.baselines
        }
        for name in baselines:
            if name in LOOPS:
                report(f"comparing gradients with {name}")
                compare_loop(name, network, x[:CHECKED_STEPS], d_output[:CHECKED_STEPS])
        report(f"timing {asked.repeats} rounds")
        seconds = interleaved({"ours": ours} | baselines, asked.repeats)
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    result = {"ms_per_iteration": medians["ours"] * 1e3, "against_ms_per_iteration": None, "speedup": None}
    if asked.baselines:
        first = medians[asked.baselines[0]]
        result |= {"against_ms_per_iteration": first * 1e3, "speedup": first / medians["ours"]}
    result["against_each"] = {
        name: {"ms_per_iteration": medians[name] * 1e3, "speedup": medians[name] / medians["ours"]}
        for name in asked.baselines
    }
    record = asdict(asked)
    record["activity_asked"], record["support_asked"] = record.pop("activity"), record.pop("support")
    record["sparsity_asked"], record["block"] = record.pop("sparsity"), f"{block[0]}x{block[1]}" if block else None
    record["nm"] = ":".join(map(str, asked.nm)) if asked.nm else None
    result |= figures | {"compile_seconds": compile_seconds} | record | peak(asked.threads)
    return result | {"device": device(), "versions": versions()}


def at_support(network: Network, x: np.ndarray, support: float) -> Network:
    """The one-layer network with a surrogate so wide that its derivative is non-zero for a share `support` of
    (unit, step, sample) on inputs x, (T, B, I)."""
    (layer,) = network.layers
    _, _, tape = Model(network).forward(x, State.zeros(network, x.shape[1]))
    distance = np.abs(tape.layers[0].v - layer.threshold)
    width = float(np.quantile(distance, support))
    rule = Surrogate("triangle", layer.cell.surrogate.dampening, 1 / max(width, 1e-6))
    return replace(network, layers=(replace(layer, cell=replace(layer.cell, surrogate=rule)),))


def _paths_below(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Where a layer below that sent x could use a gradient, bool (T, B, I): at its events and at random other places,
    a share `share` of all."""
    fired = x != 0
    return fired | (rng.random(x.shape) < max(0.0, share - fired.mean()) / (1 - fired.mean()))


def _measured(case: TrainingCase, network: Network, tape: Tape) -> dict:
    """Measured activity, support and sparsity of the window, and its operations."""
    (layer,), kept = tape.layers, network.layers[0]
    activity, slopes = tape.activity, np.abs(layer.v - kept.threshold) < 1 / kept.cell.surrogate.support
    support = float(slopes.mean())
    for name, asked, got in (("activity", case.activity, activity), ("support", case.support, support)):
        if abs(got - asked) > ACTIVITY_TOLERANCE * asked:
            raise ValueError(f"{name}: got {asked}, but this random network can only be brought to {got:.3f}")
    forward, arrived = Counts(), {"layers.0.w_in": layer.x, "layers.0.w_rec": layer.y[:-1]}
    for name, weights in network.matrices().items():
        sent = np.count_nonzero(arrived[name], axis=(0, 1))
        total = case.steps * case.batch * weights.shape[0] * weights.shape[1]
        forward += Counts(total, int(sent @ weights.fan_out()), int(sent @ weights.executed_out()))
    backward = sum(count_backward(tape.work).values(), BackwardCounts())
    stored = sum(w.shape[0] * w.shape[1] for w in network.matrices().values())
    return {
        "activity": activity,
        "support": support,
        "open": tape.support,
        "sparsity": 1 - sum(w.nnz for w in network.matrices().values()) / stored,
        "dense_per_iteration": forward.dense + backward.backward_dense,
        "effective_per_iteration": forward.effective + backward.backward_effective,
        "executed_per_iteration": forward.executed + backward.backward_executed,
        **asdict(backward),
    }


# --- baselines -------------------------------------------------------------------------------------------------


def _gru_window(network: Network, x: np.ndarray, d_output: np.ndarray, input_gradient: bool) -> Run:
    torch, gru = import_torch(), torch_gru(network)
    given, upstream = torch.from_numpy(x).requires_grad_(input_gradient), torch.from_numpy(d_output)

    def run() -> None:
        for parameter in (*gru.parameters(), given):
            parameter.grad = None
        gru(given)[0].backward(upstream)

    return run


def _dense_window(
    asked: TrainingCase, network: Network, x: np.ndarray, d_output: np.ndarray, d_inputs: bool | np.ndarray
) -> Run:
    """The same window by this engine, with the weights of the network stored dense."""
    dense = {name: convert(weights.to_dense(), "dense") for name, weights in network.matrices().items()}
    model = Model(network.with_matrices(dense), backward=asked.backward, threads=asked.threads)
    state = State.zeros(network, asked.batch)

    def run() -> None:
        _, _, tape = model.forward(x, state)
        model.backward(tape, d_output, d_inputs=d_inputs)

    return run


def _bridge_window(network: Network, x: np.ndarray, d_output: np.ndarray, input_gradient: bool, threads: int) -> Run:
    """The same window through `eventrnn.torch.EGRU`, whose module and autograd stand around our engine."""
    torch = import_torch()
    from eventrnn.torch import EGRU

    module = EGRU.from_network(network, threads=threads)
    given, upstream = torch.from_numpy(np.array(x)).requires_grad_(input_gradient), torch.from_numpy(d_output)

    def run() -> None:
        for parameter in (*module.parameters(), given):
            parameter.grad = None
        module(given)[0].backward(upstream)

    return run


def torch_loop(
    network: Network, x: np.ndarray, d_output: np.ndarray, input_gradient: bool, indexed: bool, where: str = "cpu"
) -> tuple[Run, Callable[[], dict[str, np.ndarray]]]:
    """The layer as a PyTorch loop with one input product for all steps: a run, and its gradients by our names.

    indexed : take the drives of a step by `drives[t]`, whose gradient is an array of all steps in every step. Otherwise
              one `unbind` yields the drives of all steps, and its gradient is computed once
    where   : device of PyTorch
    """
    torch = import_torch()
    (layer,) = network.layers
    n, rule = layer.units, layer.cell.surrogate

    class Event(torch.autograd.Function):
        @staticmethod
        def forward(ctx, distance):
            ctx.save_for_backward(distance)
            return (distance > 0).to(distance.dtype)

        @staticmethod
        def backward(ctx, upstream):
            (distance,) = ctx.saved_tensors
            return upstream * rule.dampening * torch.relu(1 - rule.support * distance.abs())

    arrays = {
        "w_in": layer.w_in.to_dense(),
        "w_rec": layer.w_rec.to_dense(),
        "bias_in": layer.bias_in,
        "bias_rec": layer.bias_rec,
        "threshold": layer.threshold,
    }
    p = {name: torch.tensor(value, device=where).requires_grad_() for name, value in arrays.items()}
    given, upstream = torch.tensor(x, device=where).requires_grad_(input_gradient), torch.tensor(d_output, device=where)

    def run() -> None:
        for parameter in (*p.values(), given):
            parameter.grad = None
        drives = (given.reshape(-1, given.shape[2]) @ p["w_in"] + p["bias_in"]).reshape(*x.shape[:2], 3 * n)
        c = y = torch.zeros(x.shape[1], n, device=where)
        outputs = []
        for drive in (drives[t] for t in range(len(drives))) if indexed else drives.unbind(0):
            rec = torch.addmm(p["bias_rec"], y, p["w_rec"])
            u = torch.sigmoid(drive[:, :n] + rec[:, :n])
            r = torch.sigmoid(drive[:, n : 2 * n] + rec[:, n : 2 * n])
            g = torch.tanh(drive[:, 2 * n :] + r * rec[:, 2 * n :])
            v = u * c + (1 - u) * g
            event = Event.apply(v - p["threshold"])
            y, c = event * v, v - event * p["threshold"]
            outputs.append(y)
        torch.stack(outputs).backward(upstream)

    def gradients() -> dict[str, np.ndarray]:
        run()
        return {f"layers.0.{name}": value.grad.cpu().numpy() for name, value in p.items()}

    return run, gradients


#: baselines whose gradients are compared with ours -> whether they index the steps
LOOPS = {"torch-loop": False, "torch-loop-indexed": True}


def _baseline(
    name: str, network: Network, x: np.ndarray, d_output: np.ndarray, input_gradient: bool, threads: int
) -> Run:
    if name == "torch-bridge":
        return _bridge_window(network, x, d_output, input_gradient, threads)
    if name in LOOPS:
        return torch_loop(network, x, d_output, input_gradient, LOOPS[name])[0]
    return _gru_window(network, x, d_output, input_gradient)


def compare_loop(name: str, network: Network, x: np.ndarray, d_output: np.ndarray, where: str = "cpu") -> None:
    """Compare the gradients of a loop with ours over a few steps. Raises RuntimeError where they differ."""
    model = Model(network)
    _, _, tape = model.forward(x, State.zeros(network, x.shape[1]))
    ours, theirs = model.backward(tape, d_output), torch_loop(network, x, d_output, False, LOOPS[name], where)[1]()
    for parameter, gradient in theirs.items():
        gradient = gradient * model.masks[parameter] if parameter in model.masks else gradient
        apart, size = np.abs(ours[parameter] - gradient).max(), np.abs(gradient).max()
        if apart > SAME_GRADIENT * size:
            raise RuntimeError(f"against {name}: the gradient of {parameter} differs by {apart:.1e} of {size:.1e}")
