#!/usr/bin/env bash
# A GRU that PyTorch exports to ONNX with a dynamic length declares one, yet a Reshape inside keeps the length of the
# example: onnxruntime cuts another length into other rows, without an error where the number of values happens to fit.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I -W ignore - <<'PYTHON'
from importlib.metadata import version

import onnxruntime
import torch
from torch.export import Dim

packages = ("torch", "onnx", "onnxscript", "onnxruntime")
print("Versions:", ", ".join(f"{name} {version(name)}" for name in packages))

torch.manual_seed(0)
gru = torch.nn.GRU(2, 3).eval()
torch.onnx.export(
    gru,
    (torch.randn(5, 4, 2),),
    "gru.onnx",
    input_names=["x"],
    dynamo=True,
    dynamic_shapes=({0: Dim("steps"), 1: Dim("batch")},),
    verbose=False,
)
session = onnxruntime.InferenceSession("gru.onnx", providers=["CPUExecutionProvider"])
declared = session.get_inputs()[0].shape


def compare(steps, batch):
    x = torch.randn(steps, batch, 2)
    expected = gru(x)[0].detach().numpy()
    returned = session.run(None, {"x": x.numpy()})[0]
    if returned.shape != expected.shape:
        return f"shape {returned.shape} for {expected.shape}"
    return "the same" if abs(returned - expected).max() < 1e-5 else "other values"


seen = {shape: compare(*shape) for shape in ((5, 4), (5, 3), (10, 4), (7, 5))}
print(f"Expected: the exported model, whose input is declared as {declared}, runs for any number of steps.")
for (steps, batch), result in seen.items():
    print(f"Seen: {steps} steps, batch of {batch} (example: 5 steps, batch of 4): {result}.")
print("Source: torch/onnx/_internal/exporter/_core.py: decompose_with_registry gives aten.gru the output shape")
print("        [5, batch, 3], from which the target of the Reshape that onnxscript's aten_gru adds becomes [5, -1, 3].")
print("Related: https://github.com/pytorch/pytorch/issues/191855 and pull request 193192, which says of the same cause")
print("         that it does not show in a GRU alone.")

assert declared[:2] == ["steps", "batch"], "the exporter declares other dimensions"
assert seen[5, 4] == seen[5, 3] == "the same"
assert seen[10, 4] == "shape (5, 8, 3) for (10, 4, 3)", "another length gives another result"
assert seen[7, 5] == "shape (5, 7, 3) for (7, 5, 3)", "another length gives another result"
PYTHON
then
    echo "CHANGED: an exported GRU no longer keeps the length of the example in this way." >&2
    exit 1
fi
