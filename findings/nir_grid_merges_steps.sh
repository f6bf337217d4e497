#!/usr/bin/env bash
# NIR's data format loses spikes on its own round trip from a time grid to events and back: an event's time divided by
# the step is floored in floating point, so that many events at the start of a step land in the step before.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary nir==1.0.8 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from nir.data_ir import EventData, TimeGriddedData

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("nir", "numpy")))

steps, dt = 1000, 1e-4
spikes = TimeGriddedData(np.ones((1, steps, 1), dtype=bool), dt)  # one neuron that spikes in every step
back = int(spikes.to_event(n_events=steps).to_time_gridded(dt).data.sum())
shifted = int(spikes.to_event(n_events=steps, time_shift=dt / 2).to_time_gridded(dt).data.sum())
short = TimeGriddedData(np.zeros((1, 49, 1), dtype=bool), dt).to_event(n_events=1).to_time_gridded(dt).n_time_steps

early = 0
for millisecond in range(1, 1000):
    event = EventData(np.zeros((1, 1), dtype=int), np.array([[millisecond / 1000]]), n_neurons=1, t_max=1.0)
    early += not event.to_time_gridded(1e-3).data[0, millisecond, 0]

print("Expected: a grid of 1000 steps of 0.1 ms is the same after to_event and to_time_gridded with the same step.")
print(f"Seen: {back} of {steps} spikes come back; with time_shift=dt/2 {shifted} do.")
print(f"Seen: a grid of 49 steps comes back with {short}.")
print(f"Seen: of the events at 1, 2, ... 999 ms, {early} land one step of 1 ms early.")
print("Source: nir/data_ir/graph.py, EventData.to_time_gridded: np.floor(valid_times / dt) and int(self.t_max / dt).")

assert shifted == steps, "half a step of shift no longer keeps every spike"
assert (back, short) == (932, 48), "the round trip loses another number of spikes"
assert early == 126, "another number of whole milliseconds lands a step early"
PYTHON
then
    echo "CHANGED: NIR's round trip through events no longer loses spikes in this way." >&2
    exit 1
fi
