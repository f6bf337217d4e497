#!/usr/bin/env bash
# norse's default surrogate, "super", takes a slope alpha (100 by default) and computes with 1 whatever it is given; its
# other surrogates do use it.
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
from norse.torch.functional.threshold import threshold

print("Versions:", ", ".join(f"{name} {version(name)}" for name in ("norse", "torch")))


def slope(method, alpha, distance=0.1):
    """Return the surrogate derivative `distance` above the threshold."""
    x = torch.tensor([distance], requires_grad=True)
    threshold(x, method, torch.as_tensor(alpha)).sum().backward()
    return round(x.grad.item(), 6)


alphas = (1.0, 10.0, 100.0)
seen = {method: [slope(method, alpha) for alpha in alphas] for method in ("super", "triangle", "tanh")}
wanted = [round(1 / (1 + alpha * 0.1) ** 2, 6) for alpha in alphas]

print(f"Expected: SuperSpike's derivative 1 / (1 + alpha |x|)^2 at x = 0.1 for alpha = 1, 10, 100: {wanted}.")
print(f"Seen: {seen}.")
print("Source: norse/torch/functional/superspike.py, SuperSpike.backward: ctx.alpha is stored and not read;")
print("        the formula is that of Zenke and Ganguli, Neural Computation 30 (2018), section 3.3.2.")

assert len(set(seen["super"])) == 1 and seen["super"][0] == wanted[0], "super depends on alpha"
assert len(set(seen["triangle"])) == len(set(seen["tanh"])) == 3, "the other surrogates ignore alpha too"
PYTHON
then
    echo "CHANGED: norse's surrogate super no longer ignores alpha." >&2
    exit 1
fi
