#!/usr/bin/env bash
# flax.nnx.GRUCell documents flax.linen.GRUCell's formula word for word but has no bias b_hn, so that trained weights of
# linen or PyTorch do not fit into it; two fresh cells agree, since biases start at zero.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --prefer-binary \
    flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$work"

if ! JAX_PLATFORMS=cpu venv/bin/python -I - <<'PYTHON'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("flax", "jax")))

inputs, units = 3, 4
x = jax.random.normal(jax.random.key(1), (2, inputs))
h = jax.random.normal(jax.random.key(2), (2, units))
cell = linen.GRUCell(units)
weights = cell.init(jax.random.key(0), h, x)["params"]
twin = nnx.GRUCell(inputs, units, rngs=nnx.Rngs(0))


def largest_difference(weights):
    """Copy linen's weights into the nnx cell, and return the largest difference of one step."""
    twin.dense_i.kernel[...] = jnp.concatenate([weights[name]["kernel"] for name in ("ir", "iz", "in")], axis=1)
    twin.dense_i.bias[...] = jnp.concatenate([weights[name]["bias"] for name in ("ir", "iz", "in")])
    twin.dense_h.kernel[...] = jnp.concatenate([weights[name]["kernel"] for name in ("hr", "hz", "hn")], axis=1)
    return float(jnp.abs(cell.apply({"params": weights}, h, x)[0] - twin(h, x)[0]).max())


fresh = largest_difference(weights)
weights["hn"]["bias"] = weights["hn"]["bias"] + 0.5  # as training would
trained = largest_difference(weights)
documented = "b_{hn}" in nnx.GRUCell.__doc__ and "b_{hn}" in linen.GRUCell.__doc__

print("Expected: both cells compute n = tanh(W_in x + b_in + r * (W_hn h + b_hn)), as both docstrings say.")
print(f"Seen: b_hn in both docstrings: {documented}; biases of the recurrent layer of nnx: {twin.dense_h.bias}.")
print(f"Seen: largest difference of one step with b_hn = 0: {fresh:.1e}; with b_hn = 0.5: {trained:.2f}.")
print("Source: flax/nnx/nn/recurrent.py, GRUCell.__init__: dense_h has use_bias=False;")
print("        flax/linen/recurrent.py, GRUCell.__call__: dense_h(name='hn', use_bias=True).")
print("Reported: https://github.com/google/flax/issues/5594 (open).")

assert documented, "the docstrings no longer name b_hn"
assert fresh < 1e-6, "the cells differ without b_hn too"
assert trained > 0.05, "the cells no longer differ with b_hn"
PYTHON
then
    echo "CHANGED: flax.nnx.GRUCell no longer lacks b_hn." >&2
    exit 1
fi
