#!/usr/bin/env bash
# A norse neuron that goes to NIR and back has a time constant 1000 times shorter: to_nir writes dt / tau_mem_inv where
# from_nir reads 1 / tau.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    norse==1.1.0 nir==1.0.8 nirtorch==2.6 torch==2.13.0 torchvision==0.28.0 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import torch
from norse.torch import LIFBoxCell, LIFBoxParameters, SequentialState
from norse.torch.utils.export_nir import to_nir
from norse.torch.utils.import_nir import from_nir

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("norse", "nir", "nirtorch", "torch")))

tau = 0.01  # seconds
parameters = LIFBoxParameters(
    tau_mem_inv=torch.full((2,), 1 / tau), v_th=torch.ones(2), v_leak=torch.zeros(2)
)
network = SequentialState(LIFBoxCell(parameters))
graph = to_nir(network, torch.zeros(1, 2))
(written,) = {round(float(value), 9) for node in graph.nodes.values() if hasattr(node, "tau") for value in node.tau}
restored = from_nir(graph, ignore_warnings=True)


def spikes(model, steps=30):
    state, count = None, 0
    for _ in range(steps):
        output, state = model(torch.full((1, 2), 1.5), state)
        count += int(output.detach().sum())
    return count


before, after = spikes(network), spikes(restored)
print(f"Expected: NIR, whose unit is the second, holds {tau} s, and the network that is read back spikes the same.")
print(f"Seen: NIR holds {written} s; 30 steps of the same input give {before} spikes before and {after} after.")
print("Source: norse/torch/utils/export_nir.py, _extract_norse_module: tau=dt / module.p.tau_mem_inv, against")
print("        norse/torch/utils/import_nir.py, _import_norse_module: tau_mem_inv=1 / node.tau.")
print("Reported: https://github.com/norse/norse/issues/411 (open).")

assert written == 1e-5, "NIR holds another time constant"
assert (before, after) == (4, 60), "the networks spike in another way"
PYTHON
then
    echo "CHANGED: norse's round trip through NIR no longer changes the time constant in this way." >&2
    exit 1
fi
