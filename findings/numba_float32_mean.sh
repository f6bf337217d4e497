#!/usr/bin/env bash
# Numba's np.sum and np.mean of a float32 array add one element after the other in float32, so that the mean of 2^25
# ones is 0.5; NumPy adds in pairs, and so gets 1.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary numba==0.68.1 numpy==2.4.6
cd "$work"

if ! venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import numba
import numpy as np

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("numba", "numpy")))


def statistics(values):
    return np.sum(values), np.mean(values), np.var(values)


ones = np.ones(2**25, dtype=np.float32)
by_numpy = tuple(float(value) for value in statistics(ones))
by_numba = tuple(float(value) for value in numba.njit(statistics)(ones))

tenths = np.full(400_000, 0.1, dtype=np.float32)
errors = {
    "NumPy": abs(float(np.sum(tenths)) - 40_000),
    "Numba": abs(float(numba.njit(lambda values: np.sum(values))(tenths)) - 40_000),
}

print("Expected: sum, mean and variance of 2^25 ones are 2^25, 1 and 0, compiled or not.")
print(f"Seen: NumPy {by_numpy}; Numba {by_numba}.")
print(f"Seen: errors of the sum of 400000 tenths: NumPy {errors['NumPy']:.3f}, Numba {errors['Numba']:.3f}.")
print("Source: numba/np/arraymath.py, array_sum and array_mean: one running sum of the array's own type.")
print("Reported: https://github.com/numba/numba/issues/2855 (open since 2018).")

assert by_numpy == (2.0**25, 1.0, 0.0)
assert by_numba == (2.0**24, 0.5, 0.25), "the running sum goes on past 2^24"
assert errors["Numba"] > 1000 * errors["NumPy"]
PYTHON
then
    echo "CHANGED: Numba no longer sums float32 arrays in this way." >&2
    exit 1
fi
