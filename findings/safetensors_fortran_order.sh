#!/usr/bin/env bash
# safetensors.numpy 0.8.0 stores the memory of a Fortran-ordered array under its shape without a word: a transposed or
# column-major weight matrix is read back with its values in other places. Up to 0.7.0 it was stored right.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for release in 0.7.0 0.8.0; do
    python3 -m venv "$work/$release"
    "$work/$release/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
        "safetensors==$release" numpy==2.4.6
done
cd "$work"
cat > check.py <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, save

wanted = sys.argv[1] == "right"
print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("safetensors", "numpy")))

weights = np.arange(6, dtype=np.float32).reshape(2, 3)
columns = np.asfortranarray(weights)
assert columns.flags.f_contiguous and np.array_equal(columns, weights)
stored = load(save({"weights": columns}))["weights"]

print(f"Expected: {weights.tolist()}")
print(f"Seen:     {stored.tolist()}")
assert np.array_equal(stored, weights) == wanted, "a Fortran-ordered array is stored in another way"
PYTHON

if ! 0.7.0/bin/python -I check.py right || ! 0.8.0/bin/python -I check.py wrong; then
    echo "CHANGED: safetensors no longer stores Fortran-ordered arrays in this way." >&2
    exit 1
fi
echo "Source: safetensors/numpy.py, _flatten: hands the array's address and shape over, not its strides."
echo "Reported: https://github.com/safetensors/safetensors/issues/825 (open)."
