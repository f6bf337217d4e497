"""The GPUs of this machine, as far as a process that has not opened one can know them."""

from __future__ import annotations

import os
import subprocess

VARIABLE = "CUDA_VISIBLE_DEVICES"

# Seconds that `nvidia-smi` may take.
PATIENCE = 30.0


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them; empty where none is known.

    Where the variable is not set, `nvidia-smi` is asked. No CUDA context is made.
    """
    if (named := os.environ.get(VARIABLE)) is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    try:
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]
