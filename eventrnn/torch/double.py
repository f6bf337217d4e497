"""A window of the specification in float64 as one operation of PyTorch: plain loops, for comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eventrnn import reference
from eventrnn.torch.call import Call, parameter_names
from eventrnn.torch.cpu import host_state
from eventrnn.training import thresholds as rules
from eventrnn.training.bptt.model import LAYER_PARAMETERS


class SpecificationWindow(torch.autograd.Function):
    """A window of the specification in float64 as one operation of PyTorch."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor) -> Any:
        module, ends = call.module, call.ends
        rule, count = module.options["thresholds"], len(LAYER_PARAMETERS)
        sent, given, layers, tapes = x.detach().numpy(), [], [], []
        masks = module._noise(*x.shape[:2]).between
        before = None if call.before is None else host_state(call.before)
        for k, cell in enumerate(module.cells):
            values = parameters[k * count : (k + 1) * count]
            layer = {name: each.detach().numpy() for name, each in zip(LAYER_PARAMETERS, values, strict=True)}
            for name in ("w_in", "w_rec"):
                kept = module._mask(f"layers.{k}.{name}")
                layer[name] = layer[name] if kept is None else layer[name] * kept.numpy()
            if cell.thresholded and rule == "sigmoid":
                layer["threshold"] = 1 / (1 + np.exp(-layer["threshold"]))
            elif cell.thresholded:
                layer["threshold"] = np.clip(layer["threshold"], *rules.bounds(rule))
            zeros = np.zeros((x.shape[1], module.hidden_size))
            c, y = (zeros, zeros) if before is None else (before[1][k], before[0][k])
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
        d_sent, found = d_output.resolve_neg().numpy(), {}
        for k in reversed(range(module.num_layers)):
            layer, rule = layers[k], module.options["thresholds"]
            own = reference.backward(module.cells[k], layer, given[k], tapes[k], d_sent, np.zeros_like(d_sent))
            for name in ("w_in", "w_rec"):
                kept = module._mask(f"layers.{k}.{name}")
                own[name] = own[name] if kept is None else own[name] * kept.numpy()
            own["threshold"] = rules.gradient(rule, layer["threshold"], own["threshold"])
            found |= {f"layers.{k}.{name}": own[name] for name in LAYER_PARAMETERS}
            d_sent = own["x"] * ctx.masks[k - 1] if k and ctx.masks else own["x"]
        wanted = ctx.needs_input_grad
        each = [
            torch.from_numpy(found[name]) if needed else None
            for name, needed in zip(parameter_names(module.num_layers), wanted[2:], strict=True)
        ]
        return None, torch.from_numpy(d_sent) if wanted[1] else None, *each
