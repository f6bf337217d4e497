#!/usr/bin/env bash
# SpikingJelly's SynOpCounter takes whichever factor of a product is binary for the spikes: graded inputs give no
# synaptic operations until the weights are 0 and 1, and then every weight of 1 counts as a spike.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    spikingjelly==2.0.0 torch==2.13.0 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from spikingjelly.activation_based.op_counter import ACCounter, DispatchCounterMode, MACCounter, SynOpCounter

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("spikingjelly", "torch")))

spikes = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
graded = torch.tensor([[0.5, 0.25, 2.0, 3.0]])
binary = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def count(inputs, weights):
    layer = torch.nn.Linear(4, 3, bias=False)
    layer.weight.data.copy_(weights)
    counters = [SynOpCounter(), ACCounter(), MACCounter()]
    with DispatchCounterMode(counters), torch.no_grad():
        layer(inputs)
    return tuple(counter.get_total() for counter in counters)


seen = {
    "2 spikes, weights 0.5": count(spikes, torch.full((3, 4), 0.5)),
    "4 graded values, weights 0.5": count(graded, torch.full((3, 4), 0.5)),
    "4 graded values, weights 0 and 1": count(graded, binary),
    "4 graded values, weights 0.5 and 0": count(graded, binary * 0.5),
}
print("Expected: the kind of operation follows from the inputs: the last three lines are no work of spikes.")
for case, (synops, acs, macs) in seen.items():
    print(f"Seen: {case}: {synops} synaptic operations, {acs} accumulates, {macs} multiply-accumulates.")
print("Source: spikingjelly/activation_based/op_counter/ac.py, _spike_mm and _spike_addmm, which SynOpCounter uses too:")
print("        nnz_y * x.shape[0] where the second factor is binary; mac.py, which then counts 0.")

assert seen["2 spikes, weights 0.5"] == (6, 6, 0)
assert seen["4 graded values, weights 0.5"] == seen["4 graded values, weights 0.5 and 0"] == (0, 0, 12)
assert seen["4 graded values, weights 0 and 1"] == (7, 7, 0), "binary weights are counted in another way"
PYTHON
then
    echo "CHANGED: SpikingJelly no longer counts binary weights as spikes." >&2
    exit 1
fi
