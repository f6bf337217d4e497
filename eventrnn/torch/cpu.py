"""A window of the CPU engine as one operation of PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eventrnn._checks import check_finite
from eventrnn.state import State
from eventrnn.torch.call import Call, TorchState, parameter_names, torch_name
from eventrnn.training.bptt.model import Model


class CpuWindow(torch.autograd.Function):
    """A window of the engine as one operation of PyTorch."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor) -> Any:
        module, ends = call.module, call.ends
        model = module._bound(parameters)
        inputs = np.ascontiguousarray(x.detach().numpy())
        output, after, tape = model.forward(inputs, _start(model, call.before, x.shape[1]), module._noise(*x.shape[:2]))
        _need_finite(model, after)
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
        names = parameter_names(ctx.module.num_layers)
        model = ctx.module._bound(ctx.saved_tensors[: len(names)])
        wanted = ctx.needs_input_grad[1]
        found = model.backward(
            ctx.tape, np.ascontiguousarray(d_output.resolve_neg().numpy(), np.float32), d_inputs=wanted
        )
        each = [
            torch.from_numpy(found[name]) if needed else None
            for name, needed in zip(names, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, torch.from_numpy(found["inputs"]) if wanted else None, *each


def host_state(before: TorchState) -> tuple[np.ndarray, np.ndarray]:
    """Copies of the outputs and cells before a window. Raises ValueError for numbers that are not finite."""
    outputs, cells = (np.array(each.numpy()) for each in before)
    check_finite("state, outputs", outputs)
    check_finite("state, cells", cells)
    return outputs, cells


def _need_finite(model: Model, after: State) -> None:
    """Raise ValueError where cells after a window are not finite, and name the parameter that is the cause.

    A unit whose cell is not a number sends nothing, so that the output and the loss would not show it. It stays so
    until the end of the window, which is why the last cells, few numbers, tell.
    """
    for k, cells in enumerate(after.cells):
        if np.isfinite(cells).all():
            continue
        for name, array in model.parameters.items():
            check_finite(torch_name(name), array)
        raise ValueError(
            f"input: the cells of layer {k} are not finite after the window, though the input and the parameters are; "
            "scale them down"
        )


def _start(model: Model, before: TorchState | None, batch: int) -> State:
    if before is None:
        return State.zeros(model.template, batch)
    outputs, cells = host_state(before)
    return State(tuple(cells), tuple(outputs))
