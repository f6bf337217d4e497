#!/usr/bin/env bash
# tonic's ToFrame(n_time_bins=...) rounds the width of a bin down to whole microseconds and drops what lies behind the
# last bin: up to half of a recording. (n_event_bins loses as much, which the docstring of its slicer does say.)
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary tonic==1.7.0 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from tonic.transforms import ToFrame

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("tonic", "numpy")))

fields = [("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)]
events = np.zeros(1999, dtype=fields)
events["t"] = np.arange(1999)  # one event per microsecond

by_time = {bins: int(ToFrame((1, 1, 2), n_time_bins=bins)(events.copy()).sum()) for bins in (10, 100, 1000)}
by_count = {bins: int(ToFrame((1, 1, 2), n_event_bins=bins)(events.copy()).sum()) for bins in (10, 100, 1000)}

print("Expected: 1999 events, one per microsecond, cut into equal bins: all of them, or all but the last.")
print(f"Seen: events kept for each number of bins: n_time_bins {by_time}; n_event_bins {by_count}.")
print("Source: tonic/slicers.py, SliceByTimeBins.get_slice_metadata: (times[-1] - times[0]) // bin_count,")
print("        and SliceByEventBins.get_slice_metadata: n_events // bin_count.")
print("Related, for a recording of one event: https://github.com/neuromorphs/tonic/issues/313 (open).")

assert by_time == by_count == {10: 1990, 100: 1900, 1000: 1000}, "another number of events reaches the frames"
PYTHON
then
    echo "CHANGED: ToFrame no longer drops the end of a recording in this way." >&2
    exit 1
fi
