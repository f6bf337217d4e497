#!/usr/bin/env bash
# NeuroBench reports 0.0 synaptic operations for a network with one layer under torch.nn.utils.prune: the error of the
# count is caught and replaced by zero, which looks like a perfect result.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    neurobench==2.3.0 snntorch==1.0.0 torch==2.13.0 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity
from neurobench.metrics.workload import SynapticOperations
from neurobench.models import TorchModel
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("neurobench", "torch")))

inputs = torch.linspace(0.1, 0.8, 8).reshape(2, 4)
batches = DataLoader(TensorDataset(inputs, torch.zeros(2)), batch_size=2)


def measure(network):
    benchmark = Benchmark(TorchModel(network), batches, [], [], [[ConnectionSparsity], [SynapticOperations]])
    results = benchmark.run(quiet=True)
    return results["ConnectionSparsity"], results["SynapticOperations"]


torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
dense = measure(network)
prune.custom_from_mask(network[0], "weight", torch.tensor([[1, 0, 1, 0]] * 3))
masked = measure(network)
prune.remove(network[0], "weight")  # the same zeros, without the mask
removed = measure(network)

print("Expected: 18 operations for 4 -> 3 -> 2 units; 12 with half of the first layer's weights masked or removed.")
for case, (sparsity, operations) in {"dense": dense, "masked": masked, "mask made permanent": removed}.items():
    print(f"Seen: {case}: connection sparsity {sparsity}, synaptic operations {operations}.")
print("Source: neurobench/metrics/manager/workload_manager.py, WorkloadMetricManager.run_metrics: every exception becomes")
print("        0.0 and a printed line, which quiet=True hides; the exception is from copy.deepcopy of a masked layer")
print("        (neurobench/metrics/utils/layers/binary_copy.py, make_binary_copy; see")
print("        https://github.com/pytorch/pytorch/issues/37322).")

assert dense[1] == {"Effective_MACs": 18.0, "Effective_ACs": 0.0, "Dense": 18.0}
assert removed[1] == {"Effective_MACs": 12.0, "Effective_ACs": 0.0, "Dense": 18.0}
assert masked == (removed[0], 0.0), "the masked network is counted"
PYTHON
then
    echo "CHANGED: NeuroBench no longer reports 0.0 operations for a masked layer." >&2
    exit 1
fi
