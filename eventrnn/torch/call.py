"""One call of a module: what its windows need beside tensors, names of parameters, and checks of the arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from eventrnn._checks import said
from eventrnn.training.bptt.model import LAYER_PARAMETERS

if TYPE_CHECKING:
    from eventrnn.torch import EGRU

#: The state between two calls: outputs and cells, each (num_layers, batch, hidden_size).
TorchState = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Call:
    """What a window gets beside its input and the parameters.

    Attributes
    ----------
    module : the module
    before : outputs and cells before the window, (num_layers, batch, hidden_size), without a gradient; None for zeros
    ends   : (batch,) int64 on the CPU, number of steps of each sample; None where all have as many as the input
    taped  : whether there may be a backward pass
    """

    module: EGRU
    before: TorchState | None
    ends: Tensor | None
    taped: bool


def parameter_names(layers: int) -> list[str]:
    """The parameters of the engine, in order."""
    return [f"layers.{k}.{name}" for k in range(layers) for name in LAYER_PARAMETERS]


def torch_name(name: str) -> str:
    """The name in PyTorch of a parameter of the engine: `layers.0.w_in` is `w_in_l0`."""
    _, k, own = name.split(".")
    return f"{own}_l{k}"


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU of CUDA."""
    return tensor.device.type == "cuda"


def parameter_shapes(module: EGRU) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of the engine, in order."""
    found, inputs, units = {}, module.input_size, module.hidden_size
    for k, cell in enumerate(module.cells):
        columns = cell.gates * units
        shapes = ((inputs, columns), (units, columns), (columns,), (columns,), (units,))
        found |= {f"layers.{k}.{name}": shape for name, shape in zip(LAYER_PARAMETERS, shapes, strict=True)}
        inputs = units
    return found


def need_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], where: torch.device) -> None:
    """Raise ValueError for a parameter that an engine cannot use. name : of the engine"""
    if tensor.shape != shape:
        raise ValueError(f"{torch_name(name)}: got shape {tuple(tensor.shape)}, need {shape}")
    if tensor.device != where or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        place, remedy = ("the CPU", ".cpu()") if where.type == "cpu" else (f"{where}, as the input", f".to('{where}')")
        raise ValueError(
            f"{torch_name(name)}: got {tensor.dtype} on {tensor.device}, need contiguous float32 on {place}; "
            f"call {remedy}.float()"
        )


def need_mask(name: str, mask: Tensor, parameter: Tensor) -> None:
    """Raise ValueError for a mask that does not fit its parameter. name : of the engine"""
    fits = mask.device == parameter.device and mask.dtype == torch.bool and mask.is_contiguous()
    if not fits or mask.shape != parameter.shape:
        raise ValueError(
            f"kept_{torch_name(name)}: got {mask.dtype} {tuple(mask.shape)} on {mask.device}, need contiguous booleans "
            f"{tuple(parameter.shape)} on {parameter.device}"
        )


def steps_first(module: EGRU, input: Any, packed: bool) -> tuple[Tensor, bool]:
    """The input as (steps, batch, input_size), and whether it is one sample without a batch."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: got {type(input).__name__}, need a tensor or a packed sequence")
    if input.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"input: got a tensor on {input.device}, need one on the CPU or a GPU of CUDA; move module and input there"
        )
    if input.layout != torch.strided or input.is_nested:
        raise ValueError("input: got a sparse or a nested tensor, need a dense one; .to_dense() makes it")
    if input.ndim not in (2, 3) or input.shape[-1] != module.input_size or not input.is_floating_point():
        raise ValueError(f"input: got {input.dtype} {tuple(input.shape)}, need numbers (…, {module.input_size})")
    if not len(input) or not input.shape[-2]:
        raise ValueError(f"input: got shape {tuple(input.shape)}, need at least one step and one sample")
    if input.ndim == 2:
        return input[:, None], True
    return (input.transpose(0, 1) if module.batch_first and not packed else input), False


def checked_ends(lengths: Any, x: Tensor) -> Tensor | None:
    """The numbers of steps, (batch,) int64 on the CPU."""
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


def checked_state(module: EGRU, state: Any, x: Tensor, single: bool) -> TorchState | None:
    """The state before a window in the type of the parameters, each (num_layers, batch, hidden_size) and contiguous."""
    if state is None:
        return None
    layers, batch, units = module.num_layers, x.shape[1], module.hidden_size
    shape = (layers, units) if single else (layers, batch, units)
    fits = isinstance(state, tuple | list) and len(state) == 2
    if not fits or any(not _is_state(each, shape, x.device) for each in state):
        where = "the CPU" if x.device.type == "cpu" else f"{x.device}, as the input"
        raise ValueError(
            f"state: got {_described(state)}, need two tensors {shape} of floating-point numbers on {where}, outputs "
            "and cells, as a call before returned them"
        )
    if torch.is_grad_enabled() and any(each.requires_grad for each in state):
        raise ValueError(
            "state: got a tensor that requires a gradient, but the gradient does not pass through the state; give "
            "state.detach()"
        )
    kind = torch.float64 if module.w_rec_l0.dtype == torch.float64 else torch.float32
    outputs, cells = (each.detach().to(kind).resolve_neg().reshape(layers, batch, units).contiguous() for each in state)
    return outputs, cells


def packed_like(packed: PackedSequence, output: Tensor, ends: Tensor) -> PackedSequence:
    """Padded outputs (steps, batch, N) as a packed sequence with the order of another one."""
    order = packed.sorted_indices
    if order is not None:
        output, ends = output[:, order], ends.sort(descending=True).values
    data = nn.utils.rnn.pack_padded_sequence(output, ends, enforce_sorted=True).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def _is_state(tensor: Any, shape: tuple[int, ...], where: torch.device) -> bool:
    """Whether something is a tensor of these numbers."""
    numbers = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided
    return numbers and tuple(tensor.shape) == shape and tensor.device == where


def _described(state: Any) -> str:
    """What was given as a state, in words."""
    if isinstance(state, tuple | list):
        return f"({', '.join(map(_described, state))})"
    if isinstance(state, Tensor):
        return f"a tensor {state.dtype} {tuple(state.shape)} on {state.device}"
    return said(state)
