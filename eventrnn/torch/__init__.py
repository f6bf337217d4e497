"""Event networks as modules of PyTorch: `EGRU` has the call of `torch.nn.GRU`, and this library's engines run it.

    model = eventrnn.torch.EGRU(input_size=64, hidden_size=256, num_layers=2)
    output, state = model(inputs)                   # (steps, batch, 64) -> (steps, batch, 256)
    output.square().mean().backward()               # sparse backward pass with the surrogate derivative

Parameters are ordinary parameters of PyTorch, and optimisers, DataLoaders, `state_dict` and Lightning take them. The
engines read and write the memory of tensors, on the CPU and on a GPU. On the CPU nothing is copied on the way in or
out; as everywhere in PyTorch, it is an error to change it in place before the backward pass.

call   : names, and checks of the arguments
cpu    : a window of the CPU engine as an operation of PyTorch
gpu    : the same of the CUDA engine
double : the same of the specification, in float64
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    message = "eventrnn.torch needs PyTorch: pip install 'eventrnn[torch]'"
    raise ModuleNotFoundError(message, name="torch") from error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from eventrnn._checks import need_choice, need_flag, need_kind, need_number, need_whole
from eventrnn.cells import Cell
from eventrnn.network import Layer, Network
from eventrnn.torch.call import (
    Call,
    TorchState,
    checked_ends,
    checked_state,
    need_mask,
    need_parameter,
    on_gpu,
    packed_like,
    parameter_names,
    parameter_shapes,
    steps_first,
    torch_name,
)
from eventrnn.torch.cpu import CpuWindow
from eventrnn.torch.double import SpecificationWindow
from eventrnn.torch.gpu import GpuWindow
from eventrnn.training import thresholds as rules
from eventrnn.training.bptt.model import Model
from eventrnn.training.bptt.noise import Noise
from eventrnn.training.settings import PRECISIONS
from eventrnn.weights import CSR, Dense
from eventrnn.weights.gated import need_matrices

__all__ = ["EGRU"]


class EGRU(nn.Module):
    """Layers of event-based GRUs, with the call of `torch.nn.GRU`, on the CPU or on a GPU of CUDA.

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
    backward    : products of the backward pass on the CPU; see `eventrnn.training.Model`
    threads     : threads of the CPU engine, beside those of PyTorch

    The parameters of layer k are `w_in_l{k}` (I, 3 N), `w_rec_l{k}` (N, 3 N), `bias_in_l{k}` and `bias_rec_l{k}`
    (3 N,), and `threshold_l{k}` (N,), with gates in the order (u, r, g). An LSTM has 4 N columns, in the order
    (i, f, g, o).
    Weights that the optimiser must leave at zero are given by `from_network`, or by `torch.nn.utils.prune`.

    In double precision, after `.double()`, the specification of this library runs on the CPU in place of the engine:
    plain loops, a thousand times as slow, for `torch.autograd.gradcheck` and for comparisons. After `module.smooth =
    True` its events are the smooth steps whose derivative the surrogate is, and its gradient is an exact derivative.

    On a GPU, `module.precision` is the type to which factors of products are rounded: "float32" (the default, whatever
    `torch.backends.cuda.matmul` allows), "tf32" or "bfloat16". Sums, cells, outputs and gradients are float32. The CPU
    has float32 only.

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
        options = {"thresholds": thresholds, "backward": backward, "threads": threads}
        self._set_up(network, bias, batch_first, dropout, options)

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

        Raises ValueError for layers of different sizes and for a network that is folded or has gated blocks.
        """
        need_kind("network", network, Network, "a Network")
        need_matrices(network.matrices(), "EGRU of PyTorch")
        if network.one_hot:
            raise ValueError(
                "network: its embedding is folded into layers.0.w_in, which is for inference; give the network before "
                "it is folded"
            )
        units = {layer.units for layer in network.layers}
        if len(units) > 1:
            raise ValueError(
                f"network: got layers of {', '.join(map(str, sorted(units)))} units, need the same number in all; make "
                "one module per layer"
            )
        made = cls.__new__(cls)
        bare = Network(network.layers)
        options = {"thresholds": thresholds, "backward": backward, "threads": threads}
        made._set_up(bare, True, batch_first, dropout, options)
        return made

    def _set_up(
        self,
        network: Network,
        bias: bool,
        batch_first: bool,
        dropout: float,
        options: dict[str, Any],
    ) -> None:
        nn.Module.__init__(self)
        self.input_size, self.hidden_size = network.layers[0].inputs, network.layers[0].units
        self.num_layers, self.bias = len(network.layers), bias
        self.batch_first = need_flag("batch_first", batch_first)
        self.smooth = False
        self.dropout = dropout
        if self.dropout and self.num_layers == 1:
            # torch.nn.GRU warns too.
            warnings.warn(f"dropout: got {dropout}, which acts between layers, and there is one", stacklevel=3)
        self.precision = "float32"
        self.options = options
        self.cells = [layer.cell for layer in network.layers]
        self._model: Model | None = Model(network, **self.options)
        #: the engine of the GPU, if the last window was there (`gpu.engine_of`)
        self._engine: Any = None
        rule = options["thresholds"]
        for name, value in self._model.parameters.items():
            own, given = torch_name(name), torch.from_numpy(value)
            learned = not (name.endswith("threshold") and (rule == "fixed" or not self._cell(name).thresholded))
            if "bias" in name and not bias:
                self.register_buffer(own, torch.zeros_like(given), persistent=False)
            else:
                self.register_parameter(own, nn.Parameter(given, requires_grad=learned))
        for name, mask in self._model.masks.items():
            self.register_buffer(f"kept_{torch_name(name)}", torch.from_numpy(mask.copy()))

    @property
    def precision(self) -> str:
        """The type to which a GPU rounds the factors of products. Setting it raises ValueError for another name."""
        return self._precision

    @precision.setter
    def precision(self, name: str) -> None:
        self._precision = need_choice("precision", name, PRECISIONS)

    @property
    def dropout(self) -> float:
        """The share of the outputs between layers that is dropped in training. Setting it raises ValueError for a
        number that is not in [0, 1)."""
        return self._dropout

    @dropout.setter
    def dropout(self, share: float) -> None:
        self._dropout = need_number("dropout", share, at_least=0, below=1, what="share")

    def _cell(self, name: str) -> Cell:
        return self.cells[int(name.split(".")[1])]

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        words = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        cell = self.cells[0]
        return f"{words}, batch_first={self.batch_first}, dropout={self.dropout}, cell={cell.name}/{cell.variant}"

    def __getstate__(self) -> dict[str, Any]:
        # The engines hold addresses, and a copy makes its own.
        return self.__dict__ | {"_model": None, "_engine": None}

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
        x, single = steps_first(self, input, packed is not None)
        ends, before = checked_ends(lengths, x), checked_state(self, state, x, single)
        if ends is not None:
            there = (torch.arange(len(x))[:, None] < ends).to(x.device, non_blocking=True)
            x = torch.where(there[:, :, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        arguments = self._arguments()
        window, kind = self._window(x, {argument.dtype for argument in arguments})
        x = x.to(kind).resolve_neg()
        taped = torch.is_grad_enabled() and any(each.requires_grad for each in (x, *arguments))
        output, outputs, cells = window.apply(Call(self, before, ends, taped), x, *arguments)
        if ends is not None:
            output = torch.where(there[:, :, None], output, torch.zeros((), dtype=output.dtype, device=output.device))
        after = (outputs[:, 0], cells[:, 0]) if single else (outputs, cells)
        if packed is not None and ends is not None:
            return packed_like(packed, output, ends), after
        if single:
            return output[:, 0], after
        return (output.transpose(0, 1) if self.batch_first else output), after

    def to_network(self) -> Network:
        """A network with copies of the parameters. Matrices with pruned weights are stored as CSR."""
        model = self._bound([each.cpu() for each in self._arguments()])
        sparse = {
            name: CSR.from_weights(weights)
            for name, weights in model.network().matrices().items()
            if name in model.masks
        }
        return model.network().with_matrices(sparse)

    # --- parts of a call ---

    def _arguments(self) -> list[Tensor]:
        """The parameters, in the order of the engine."""
        return [getattr(self, torch_name(name)) for name in parameter_names(self.num_layers)]

    def _window(self, x: Tensor, kinds: set[torch.dtype]) -> tuple[Any, torch.dtype]:
        """The operation that runs a window of parameters of these types, and the type of its input."""
        double, gpu = kinds == {torch.float64}, on_gpu(x)
        if self.smooth and not double:
            raise ValueError(
                f"smooth: needs all parameters in float64, got {', '.join(map(str, kinds))}; call .double()"
            )
        if gpu and double:
            raise ValueError(
                f"input: got a tensor on {x.device}, but the specification, which runs in double precision, runs on "
                "the CPU; call .cpu(), or .float() for the engine of the GPU"
            )
        if not gpu and self.precision != "float32":
            raise ValueError(
                f"precision: got {self.precision!r}, but the input is on the CPU, which has float32 only; move module "
                "and input to a GPU, or set module.precision = 'float32'"
            )
        if gpu:
            return GpuWindow, torch.float32
        # The memory of a GPU that was left is freed.
        self._engine = None
        return (SpecificationWindow, torch.float64) if double else (CpuWindow, torch.float32)

    def _mask(self, name: str) -> Tensor | None:
        """Where weights of a parameter are kept, of its shape; None without a mask."""
        return getattr(self, f"kept_{torch_name(name)}", None)

    def _bound(self, values: Sequence[Tensor]) -> Model:
        """The engine with the memory of these tensors as its parameters. Pruned weights are set to zero, and thresholds
        to what their rule allows, where an optimiser has moved them."""
        if self._model is None:
            self._model = Model(self._template(), **self.options)
        model = self._model
        for (name, shape), tensor in zip(parameter_shapes(self).items(), values, strict=True):
            need_parameter(name, tensor, shape, torch.device("cpu"))
            array, mask = tensor.detach().numpy(), self._mask(name)
            if mask is not None:
                mask = mask.cpu()
                need_mask(name, mask, tensor)
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

    def _noise(self, steps: int, batch: int) -> Noise:
        """Dropout between the layers, one draw per step, sample and unit as in `torch.nn.GRU`."""
        if not self._drops():
            return Noise()
        shape, scale = (steps, batch, self.hidden_size), np.float32(1 / (1 - self.dropout))
        masks = [(torch.rand(shape) >= self.dropout).numpy() * scale for _ in range(self.num_layers - 1)]
        return Noise(between=tuple(masks))

    def _drops(self) -> bool:
        """Whether dropout acts."""
        return bool(self.training and self.dropout and self.num_layers > 1)
