"""Event networks as modules of PyTorch: `EGRU` has the call of `torch.nn.GRU`, and this library's engines run it.

    model = eventrnn.torch.EGRU(input_size=64, hidden_size=256, num_layers=2)
    output, state = model(inputs)                   # (steps, batch, 64) -> (steps, batch, 256)
    output.square().mean().backward()               # sparse backward pass with the surrogate derivative

Parameters are ordinary parameters of PyTorch, and optimisers, DataLoaders, `state_dict` and Lightning take them. The
engine reads and writes their memory; nothing is copied on the way in, and outputs are not copied on the way out. As
everywhere in PyTorch, it is an error to change them in place before the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from eventrnn import reference
from eventrnn._checks import check_finite, need_flag, need_kind, need_number, need_whole, said
from eventrnn.cells import Cell
from eventrnn.network import Layer, Network
from eventrnn.state import State
from eventrnn.training import thresholds as rules
from eventrnn.training.bptt.model import LAYER_PARAMETERS, Model
from eventrnn.training.bptt.noise import Noise
from eventrnn.weights import CSR, Dense
from eventrnn.weights.gated import need_matrices

#: The state between two calls: outputs and cells, each (num_layers, batch, hidden_size).
TorchState = tuple[Tensor, Tensor]


class EGRU(nn.Module):
    """Layers of event-based GRUs, with the call of `torch.nn.GRU`, on the CPU.

    Parameters
    ----------
    input_size, hidden_size : inputs and units of a layer
    num_layers  : number of layers, each of which reads the events of the one below
    bias        : whether layers have biases
    batch_first : whether inputs and outputs are (batch, steps, size) instead of (steps, batch, size)
    dropout     : share of the outputs between layers that is dropped in training, in [0, 1)
    threshold   : mean of the initial thresholds, in [0, 1); None for that of `Network.random`
    cell        : the cell and its surrogate derivative. Of `Cell("gru")` and `Cell("lstm")`, whose units have no
                  thresholds, the same engines run the plain networks
    thresholds  : rule of the thresholds in training; see `eventrnn.training.Model`
    backward    : products of the backward pass; see `eventrnn.training.Model`
    threads     : threads of the engine, beside those of PyTorch

    The parameters of layer k are `w_in_l{k}` (I, 3 N), `w_rec_l{k}` (N, 3 N), `bias_in_l{k}` and `bias_rec_l{k}`
    (3 N,), and `threshold_l{k}` (N,), with gates in the order (u, r, g). An LSTM has 4 N columns, in the order
    (i, f, g, o).
    Weights that the optimiser must leave at zero are given by `from_network`, or by `torch.nn.utils.prune`.

    In double precision, after `.double()`, the specification of this library runs in place of the engine: plain loops,
    a thousand times as slow, for `torch.autograd.gradcheck` and for comparisons. With `module.smooth = True` its events
    are the smooth steps whose derivative the surrogate is, so that its gradient is an exact derivative.

    Raises ValueError for arguments that are not like this.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        threshold: float | None = None,
        cell: Cell = Cell(),
        thresholds: str = "positive",
        backward: str = "auto",
        threads: int = 1,
    ):
        need_whole("input_size", input_size, at_least=1)
        need_whole("hidden_size", hidden_size, at_least=1)
        need_whole("num_layers", num_layers, at_least=1)
        need_flag("bias", bias)
        # `torch.manual_seed` fixes the initial weights, as of every module.
        seed = int(torch.randint(2**31, ()).item())
        network = Network.random(
            [hidden_size] * num_layers,
            inputs=input_size,
            rng=np.random.default_rng(seed),
            cell=cell,
            threshold=threshold,
        )
        self._set_up(network, bias, batch_first, dropout, thresholds, backward, threads)

    @classmethod
    def from_network(
        cls,
        network: Network,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        thresholds: str = "positive",
        backward: str = "auto",
        threads: int = 1,
    ) -> EGRU:
        """A module with the layers of a network, whose units are as many in every layer.

        Weights that a sparse matrix does not store are pruned: their gradient is zero, and they stay zero. The read-out
        and the embedding of a network are not taken, as `torch.nn.Linear` and `torch.nn.Embedding` do their work.

        Raises ValueError for layers of different sizes and for a network with gated blocks.
        """
        need_kind("network", network, Network, "a Network")
        need_matrices(network.matrices(), "EGRU of PyTorch")
        units = {layer.units for layer in network.layers}
        if len(units) > 1:
            raise ValueError(
                f"network: got layers of {', '.join(map(str, sorted(units)))} units, need the same number in all; make "
                "one module per layer"
            )
        made = cls.__new__(cls)
        bare = Network(network.layers)
        made._set_up(bare, True, batch_first, dropout, thresholds, backward, threads)
        return made

    def _set_up(
        self,
        network: Network,
        bias: bool,
        batch_first: bool,
        dropout: float,
        thresholds: str,
        backward: str,
        threads: int,
    ) -> None:
        nn.Module.__init__(self)
        self.input_size, self.hidden_size = network.layers[0].inputs, network.layers[0].units
        self.num_layers, self.bias = len(network.layers), bias
        self.batch_first = need_flag("batch_first", batch_first)
        self.smooth = False
        self.dropout = need_number("dropout", dropout, at_least=0, below=1, what="share")
        if self.dropout and self.num_layers == 1:
            # torch.nn.GRU warns too.
            warnings.warn(f"dropout: got {dropout}, which acts between layers, and there is one", stacklevel=3)
        self.options: dict[str, Any] = {"thresholds": thresholds, "backward": backward, "threads": threads}
        self.cells = [layer.cell for layer in network.layers]
        self._model: Model | None = Model(network, **self.options)
        for name, value in self._model.parameters.items():
            own, given = _name(name), torch.from_numpy(value)
            learned = not (name.endswith("threshold") and (thresholds == "fixed" or not self._cell(name).thresholded))
            if "bias" in name and not bias:
                self.register_buffer(own, torch.zeros_like(given), persistent=False)
            else:
                self.register_parameter(own, nn.Parameter(given, requires_grad=learned))
        for name, mask in self._model.masks.items():
            self.register_buffer(f"kept_{_name(name)}", torch.from_numpy(mask.copy()))

    def _cell(self, name: str) -> Cell:
        return self.cells[int(name.split(".")[1])]

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        words = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        cell = self.cells[0]
        return f"{words}, batch_first={self.batch_first}, dropout={self.dropout}, cell={cell.name}/{cell.variant}"

    def __getstate__(self) -> dict[str, Any]:
        # The engine holds addresses, and a copy makes its own.
        return self.__dict__ | {"_model": None}

    # --- running ---

    @torch.compiler.disable
    def forward(
        self,
        input: Tensor | PackedSequence,
        state: TorchState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, TorchState]:
        """Run a window from a state on.

        Parameters
        ----------
        input   : (steps, batch, input_size), or (batch, steps, input_size) with `batch_first`; (steps, input_size) of
                  one sample; or a packed sequence
        state   : what a call before returned; None for zeros. A state that requires a gradient is refused
        lengths : (batch,) number of steps of each sample, where they differ. What follows is padding; the output there
                  is zero

        Returns the outputs of the last layer, in the form of the input, and the state after the last step of each
        sample. The gradient does not pass through the state: a window of truncated backpropagation ends there.

        Under `torch.compile` the module is a break of the graph. Under autocast, and for inputs of another type, it
        runs in float32. Raises ValueError for inputs of another size, kind or device.
        """
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None:
            if lengths is not None:
                raise ValueError("lengths: got lengths beside a packed sequence, which has its own")
            input, lengths = pad_packed_sequence(packed, batch_first=False)
        x, single = self._steps_first(input, packed is not None)
        ends = self._ends(lengths, x)
        before = self._checked_state(state, x.shape[1], single)
        if ends is not None:
            there = torch.arange(len(x))[:, None] < ends
            x = torch.where(there[:, :, None], x, torch.zeros((), dtype=x.dtype))
        arguments = [getattr(self, _name(name)) for name in self._names()]
        kinds = {argument.dtype for argument in arguments}
        double = kinds == {torch.float64}
        if self.smooth and not double:
            raise ValueError(
                f"smooth: needs all parameters in float64, got {', '.join(map(str, kinds))}; call .double()"
            )
        window, kind = (_Specification, torch.float64) if double else (_Window, torch.float32)
        output, outputs, cells = window.apply(self, x.to(kind), before, ends, *arguments)
        if ends is not None:
            output = torch.where(there[:, :, None], output, torch.zeros((), dtype=output.dtype))
        after = (outputs[:, 0], cells[:, 0]) if single else (outputs, cells)
        if packed is not None and ends is not None:
            return _packed_like(packed, output, ends), after
        if single:
            return output[:, 0], after
        return (output.transpose(0, 1) if self.batch_first else output), after

    def to_network(self) -> Network:
        """A network with copies of the parameters. Matrices with pruned weights are stored as CSR."""
        model = self._bound([getattr(self, _name(name)) for name in self._names()])
        sparse = {
            name: CSR.from_weights(weights)
            for name, weights in model.network().matrices().items()
            if name in model.masks
        }
        return model.network().with_matrices(sparse)

    # --- parts of a call ---

    def _names(self) -> list[str]:
        """The parameters of the engine, in order."""
        return [f"layers.{k}.{name}" for k in range(self.num_layers) for name in LAYER_PARAMETERS]

    def _bound(self, values: Sequence[Tensor]) -> Model:
        """The engine with the memory of these tensors as its parameters. Pruned weights are set to zero, and thresholds
        to what their rule allows, where an optimiser has moved them."""
        if self._model is None:
            self._model = Model(self._template(), **self.options)
        model = self._model
        for name, tensor in zip(self._names(), values, strict=True):
            array = _array(name, tensor)
            mask = getattr(self, f"kept_{_name(name)}", None)
            if mask is not None:
                model.masks[name] = mask.numpy()
                if np.any(array[~model.masks[name]]):
                    array *= model.masks[name]
            elif name in model.masks:
                del model.masks[name]
            if name.endswith("threshold"):
                rules.clamp(self.options["thresholds"], array)
            model.parameters[name] = array
        return model

    def _template(self) -> Network:
        """A network of the shapes of this module, for an engine whose parameters are then replaced."""
        layers, inputs = [], self.input_size
        for cell in self.cells:
            columns, units = cell.gates * self.hidden_size, self.hidden_size
            w_in, w_rec, bias = (
                np.zeros(shape, np.float32) for shape in ((inputs, columns), (units, columns), columns)
            )
            # A threshold that every rule allows.
            threshold = np.full(units, 0.5 if cell.thresholded else 0, np.float32)
            layers.append(Layer(Dense(w_in), Dense(w_rec), bias, bias.copy(), threshold, cell))
            inputs = units
        return Network(tuple(layers))

    def _steps_first(self, input: Any, packed: bool) -> tuple[Tensor, bool]:
        """The input as (steps, batch, input_size), and whether it is one sample without a batch."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input: got {type(input).__name__}, need a tensor or a packed sequence")
        if input.device.type != "cpu":
            raise ValueError(f"input: got a tensor on {input.device}, need one on the CPU; move module and input there")
        if input.layout != torch.strided or input.is_nested:
            raise ValueError("input: got a sparse or a nested tensor, need a dense one; .to_dense() makes it")
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size or not input.is_floating_point():
            raise ValueError(f"input: got {input.dtype} {tuple(input.shape)}, need numbers (…, {self.input_size})")
        if not len(input) or not input.shape[-2]:
            raise ValueError(f"input: got shape {tuple(input.shape)}, need at least one step and one sample")
        if input.ndim == 2:
            return input[:, None], True
        return (input.transpose(0, 1) if self.batch_first and not packed else input), False

    def _ends(self, lengths: Any, x: Tensor) -> Tensor | None:
        if lengths is None:
            return None
        wrong = ValueError(
            f"lengths: got {said(lengths)}, need a whole number 1 to {len(x)} for each of {x.shape[1]} samples"
        )
        try:
            found = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError):
            raise wrong from None
        if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
            raise wrong
        ends = found.to("cpu", torch.int64)
        if ends.shape != (x.shape[1],) or not (ends.min() >= 1 and ends.max() <= len(x)):
            raise wrong
        return ends

    def _checked_state(self, state: Any, batch: int, single: bool) -> State | None:
        if state is None:
            return None
        shape = (self.num_layers, self.hidden_size) if single else (self.num_layers, batch, self.hidden_size)
        fits = isinstance(state, tuple | list) and len(state) == 2
        if not fits or any(
            not isinstance(each, Tensor) or tuple(each.shape) != shape or each.device.type != "cpu" for each in state
        ):
            raise ValueError(
                f"state: got {_described(state)}, need two tensors {shape} on the CPU, outputs and cells, as a call "
                "before returned them"
            )
        if torch.is_grad_enabled() and any(each.requires_grad for each in state):
            raise ValueError(
                "state: got a tensor that requires a gradient, but the gradient does not pass through the state; give "
                "state.detach()"
            )
        kind = torch.float64 if self.w_rec_l0.dtype == torch.float64 else torch.float32
        outputs, cells = (np.array(each.detach().to(kind).numpy()) for each in state)
        check_finite("state, outputs", outputs)
        check_finite("state, cells", cells)
        if single:
            outputs, cells = outputs[:, None], cells[:, None]
        return State(tuple(np.ascontiguousarray(c) for c in cells), tuple(np.ascontiguousarray(y) for y in outputs))

    def _noise(self, steps: int, batch: int) -> Noise:
        """Dropout between the layers, one draw per step, sample and unit as in `torch.nn.GRU`."""
        if not (self.training and self.dropout and self.num_layers > 1):
            return Noise()
        shape, scale = (steps, batch, self.hidden_size), np.float32(1 / (1 - self.dropout))
        masks = [(torch.rand(shape) >= self.dropout).numpy() * scale for _ in range(self.num_layers - 1)]
        return Noise(between=tuple(masks))


class _Window(torch.autograd.Function):
    """A window of the engine as one operation of PyTorch."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, module: EGRU, x: Tensor, before: State | None, ends: Tensor | None, *parameters: Tensor
    ) -> Any:
        model = module._bound(parameters)
        inputs = np.ascontiguousarray(x.detach().numpy())
        start = State.zeros(model.template, x.shape[1]) if before is None else before
        output, after, tape = model.forward(inputs, start, module._noise(*x.shape[:2]))
        if ends is not None:
            # The state of each sample is that after its own last step.
            last, samples = ends.numpy(), np.arange(x.shape[1])
            after = State(
                tuple(layer.c[last, samples] for layer in tape.layers),
                tuple(layer.y[last, samples] for layer in tape.layers),
            )
        ctx.module, ctx.tape = module, tape
        # The tape refers to the memory of all these. PyTorch checks their versions, so that the backward pass raises an
        # error where an optimiser has stepped, or a caller has changed the input or the output in place. Tensors of
        # inference mode have no versions, and PyTorch refuses to save them.
        sent = torch.from_numpy(output)
        ctx.save_for_backward(*parameters, sent, *([] if x.is_inference() else [x]))
        outputs, cells = (torch.from_numpy(np.stack(arrays)) for arrays in (after.outputs, after.cells))
        ctx.mark_non_differentiable(outputs, cells)
        return sent, outputs, cells

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, d_output: Tensor, *unused: Tensor) -> Any:
        names = ctx.module._names()
        model = ctx.module._bound(ctx.saved_tensors[: len(names)])
        wanted = ctx.needs_input_grad[1]
        found = model.backward(ctx.tape, np.ascontiguousarray(d_output.numpy(), np.float32), d_inputs=wanted)
        each = [
            torch.from_numpy(found[name]) if needed else None
            for name, needed in zip(names, ctx.needs_input_grad[4:], strict=True)
        ]
        return None, torch.from_numpy(found["inputs"]) if wanted else None, None, None, *each


