#!/usr/bin/env bash
# snntorch reads NIR's integrate-and-fire neuron, which has no leak, as a leaky one with beta = 0.9: an input that must
# make it spike may never do so.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    snntorch==1.0.0 nir==1.0.8 nirtorch==2.6 torch==2.13.0 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import nir
import numpy as np
import torch
from snntorch.import_nir import import_from_nir

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("snntorch", "nir", "nirtorch", "torch")))

graph = nir.NIRGraph(
    nodes={
        "input": nir.Input({"input": np.array([1])}),
        "neuron": nir.IF(r=np.ones(1), v_threshold=np.full(1, 10.0)),
        "output": nir.Output({"output": np.array([1])}),
    },
    edges=[("input", "neuron"), ("neuron", "output")],
)
network = import_from_nir(graph)
state, spikes, voltage = None, 0, 0.0
for _ in range(200):
    (spike, voltage), state = network(torch.full((1, 1), 0.9), state)
    spikes += int(spike.item())

print("Expected: 0.9 per step, summed without a leak, crosses the threshold of 10 every dozen steps.")
print(f"Seen: {spikes} spikes in 200 steps; the voltage stays at {voltage.item():.3f} = 0.9 / (1 - 0.9).")
print("Source: snntorch/import_nir.py, _nir_to_snntorch_module: snn.Leaky(beta=0.9, ...) for nir.IF.")
print("Reported: https://github.com/jeshraghian/snntorch/issues/416 (closed; its fix is in no release yet).")

assert (spikes, round(voltage.item(), 3)) == (0, 9.0), "the neuron integrates in another way"
PYTHON
then
    echo "CHANGED: snntorch no longer reads nir.IF as a leaky neuron." >&2
    exit 1
fi
