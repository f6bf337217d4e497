#!/usr/bin/env bash
# The polarity that the package aedat returns is a field "on" with the title "p": events["p"] works, yet tonic's ToFrame
# refuses the events of tonic's own AEDAT4 reader without a word, and a copy through HDF5 no longer has "p".
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    tonic==1.7.0 aedat==2.3.0 dv-processing==2.0.4 h5py==3.16.0 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import dv_processing as dv
import h5py
import numpy as np
from tonic.io import read_aedat4
from tonic.transforms import ToFrame

packages = ("tonic", "aedat", "dv-processing", "h5py", "numpy")
print("Versions:", ", ".join(f"{name} {version(name)}" for name in packages))

store = dv.EventStore()
for t, x, y, on in ((1000, 1, 2, True), (2000, 3, 4, False), (9000, 5, 6, True)):
    store.push_back(t, x, y, on)
writer = dv.io.MonoCameraWriter("recording.aedat4", dv.io.MonoCameraWriter.EventOnlyConfig("camera", (640, 480)))
writer.writeEvents(store)
del writer  # closes the file

events = read_aedat4("recording.aedat4")
assert events["p"].tolist() == events["on"].tolist() == [True, False, True]
try:
    refusal = f"frames with {int(ToFrame((640, 480, 2), n_event_bins=1)(events).sum())} events"
except AssertionError as error:
    refusal = f"AssertionError({str(error)!r})"

with h5py.File("recording.h5", "w") as file:
    file["events"] = events
with h5py.File("recording.h5") as file:
    copy = file["events"][:]

print("Expected: ToFrame takes what tonic's reader returns, and HDF5 gives back an array with the same fields.")
print(f"Seen: the reader's fields are {events.dtype.names}, all its keys {tuple(events.dtype.fields)}.")
print(f"Seen: ToFrame on these events: {refusal}.")
print(f"Seen: after HDF5 the keys are {tuple(copy.dtype.fields)}.")
print('Source: tonic/functional/to_frame.py, to_frame_numpy: assert "x" and "t" and "p" in events.dtype.names,')
print("        which looks for p only, and among the names; h5py keeps names, not titles.")
print("The title was added for tonic's sake: https://github.com/neuromorphicsystems/aedat/issues/16")

assert events.dtype.names == ("t", "x", "y", "on"), "the reader returns other fields"
assert refusal == "AssertionError('')", "ToFrame no longer refuses the events without a message"
assert tuple(copy.dtype.fields) == ("t", "x", "y", "on"), "HDF5 keeps the title"
assert np.array_equal(copy["on"], events["on"])
PYTHON
then
    echo "CHANGED: the title of the polarity field no longer has these effects." >&2
    exit 1
fi