class _Specification(torch.autograd.Function):
    """A window of the specification in float64 as one operation of PyTorch."""

    @staticmethod
    def forward(
        ctx: Any, module: EGRU, x: Tensor, before: State | None, ends: Tensor | None, *parameters: Tensor
    ) -> Any:
        rule, count = module.options["thresholds"], len(LAYER_PARAMETERS)
        sent, given, layers, tapes = x.detach().numpy(), [], [], []
        masks = module._noise(*x.shape[:2]).between
        for k, cell in enumerate(module.cells):
            values = parameters[k * count : (k + 1) * count]
            layer = {name: each.detach().numpy() for name, each in zip(LAYER_PARAMETERS, values, strict=True)}
            for name in ("w_in", "w_rec"):
                kept = getattr(module, f"kept_{name}_l{k}", None)
                layer[name] = layer[name] if kept is None else layer[name] * kept.numpy()
            if cell.thresholded and rule == "sigmoid":
                layer["threshold"] = 1 / (1 + np.exp(-layer["threshold"]))
            elif cell.thresholded:
                layer["threshold"] = np.clip(layer["threshold"], *rules.bounds(rule))
            zeros = np.zeros((x.shape[1], module.hidden_size))
            c, y = (zeros, zeros) if before is None else (before.cells[k], before.outputs[k])
            given.append(sent)
            layers.append(layer)
            tapes.append(reference.forward(cell, layer, sent, c, y, smooth=module.smooth))
            sent = np.stack([step.y for step in tapes[-1]])
            sent = sent * masks[k] if masks and k < module.num_layers - 1 else sent
        last = np.full(x.shape[1], len(x) - 1) if ends is None else ends.numpy() - 1
        samples = np.arange(x.shape[1])
        outputs, cells = (
            torch.from_numpy(
                np.stack([np.stack([getattr(step, name) for step in tape])[last, samples] for tape in tapes])
            )
            for name in ("y", "c")
        )
        ctx.module, ctx.masks, ctx.window = module, masks, (given, layers, tapes)
        ctx.save_for_backward(*parameters, x)
        ctx.mark_non_differentiable(outputs, cells)
        return torch.from_numpy(sent), outputs, cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, *unused: Tensor) -> Any:
        # Raises an error where a parameter or the input was changed in place.
        _ = ctx.saved_tensors
        module, (given, layers, tapes) = ctx.module, ctx.window
        d_sent, found = d_output.numpy(), {}
        for k in reversed(range(module.num_layers)):
            layer, rule = layers[k], module.options["thresholds"]
            own = reference.backward(module.cells[k], layer, given[k], tapes[k], d_sent, np.zeros_like(d_sent))
            for name in ("w_in", "w_rec"):
                kept = getattr(module, f"kept_{name}_l{k}", None)
                own[name] = own[name] if kept is None else own[name] * kept.numpy()
            own["threshold"] = rules.gradient(rule, layer["threshold"], own["threshold"])
            found |= {f"layers.{k}.{name}": own[name] for name in LAYER_PARAMETERS}
            d_sent = own["x"] * ctx.masks[k - 1] if k and ctx.masks else own["x"]
        wanted = ctx.needs_input_grad
        each = [
            torch.from_numpy(found[name]) if needed else None
            for name, needed in zip(module._names(), wanted[4:], strict=True)
        ]
        return None, torch.from_numpy(d_sent) if wanted[1] else None, None, None, *each


def _packed_like(packed: PackedSequence, output: Tensor, ends: Tensor) -> PackedSequence:
    """Padded outputs (steps, batch, N) as a packed sequence with the order of another one."""
    order = packed.sorted_indices
    if order is not None:
        output, ends = output[:, order], ends[order]
    data = nn.utils.rnn.pack_padded_sequence(output, ends, enforce_sorted=True).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def _described(state: Any) -> str:
    """What was given as a state, in words."""
    if isinstance(state, tuple | list):
        return f"({', '.join(map(_described, state))})"
    return f"a tensor {tuple(state.shape)} on {state.device}" if isinstance(state, Tensor) else said(state)


def _name(name: str) -> str:
    """The name in PyTorch of a parameter of the engine: `layers.0.w_in` is `w_in_l0`."""
    _, k, own = name.split(".")
    return f"{own}_l{k}"


def _array(name: str, tensor: Tensor) -> np.ndarray:
    """The memory of a parameter. Raises ValueError where the engine cannot use it."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(
            f"{_name(name)}: got {tensor.dtype} on {tensor.device}, need contiguous float32 on the CPU; "
            "call .cpu().float()"
        )
    return tensor.detach().numpy()
