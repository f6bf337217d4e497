#!/usr/bin/env bash
# ONNX's reference evaluator, meant to say what an operator does, runs a GRU without its sequence_lens, activations and
# clip, and says nothing. onnxruntime obeys all three, but the last state of an empty sequence is 0, not its initial one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("onnx", "onnxruntime", "numpy")))

steps, batch, inputs, units = 4, 3, 2, 3
random = np.random.default_rng(0)
w = random.normal(size=(1, 3 * units, inputs)).astype(np.float32)
r = random.normal(size=(1, 3 * units, units)).astype(np.float32)
x = random.normal(size=(steps, batch, inputs)).astype(np.float32)
h = np.full((1, batch, units), 0.5, dtype=np.float32)
full = np.full(batch, steps, dtype=np.int32)


def last_state(lengths=full, **attributes):
    """Return Y_h of a GRU by the reference evaluator and by onnxruntime."""
    graph = helper.make_graph(
        [helper.make_node("GRU", ["X", "W", "R", "", "lengths", "h"], ["", "Y_h"], hidden_size=units, **attributes)],
        "gru",
        [
            helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, batch, inputs]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, [batch]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, batch, units]),
        ],
        [helper.make_tensor_value_info("Y_h", TensorProto.FLOAT, [1, batch, units])],
        [numpy_helper.from_array(w, "W"), numpy_helper.from_array(r, "R")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"X": x, "lengths": lengths, "h": h}
    return ReferenceEvaluator(model).run(None, feeds)[0], session.run(None, feeds)[0]


reference, runtime = last_state()
assert np.allclose(reference, runtime, atol=1e-6), "the two differ on a plain GRU already"

options = {
    "sequence_lens of 1": {"lengths": np.ones(batch, dtype=np.int32)},
    "activations HardSigmoid, Softsign": {"activations": ["HardSigmoid", "Softsign"]},
    "clip of 0.1": {"clip": 0.1},
}
print("Expected: sequence_lens, activations and clip change the result, here and there alike.")
ignored = []
for name, option in options.items():
    by_reference, by_runtime = last_state(**option)
    same = np.array_equal(by_reference, reference)
    print(
        f"Seen: {name}: the reference returns {'the same bits as without it' if same else 'another result'}, "
        f"onnxruntime changes by up to {np.abs(by_runtime - runtime).max():.2f}."
    )
    assert not np.allclose(by_runtime, runtime, atol=1e-3), f"onnxruntime ignores {name}"
    ignored.append(same)

_, empty = last_state(lengths=np.array([steps, 0, steps], dtype=np.int32))
print(f"Seen: onnxruntime: the last state of a sequence of length 0 that starts from {h[0, 1]} is {empty[0, 1]}.")
print("Source: onnx/reference/ops/op_gru.py, CommonGRU._run: the arguments are named and not used;")
print("        onnxruntime/core/providers/cpu/rnn/deep_cpu_gru.cc (C++ code of the wheel).")
print("Related: https://github.com/onnx/onnx/pull/7935 (the same for direction, mended);")
print("         https://github.com/onnx/onnx/issues/1674 (what an empty sequence returns is not defined).")

assert all(ignored), "the reference evaluator no longer ignores all three"
assert not empty[0, 1].any(), "onnxruntime no longer returns 0 for an empty sequence"
PYTHON
then
    echo "CHANGED: the GRU of ONNX's reference evaluator or of onnxruntime behaves in another way." >&2
    exit 1
fi
