"""A window of the CUDA engine as one operation of PyTorch, on tensors that stay on the GPU.

The engine works on a stream of its own. Its work comes after what PyTorch's current stream has, and what that stream
gets later comes after it, so that neither the host nor the rest of the GPU waits.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eventrnn.torch.call import Call, need_mask, need_parameter, parameter_names, parameter_shapes
from eventrnn.training import thresholds as rules
from eventrnn.training.bptt.noise import Mask

if TYPE_CHECKING:
    from eventrnn.cuda.training.module import ModuleEngine, Rows
    from eventrnn.cuda.training.tensor_parameters import ParameterTensors
    from eventrnn.torch import EGRU

# Numbers of which one selects the masks of dropout.
DRAWS = 1 << 62


class GpuWindow(torch.autograd.Function):
    """A window of the engine as one operation of PyTorch.

    The tape of a window lives as long as a small tensor that PyTorch saves for the backward pass: after the backward
    pass, unless its graph is retained, and where the graph dies without one, the next window gets its memory.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor) -> Any:
        from eventrnn.cuda.training.module import Kind, WindowTensors

        module, engine = call.module, engine_of(call.module, x)
        kind = Kind(call.taped, module._drops(), call.taped and ctx.needs_input_grad[1])
        # As `torch.manual_seed` says; the masks themselves are drawn on the GPU.
        draw = int(torch.randint(DRAWS, ()).item()) if kind.noise else 0
        (steps, batch), layers, units = x.shape[:2], module.num_layers, module.hidden_size
        output = torch.empty(steps, batch, units, dtype=torch.float32, device=x.device)
        outputs, cells = (torch.empty(layers, batch, units, dtype=torch.float32, device=x.device) for _ in range(2))
        # A tensor must not be freed before the work that reads it is on the stream.
        ends = None if call.ends is None else call.ends.to(x.device, non_blocking=True)
        before = None if call.before is None else (call.before[0].data_ptr(), call.before[1].data_ptr())
        given = WindowTensors(
            steps,
            batch,
            _rows(x),
            before,
            0 if ends is None else ends.data_ptr(),
            output.data_ptr(),
            (outputs.data_ptr(), cells.data_ptr()),
        )
        with engine.after(x):
            number = engine.forward(given, _addresses(module, x, parameters), kind, draw)
        ctx.module, ctx.engine, ctx.inputs = module, engine, x.shape
        if number:
            ticket = np.array([number])
            weakref.finalize(ticket, engine.pool.release, number).atexit = False
            # PyTorch checks the versions of parameters, and frees the ticket when it frees what it saves.
            ctx.save_for_backward(*parameters, torch.from_numpy(ticket))
        ctx.mark_non_differentiable(outputs, cells)
        return output, outputs, cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, *unused: Tensor) -> Any:
        *parameters, ticket = ctx.saved_tensors
        number, engine = int(ticket[0]), ctx.engine
        if number not in engine.pool.held:
            raise RuntimeError(
                "EGRU: the tape of this window was freed, because a hook of PyTorch keeps copies in place of the "
                "tensors that were saved for the backward pass (save_on_cpu with pin_memory does); leave it out here"
            )
        wanted = ctx.needs_input_grad
        each = [torch.empty_like(p) if needed else None for p, needed in zip(parameters, wanted[2:], strict=True)]
        d_inputs = torch.empty(ctx.inputs, dtype=torch.float32, device=d_output.device) if wanted[1] else None
        named = zip(parameter_names(ctx.module.num_layers), each, strict=True)
        gradients = {name: gradient.data_ptr() for name, gradient in named if gradient is not None}
        d_output = d_output.resolve_neg()
        with engine.after(d_output):
            addresses = _addresses(ctx.module, d_output, parameters)
            d_inputs_at = 0 if d_inputs is None else d_inputs.data_ptr()
            engine.backward(number, _rows(d_output), addresses, gradients, d_inputs_at)
        return None, d_inputs, *each


def engine_of(module: EGRU, x: Tensor) -> ModuleEngine:
    """The module's engine on the GPU of its input, made where it is new.

    Raises BackendUnavailable without the CUDA packages and in a forked process, ValueError for a module whose options
    the GPU does not have and for a tensor on another GPU, RuntimeError within the capture of a CUDA graph.
    """
    from eventrnn.cuda.training.module import ModuleEngine

    options, device = module.options, _device()
    if options["threads"] != 1:
        raise ValueError(f"threads: got {options['threads']}, but a GPU brings its own; leave it out")
    if options["backward"] == "sparse":
        raise ValueError("backward: got 'sparse', but a GPU multiplies every weight; use auto or dense")
    own = device.core.device_id
    if (x.device.index or 0) != own:
        raise ValueError(
            f"input: got a tensor on {x.device}, but the engine of this process is on cuda:{own}, the current GPU at "
            f"its first use; move module and input to cuda:{own}, or call torch.cuda.set_device({x.device.index}) first"
        )
    if _is_capturing(x):
        raise RuntimeError("EGRU: cannot be captured in a CUDA graph of PyTorch, as it replays graphs of its own")
    key = module.precision, module.dropout
    if module._engine is None or module._engine[0] != key:
        rule, layers, units = options["thresholds"], module.num_layers, module.hidden_size
        between = range(layers - 1 if module.dropout else 0)
        engine = ModuleEngine(
            device,
            module.cells,
            module.input_size,
            units,
            module.precision,
            rule,
            rules.bounds(rule),
            [Mask("between", k, module.dropout, k, ("T", "B", units)) for k in between],
        )
        module._engine = key, engine
        return engine
    return module._engine[1]


def _device() -> Any:
    from eventrnn.cuda.device import current_device

    return current_device()


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _rows(tensor: Tensor) -> Rows:
    from eventrnn.cuda.training.module import Rows

    return Rows(tensor.data_ptr(), *tensor.stride())


def _addresses(module: EGRU, x: Tensor, parameters: Any) -> ParameterTensors:
    """The addresses of parameters and masks on the GPU of a tensor. Raises ValueError for others."""
    from eventrnn.cuda.training.tensor_parameters import ParameterTensors

    values, masks = {}, {}
    for (name, shape), parameter in zip(parameter_shapes(module).items(), parameters, strict=True):
        need_parameter(name, parameter, shape, x.device)
        values[name], mask = parameter.data_ptr(), module._mask(name)
        if mask is not None:
            need_mask(name, mask, parameter)
            masks[name] = mask.data_ptr()
    return ParameterTensors(values, masks)
