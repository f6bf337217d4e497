"""Truncated backpropagation through time, through all layers of a network, at a cost in proportion to its events.

`Model` holds a network's parameters as dense float32 arrays by name. For each window, `forward` returns a tape, and
`backward` turns the gradient of the output into gradients of every parameter. A surrogate derivative replaces that of
the event; with a smooth event the gradients are exact (`reference.backward`, tested by finite differences). `layer.py`
chooses which products go over events; `kernels/time_loops.py` says which work is skipped, and why the result is the
same. Layers of cells without thresholds, whose units send at every step, have `plain_layer.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from eventrnn._arithmetic import standard_arithmetic
from eventrnn._arrays import own_arrays
from eventrnn._checks import (
    float32_array,
    need_choice,
    need_flag,
    need_kind,
    need_number,
    need_whole,
    number_array,
    plain_array,
)
from eventrnn._exclusive import Use, exclusive
from eventrnn.cells import Cell
from eventrnn.counting.backward import BackwardWork
from eventrnn.cpu.engine import MOST_THREADS
from eventrnn.cpu.threads import Team
from eventrnn.network import Layer, Network, Readout, need_thresholds
from eventrnn.simulation import need_single_states
from eventrnn.state import State
from eventrnn.training import thresholds as rules
from eventrnn.training.bptt.gated_products import GatedMatrix, GatedProduct, Gating, gate_parameters
from eventrnn.training.bptt.layer import LayerEngine
from eventrnn.training.bptt.noise import Noise
from eventrnn.training.bptt.plain_layer import PlainLayerEngine
from eventrnn.training.bptt.tape import GradientMask, LayerTape
from eventrnn.training.bptt.workspace import Arena
from eventrnn.training.losses import cross_entropy
from eventrnn.weights import Dense, GatedBlocks, MatrixId, Weights

F32 = np.float32

BACKWARDS = ("auto", "dense", "sparse")

LAYER_PARAMETERS = ("w_in", "w_rec", "bias_in", "bias_rec", "threshold")


@dataclass
class Tape:
    """What the backward pass needs of a window.

    Attributes
    ----------
    layers  : a `LayerTape` per layer
    symbols : (T, B) symbols that the embedding looked up, or None
    top     : (T, B, N) input of the read-out, after noise
    noise   : the noise that was applied
    readout : the product of the read-out, if it has gated blocks
    """

    layers: list[LayerTape]
    symbols: np.ndarray | None
    top: np.ndarray
    noise: Noise
    readout: GatedProduct | None = None

    @property
    def products(self) -> dict[str, GatedProduct]:
        """The products of all matrices of gated blocks, by the name of the matrix."""
        named = {f"layers.{k}.{name}": p for k, layer in enumerate(self.layers) for name, p in layer.products.items()}
        return named if self.readout is None else named | {"readout": self.readout}

    @property
    def activity(self) -> float:
        """Events per unit, step and sample, over all layers."""
        return sum(np.count_nonzero(k.y[1:]) for k in self.layers) / max(1, sum(k.v.size for k in self.layers))

    @property
    def events(self) -> np.ndarray:
        """Events of all layers per step and sample, (T, B) integers."""
        return np.sum([np.count_nonzero(k.y[1:], axis=2) for k in self.layers], axis=0)

    @property
    def layer_activity(self) -> np.ndarray:
        """Events per unit, step and sample of each layer, (layers,) float64."""
        return np.array([np.count_nonzero(k.y[1:]) / max(1, k.v.size) for k in self.layers])

    @property
    def support(self) -> float:
        """Share of (step, sample, unit) triples, over all layers, where the unit fired or its surrogate slope is not
        zero. Known after `backward`; NaN before."""
        return sum(k.support * k.v.size for k in self.layers) / max(1, sum(k.v.size for k in self.layers))

    @property
    def work(self) -> dict[str, BackwardWork]:
        """Operations of the backward pass by matrix, for `counting.count_backward`."""
        return {f"layers.{k}.{name}": work for k, layer in enumerate(self.layers) for name, work in layer.work.items()}


class Model:
    """The parameters of a network as dense arrays, with a forward and a backward pass over windows.

    Weights that `masks` prune stay exactly zero.

    Parameters
    ----------
    network    : its parameters are copied
    backward   : "sparse": every product goes over events, active pairs and stored weights; "dense": every product goes
                 through BLAS; "auto": each product goes the faster way, as estimated from the window's activity, its
                 share of active pairs and the density of the masks. Products of GRU and LSTM cells are dense
    threads    : number of threads, 1 to the number of cores. The bits of products over events do not depend on it.
                 With 1, BLAS keeps its own number of threads
    thresholds : "positive" (kept at zero or above), "clamped" (to [0, 1], as in EvNN), "sigmoid" (the parameter is the
                 threshold's logit) or "fixed" (no gradient)

    Attributes
    ----------
    parameters : `embedding` (V, E), `layers.k.w_in` (I, GN), `.w_rec` (N, GN), `.bias_in`, `.bias_rec` (GN,), for cells
                 of G gates, `.threshold` (N,), `readout` (N, V), `readout.bias` (V,); no `readout` when it is tied to
                 the embedding. Of a matrix of gated blocks also `.gate`, `.gate_bias` and, of two factors, `.gate_out`
    gated      : the matrices of gated blocks of the network, by name
    masks      : boolean arrays by parameter name, False where pruned. At first, weights that a sparse matrix of the
                 network does not store are pruned; those of a tied read-out by the mask of the embedding

    All products of gated blocks go through BLAS, whatever `backward` is (`bptt/gated_products.py`).

    Raises ValueError for an unknown `backward` or `thresholds`, for a number of threads out of range, and for
    `backward="sparse"` of a network with GRU or LSTM cells, whose units send their output at every step.
    """

    def __init__(self, network: Network, *, backward: str = "auto", threads: int = 1, thresholds: str = "positive"):
        need_kind("network", network, Network, "a Network")
        if network.one_hot:
            raise ValueError(
                "network: its embedding is folded into layers.0.w_in, which is for inference; train the network with "
                "its embedding, and fold it afterwards"
            )
        need_choice("backward", backward, BACKWARDS)
        need_whole("threads", threads)
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads: got {threads}, need 1 to {MOST_THREADS}; more threads than cores only wait")
        rules.check_rule(thresholds)
        if backward == "sparse":
            need_thresholds(network, "backward: got 'sparse'", "use backward='auto'")
        self.template, self.backward_mode, self.threads, self.thresholds = network, backward, threads, thresholds
        self.cells: list[Cell] = [layer.cell for layer in network.layers]
        self.tied = network.readout is not None and network.readout.tied
        self.masks: dict[str, np.ndarray] = {}
        self.gated: dict[str, GatedBlocks] = {}
        self.parameters: MutableMapping[str, np.ndarray] = {}
        if network.embedding is not None:
            self.parameters["embedding"] = network.embedding.copy()
        for k, layer in enumerate(network.layers):
            for name in ("w_in", "w_rec"):
                # Pruning reads the number of gates from the name.
                self._take_matrix(MatrixId.of(k, name, layer.cell.gates), getattr(layer, name))
            for name in ("bias_in", "bias_rec", "threshold"):
                self.parameters[f"layers.{k}.{name}"] = getattr(layer, name).copy()
            self.parameters[f"layers.{k}.threshold"] = rules.to_parameter(self._rule(k), layer.threshold)
        if network.readout is not None:
            if not self.tied:
                self._take_matrix("readout", network.readout.weights)
            elif not isinstance(network.readout.weights, Dense):
                self.masks["embedding"] = np.ascontiguousarray(network.readout.weights.kept().T)
            self.parameters["readout.bias"] = network.readout.bias.copy()
        self._team, self._arena, self._use = Team(threads), Arena(), Use("model")
        self._shapes = {name: value.shape for name, value in self.parameters.items()}
        self._engines = [
            LayerEngine(cell, backward, self._team, self._arena)
            if cell.thresholded
            else PlainLayerEngine(cell, "dense", self._team, self._arena)
            for cell in self.cells
        ]

    def _take_matrix(self, name: str, weights: Weights) -> None:
        """Make parameters of a matrix, and a mask of what it does not store."""
        plain, kept = weights, None
        if isinstance(weights, GatedBlocks):
            self.gated[name], plain = weights, weights.blocks
        self.parameters[name] = np.ascontiguousarray(plain.to_dense())
        if isinstance(weights, GatedBlocks):
            self.parameters.update(gate_parameters(name, weights))
        if not isinstance(plain, Dense):
            kept = plain.kept()
        if kept is not None and not (name in self.gated and kept.all()):
            self.masks[name] = kept

    def _rule(self, k: int) -> str:
        """The rule of the thresholds of layer k. The zeros of a cell without thresholds stay, whatever the rule is."""
        return self.thresholds if self.cells[k].thresholded else "fixed"

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        own_arrays([self.parameters, self.masks])

    def __copy__(self) -> Model:
        # A shallow copy would share the memory of the kernels.
        return copy.deepcopy(self)

    def network(self, parameters: Mapping[str, np.ndarray] | None = None) -> Network:
        """A network with copies of the parameters, all weights dense or, where they were, gated blocks.

        parameters : instead of the present ones; masks and the bounds of thresholds are applied
        """
        p = self.parameters
        if parameters is not None:
            p = {name: parameters[name] * self.masks.get(name, F32(1)) for name in parameters}
            for k in range(len(self.cells)):
                rules.clamp(self._rule(k), p[f"layers.{k}.threshold"])
        layers = tuple(
            Layer(
                self._matrix(f"layers.{k}.w_in", p),
                self._matrix(f"layers.{k}.w_rec", p),
                p[f"layers.{k}.bias_in"].copy(),
                p[f"layers.{k}.bias_rec"].copy(),
                rules.from_parameter(self._rule(k), p[f"layers.{k}.threshold"]),
                self.cells[k],
            )
            for k in range(len(self.cells))
        )
        embedding = p["embedding"].copy() if "embedding" in p else None
        readout = None
        if "readout.bias" in p:
            if self.tied and embedding is not None:
                weights = Dense(np.ascontiguousarray(embedding.T))
            else:
                weights = self._matrix("readout", p)
            readout = Readout(weights, p["readout.bias"].copy(), tied=self.tied)
        return replace(self.template, layers=layers, embedding=embedding, readout=readout)

    def _matrix(self, name: str, p: Mapping[str, np.ndarray]) -> Weights:
        """A matrix of a network, with copies of the parameters."""
        if name not in self.gated:
            return Dense(p[name].copy())
        gate, bias = (p[f"{name}{end}"] for end in (".gate", ".gate_bias"))
        return self.gated[name].with_numbers(p[name], gate, bias, p.get(f"{name}.gate_out"))

    def apply_masks(self) -> None:
        """Set every pruned weight to zero, and every threshold to the nearest value that its rule allows. In place."""
        for name, mask in self.masks.items():
            self.parameters[name] *= mask
        for k in range(len(self.cells)):
            rules.clamp(self._rule(k), self.parameters[f"layers.{k}.threshold"])

    @property
    def threshold_bounds(self) -> tuple[float, float]:
        """The range of the parameters that stand for thresholds."""
        return rules.bounds(self.thresholds)

    def readout_weights(self) -> np.ndarray:
        """Weights of the read-out (N, V), a view; the transposed embedding when tied."""
        return self.parameters["embedding"].T if self.tied else self.parameters["readout"]

    @exclusive
    @standard_arithmetic
    def forward(
        self, inputs: np.ndarray, state: State, noise: Noise | None = None, gating: Gating | None = None
    ) -> tuple[np.ndarray, State, Tape]:
        """Run a window of T steps and B samples.

        inputs : (T, B) symbols, or (T, B, I) numbers for a network without embedding
        state  : state before the window
        noise  : masks of dropout and zoneout; none by default
        gating : how gated blocks are chosen; by default as the network chooses them, with the exact gradient

        Returns the output (T, B, V), or the outputs (T, B, N) of the last layer without a read-out; the state after the
        window; and the tape. Raises ValueError for inputs, noise, a state, parameters or masks of the wrong shape, and
        for symbols outside the embedding; FloatingPointError for gates that are not finite.
        """
        p, noise = self.parameters, Noise() if noise is None else noise
        gating = Gating() if gating is None else gating
        inputs = self._checked_inputs(inputs)
        symbols = inputs if "embedding" in p else None
        need_kind("noise", noise, Noise, "a Noise, or None")
        need_kind("gating", gating, Gating, "a Gating, or None")
        if unknown := set(gating.densities) - set(self.gated):
            have = ", ".join(self.gated) or "none"
            raise ValueError(f"gating densities: got {sorted(unknown)[0]}, which has no gated blocks; have {have}")
        noise.check(inputs.shape[0], inputs.shape[1], *self._sizes(), [cell.gates for cell in self.cells])
        need_kind("state", state, State, "a State: State.zeros(network, batch)")
        self._check(state, inputs.shape[1])
        if symbols is None:
            x = np.ascontiguousarray(inputs, F32)
        else:
            x = p["embedding"][inputs]
            if noise.words is not None:
                x *= noise.words[inputs][:, :, None]
        x = _scaled(x, noise.inputs)
        layers, cells_after, outputs_after = [], [], []
        for k in range(len(self.cells)):
            if k > 0:
                x = _scaled(x, noise.of("between", k - 1))
            tape = self._engines[k].forward(
                self._layer(k, noise, gating, state), x, state.cells[k], state.outputs[k], noise.of("zoneout", k)
            )
            layers.append(tape)
            cells_after.append(tape.c[-1].copy())
            outputs_after.append(tape.y[-1].copy())
            x = tape.y[1:]
        x = _scaled(x, noise.top)
        output, readout = x, None
        if "readout.bias" in p:
            top = x.reshape(-1, x.shape[2])
            if "readout" in self.gated:
                matrix = self._gated_matrix("readout", gating, state)
                readout = GatedProduct(matrix, len(top), self._team, self._arena)
                flat = readout.drives(np.ascontiguousarray(top), 0)
            else:
                flat = self._team.multiply(top, self.readout_weights())
            flat += p["readout.bias"]
            output = flat.reshape(*x.shape[:2], flat.shape[1])
        tape = Tape(layers, symbols, x, noise, readout)
        gates = {name: held for name, product in tape.products.items() if (held := product.held()) is not None}
        return output, State(tuple(cells_after), tuple(outputs_after), gates), tape

    def score(self, inputs: np.ndarray, targets: np.ndarray, state: State) -> tuple[float, State, np.ndarray]:
        """The mean of -ln softmax(output)[target] over all steps and samples, without noise.

        inputs, state : as for `forward`
        targets       : (T, B) integers in 0..V - 1

        Returns the mean in nats, the state after the window, and the activity of each layer, (layers,) float64. Raises
        as `forward` does.
        """
        output, state, tape = self.forward(inputs, state)
        return cross_entropy(output, targets)[0], state, tape.layer_activity

    def _check(self, state: State, batch: int) -> None:
        """Refuse a state, parameters and masks of other shapes: kernels do not check an index. Raises ValueError."""
        for name, shape in self._shapes.items():
            value = self.parameters[name]
            if value.shape != shape or value.dtype != F32 or not value.flags.c_contiguous:
                raise ValueError(
                    f"parameters: {name} is {value.dtype} {value.shape}, need C-contiguous float32 {shape}; change "
                    "parameters in place"
                )
        for name, mask in self.masks.items():
            if mask.dtype != bool or mask.shape != self._shapes.get(name):
                raise ValueError(f"masks: {name} is {mask.dtype} {mask.shape}, need bool {self._shapes.get(name)}")
        state.need_shapes(self._sizes()[0], batch, self.template.shared_gates())
        need_single_states(self.template, state)

    def _checked_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs of `forward` as a plain array, numbers as float32. Raises ValueError."""
        _, size, symbols = self._sizes()
        if symbols is not None:
            array = plain_array("inputs", inputs)
            if array.ndim != 2:
                raise ValueError(f"inputs: got shape {array.shape}, need (T, B) symbols")
            # The backward pass sums rows by symbol in a product that does not check its indices.
            check_range("inputs", array, symbols, "(step, sample)")
        else:
            array = float32_array("inputs", inputs, f"(T, B, {size})", ndim=3)
            if array.shape[2] != size:
                raise ValueError(f"inputs: got shape {array.shape}, need (T, B, {size}) numbers")
        return array

    def _sizes(self) -> tuple[list[int], int, int | None]:
        """Units of each layer, inputs of the first layer, symbols of the embedding or None."""
        units = [len(self.parameters[f"layers.{k}.threshold"]) for k in range(len(self.cells))]
        symbols = len(self.parameters["embedding"]) if "embedding" in self.parameters else None
        return units, len(self.parameters["layers.0.w_in"]), symbols

    def _gated_matrix(self, name: str, gating: Gating, state: State) -> GatedMatrix:
        return GatedMatrix.of(name, self.gated[name], self.parameters, gating, state.gates.get(name))

    def _layer(self, k: int, noise: Noise, gating: Gating, state: State) -> dict[str, Any]:
        """Parameters of a layer as this window uses them: DropConnect applied, thresholds instead of their logits."""
        p: dict[str, Any] = {name: self.parameters[f"layers.{k}.{name}"] for name in LAYER_PARAMETERS}
        for name in ("w_in", "w_rec"):
            if f"layers.{k}.{name}" in self.gated:
                p[name] = self._gated_matrix(f"layers.{k}.{name}", gating, state)
        self._follow_masks(k)
        if (dropped := noise.of("recurrent", k)) is not None:
            w_rec = p["w_rec"]
            scaled = isinstance(w_rec, GatedMatrix)
            p["w_rec"] = w_rec.scaled_by(dropped) if scaled else np.multiply(w_rec, dropped, dtype=F32)
        p["threshold"] = rules.from_parameter(self._rule(k), p["threshold"])
        return p

    def _follow_masks(self, k: int) -> None:
        """Update the sparse patterns of a layer to the masks."""
        for name in ("w_in", "w_rec"):
            full = f"layers.{k}.{name}"
            shape, gated = self.parameters[full].shape, full in self.gated
            self._engines[k].pattern(name, shape, self.masks.get(full), gated=gated)

    @exclusive
    @standard_arithmetic
    def backward(
        self,
        tape: Tape,
        d_output: np.ndarray,
        *,
        activity_cost: float = 0.0,
        d_events: tuple[np.ndarray | None, ...] = (),
        d_cells: tuple[np.ndarray | None, ...] = (),
        d_logits: Mapping[str, np.ndarray] | None = None,
        d_inputs: bool | np.ndarray = False,
        stored: bool = False,
    ) -> dict[str, np.ndarray]:
        """Gradients of all parameters, by name. The state before the window counts as constant.

        tape          : the window, from `forward`
        d_output      : (T, B, V) gradient of the output
        activity_cost : add this factor times the mean output of each layer, over its steps, samples and units, to the
                        loss
        d_events      : for each layer a further gradient of its output `y` (T, B, N), or None; empty for none at all
        d_cells       : the same for the cell state before the event, `v`
        d_logits      : a further gradient (T, B, K) of the logits of gated blocks, by the name of the matrix
        d_inputs      : True: return the gradient of the inputs (T, B, I) too, as "inputs"; for symbols, that of the
                        embedding's rows that were read. A boolean array (T, B, I): compute it only where the array is
                        True; it is zero elsewhere
        stored        : for a pruned matrix, return the gradient of the kept weights only, in the order of
                        `parameter[mask]`. Where products use stored weights, no dense gradient is then formed. If
                        False, pruned weights have a gradient of zero

        The cost grows with the number of events (weight gradients) and of active pairs (gradients between layers and
        steps); `tape.work` has the counts. Raises ValueError for `d_output` or `d_inputs` of the wrong shape.
        """
        need_kind("tape", tape, Tape, "the tape of `forward`")
        need_number("activity_cost", activity_cost)
        if activity_cost:
            need_thresholds(self.template, f"activity_cost: got {activity_cost}", "leave it out")
        need_flag("stored", stored)
        d_output = number_array("d_output", d_output, "of the shape of the output", kinds="f")
        shapes = [layer.v.shape for layer in tape.layers]
        for name, further in (("d_events", d_events), ("d_cells", d_cells)):
            _check_further(name, further, shapes)
        _add_to_logits(tape, {} if d_logits is None else d_logits)
        p, gradients, noise = self.parameters, {}, tape.noise
        expected = (*tape.top.shape[:2], *(p["readout.bias"].shape if "readout.bias" in p else tape.top.shape[2:]))
        if d_output.shape != expected:
            raise ValueError(f"d_output: got {d_output.shape}, need the output's shape {expected}")
        mask = _input_mask(d_inputs, tape)
        return_inputs = mask is not None or bool(d_inputs)
        bottom = None
        if mask is not None:
            bottom = GradientMask.of_mask(mask, self._team, self._arena)
        elif return_inputs or tape.symbols is not None:
            bottom = GradientMask()
        d_x = d_output
        if "readout.bias" in p:
            flat = d_output.reshape(-1, d_output.shape[2])
            top = np.ascontiguousarray(tape.top).reshape(len(flat), tape.top.shape[-1])
            gradients["readout.bias"] = flat.sum(axis=0)
            if tape.readout is not None:
                flat = np.ascontiguousarray(flat, F32)
                d_x = tape.readout.input_gradient(top, flat, 0).reshape(tape.top.shape)
                gradients |= {f"readout{end}": each for end, each in tape.readout.gradients(top, flat).items()}
            else:
                d_weights = self._team.multiply(top.T, flat)
                gradients["embedding" if self.tied else "readout"] = d_weights.T.copy() if self.tied else d_weights
                d_x = self._team.multiply(flat, self.readout_weights().T).reshape(tape.top.shape)
        for k in reversed(range(len(self.cells))):
            layer, scale = tape.layers[k], noise.of("between", k) if k + 1 < len(self.cells) else noise.top
            d_y = _scaled(d_x, scale)
            if activity_cost:
                d_y = d_y + F32(activity_cost / layer.v.size) * (layer.y[1:] > 0)
            if d_events and (further := d_events[k]) is not None:
                d_y = d_y + further
            d_y = np.ascontiguousarray(d_y, F32)
            below = GradientMask.of_layer(tape.layers[k - 1], self.cells[k - 1]) if k else bottom
            w_in = self.parameters[f"layers.{k}.w_in"]
            if layer.engine is not self._engines[k]:
                # The tape was written by another model of the same network.
                self._follow_masks(k)
            d_cell = d_cells[k] if d_cells else None
            result = self._engines[k].backward({"w_in": w_in}, layer, d_y, d_cell, below, stored)
            # Only the first layer may return none.
            d_x = d_x if result.d_x is None else result.d_x
            for name, gradient in result.gradients.items():
                gradients[f"layers.{k}.{name}"] = gradient
            if (dropped := noise.of("recurrent", k)) is not None:
                self._drop_back(k, gradients, dropped, stored)
            gradients[f"layers.{k}.threshold"] = rules.gradient(
                self._rule(k), layer.threshold, gradients[f"layers.{k}.threshold"]
            )
        d_x = _scaled(d_x, noise.inputs) if bottom is not None else d_x
        if return_inputs:
            gradients["inputs"] = d_x
        if tape.symbols is not None:
            if noise.words is not None:
                d_x = d_x * noise.words[tape.symbols][:, :, None]
            d_embedding = _sum_by_symbol(tape.symbols, d_x, len(p["embedding"]))
            gradients["embedding"] = gradients["embedding"] + d_embedding if self.tied else d_embedding
        for name in ("readout", "embedding"):
            if (mask := self.masks.get(name)) is not None and name in gradients:
                gradients[name] = gradients[name][mask] if stored else gradients[name] * mask
        return gradients

    def _drop_back(self, k: int, gradients: dict[str, np.ndarray], dropped: np.ndarray, stored: bool) -> None:
        name = f"layers.{k}.w_rec"
        mask = self.masks.get(name)
        gradients[name] *= dropped[mask] if stored and mask is not None else dropped


def _check_further(name: str, gradients: Sequence[np.ndarray | None], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError unless there is no gradient at all, or for each layer None or one of its shape."""
    if len(gradients) not in (0, len(shapes)):
        raise ValueError(f"{name}: got {len(gradients)} gradients, need one or None for each of {len(shapes)} layers")
    for k, gradient in enumerate(gradients):
        if gradient is not None and number_array(f"{name}[{k}]", gradient, f"{shapes[k]}").shape != shapes[k]:
            raise ValueError(f"{name}[{k}]: got shape {gradient.shape}, need {shapes[k]}")


def _add_to_logits(tape: Tape, d_logits: Mapping[str, np.ndarray]) -> None:
    """Let the products of a tape add these gradients to those of their logits. Raises ValueError."""
    products = tape.products
    need_kind("d_logits", d_logits, Mapping, "a mapping of names of matrices to gradients, or None")
    for name, gradient in d_logits.items():
        if name not in products:
            raise ValueError(f"d_logits: got {name}, which has no gated blocks; have {', '.join(products) or 'none'}")
        need = (*tape.top.shape[:2], products[name].logits.shape[1])
        if number_array(f"d_logits of {name}", gradient, f"{need}", kinds="f").shape != need:
            raise ValueError(f"d_logits of {name}: got shape {gradient.shape}, need {need}")
        sources = products[name].sources
        if sources is not None and gradient.reshape(len(sources), -1)[sources != np.arange(len(sources))].any():
            raise ValueError(f"d_logits of {name}: got a gradient in a step that does not choose, and has no logits")
    for name, product in products.items():
        further = d_logits.get(name)
        product.d_further = None if further is None else np.asarray(further, F32).reshape(product.logits.shape)


def check_range(name: str, symbols: np.ndarray, size: int, axes: str) -> None:
    """Refuse what is no symbol, saying where along `axes` the first of them is. Raises ValueError."""
    if symbols.dtype.kind not in "iu":
        raise ValueError(f"{name}: got {symbols.dtype}, need whole numbers 0..{size - 1} for the embedding")
    if symbols.size and not (symbols.min() >= 0 and symbols.max() < size):
        at = tuple(map(int, np.argwhere((symbols < 0) | (symbols >= size))[0]))
        raise ValueError(f"{name}: got symbol {symbols[at]} at {axes} {at}, need 0..{size - 1}")


def _input_mask(d_inputs: bool | np.ndarray, tape: Tape) -> np.ndarray | None:
    """`d_inputs` if it is a mask, None if it is True or False. Raises ValueError for anything else."""
    if isinstance(d_inputs, bool | np.bool_):
        return None
    shape = tape.layers[0].x.shape
    if not isinstance(d_inputs, np.ndarray):
        raise ValueError(f"d_inputs: got {d_inputs!r}, need True, False or an array of booleans {shape}")
    if tape.symbols is not None:
        raise ValueError("d_inputs: got a mask for a window of symbols, whose embedding needs all; give True or False")
    if d_inputs.dtype != bool or d_inputs.shape != shape:
        raise ValueError(f"d_inputs: got {d_inputs.dtype} {d_inputs.shape}, need True, False or booleans {shape}")
    return d_inputs


def _sum_by_symbol(symbols: np.ndarray, d_x: np.ndarray, size: int) -> np.ndarray:
    """Rows of d_x (T, B, E) summed by their symbol, (size, E): a sparse one-hot product, 20 times as fast as
    `np.add.at`."""
    n = symbols.size
    ones = sp.csc_array((np.ones(n, F32), symbols.ravel(), np.arange(n + 1)), shape=(size, n))
    return ones @ d_x.reshape(n, d_x.shape[-1])


def _scaled(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return x if mask is None else x * mask
