#!/usr/bin/env bash
# expelliarmus counts the carry of an EVT3 clock twice when it reads, and never writes it: a valid recording of one
# second is read as two, and a silence of 4096 us or more is cut short in a file that expelliarmus itself has written.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    expelliarmus==1.1.12 evt3==0.4.1 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import evt3
import numpy as np
from expelliarmus import Wizard

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("expelliarmus", "evt3", "numpy")))


def read(path):
    wizard = Wizard(encoding="evt3")
    wizard.set_file(path)
    return wizard.read()["t"]


# One event per millisecond for one second. A word of EVT3 has its type in the upper four bits:
# 8 the upper 12 bits of the time, 6 its lower 12 bits, 0 the row, 2 polarity and column, which is an event.
times = np.arange(0, 1_000_000, 1000)
words = [word for t in times.tolist() for word in (0x8000 | t >> 12, 0x6000 | t & 0xFFF, 5, 0x2800 | 7)]
header = b"% evt 3.0\n% format EVT3;width=1280;height=720\n% geometry 1280x720\n% end\n"
Path("valid.raw").write_bytes(header + np.array(words, dtype="<u2").tobytes())
last = int(read("valid.raw")[-1])
last_of_evt3 = int(evt3.decode_file("valid.raw").t[-1])

# Two events with a silence between them, written and read by expelliarmus.
silences = {}
for silence in (4000, 4096, 5000, 1_000_000):
    events = np.zeros(2, dtype=[("t", np.int64), ("x", np.int16), ("y", np.int16), ("p", np.uint8)])
    events["t"] = 10, 10 + silence
    Wizard(encoding="evt3").save(fpath="own.raw", arr=events)
    silences[silence] = int(np.diff(read("own.raw"))[0])

print("Expected: the last event of the valid file is at 999000 us, and silences survive writing and reading.")
print(f"Seen: expelliarmus reads the last event at {last} us (the package evt3: {last_of_evt3} us).")
print(f"Seen: microseconds of silence written and read back: {silences}.")
print("Source: expelliarmus/src/evt3.c (C code of the wheel), read_evt3 adds time_low_ovfs to time_high;")
print("        save_evt3 writes the upper bits of the time with the first event only.")
print("Reported: https://github.com/open-neuromorphic/expelliarmus/issues/19 (reading, open)")
print("          and https://github.com/open-neuromorphic/expelliarmus/issues/20 (writing, open).")

assert last_of_evt3 == times[-1], "the file is not what this script means it to be"
assert last == 1_994_328, "the valid file is read with other times"
assert silences == {4000: 4000, 4096: 0, 5000: 904, 1_000_000: 576}, "silences are kept in another way"
PYTHON
then
    echo "CHANGED: expelliarmus no longer reads and writes the time of EVT3 files in this way." >&2
    exit 1
fi
