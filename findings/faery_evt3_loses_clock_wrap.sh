#!/usr/bin/env bash
# faery notices the wrap of an EVT3 clock (every 16.8 s) only if the file holds the clock's very last and very first
# 4096 us: a short silence at that moment, and its own files come back with wrong times from there on.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary faery==0.7.1 evt3==0.4.1 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import evt3
import faery
import numpy as np

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("faery", "evt3", "numpy")))


def round_trip(period):
    """Write 40 seconds with one event per `period` microseconds; return the times, and as read by faery and by evt3."""
    times = np.arange(0, 40_000_000, period)
    events = np.zeros(times.size, dtype=faery.EVENTS_DTYPE)
    events["t"] = times
    faery.events_stream_from_array(events, (1280, 720)).to_file("recording.raw", version="evt3")
    by_faery = faery.events_stream_from_file("recording.raw").to_array()["t"].astype(np.int64)
    return times, by_faery, evt3.decode_file("recording.raw").t.astype(np.int64)


print("Expected: 40 seconds of events, written by faery as EVT3 and read by faery, have the times written.")
seen = {}
for period in (1000, 10_000):
    times, by_faery, by_evt3 = round_trip(period)
    assert np.array_equal(by_evt3, times), "faery writes a file that the package evt3 reads with other times"
    wrong = np.flatnonzero(by_faery != times)
    seen[period] = wrong.size, int(times[wrong[0]]) if wrong.size else None
    first = f", from {seen[period][1]} us on" if wrong.size else ""
    print(
        f"Seen: an event every {period} us: {wrong.size} of {times.size} times are wrong{first}; the last event is at "
        f"{times[-1]} us, where the package evt3 reads {by_evt3[-1]} us and faery {by_faery[-1]} us."
    )
print("Source: src/evt/decoder.rs (Rust code of the wheel), Decoder::next: a wrap is counted only where the upper 12 bits")
print("        of the time fall by more than 4094.")

assert seen[1000] == (0, None), "a dense recording does not come back as it was"
assert seen[10_000] == (2322, 16_780_000), "a recording with pauses comes back with other times"
PYTHON
then
    echo "CHANGED: faery no longer loses the wrap of the EVT3 clock in this way." >&2
    exit 1
fi
