"""The baseline "c-blocks": a loop in C over blocks of 8 outputs and 4 inputs, compiled where a compiler is found.

It stands for the block-sparse kernels that codecs and speech models are shipped with: every input is multiplied, and
the sums of a block fill one vector register. The source is `kernels/blocks.c`. Nothing is compiled before a benchmark
asks for it, and the package needs no compiler otherwise.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from eventrnn._integers import round_up

#: presynaptic x postsynaptic units of a block, as in `BlockCSR`
BLOCK = (4, 8)

COMPILERS = ("cc", "gcc", "clang")

# Multiplications and additions may become one FMA each, as in hand-written kernels.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")

SOURCE = Path(__file__).parent / "kernels" / "blocks.c"

# Largest size of an int8 weight (`blocks.c` says why), and of a rounded input without its offset.
LARGEST_WEIGHT, LARGEST_INPUT = 64, 127


def compiler() -> str:
    """Path of the first C compiler on the search path. Raises ValueError where there is none."""
    for name in COMPILERS:
        if found := shutil.which(name):
            return found
    raise ValueError(
        f"against: c-blocks needs a C compiler, and none of {', '.join(COMPILERS)} is installed; install one, or name "
        "another baseline"
    )


@cache
def compiled() -> tuple[ctypes.CDLL, str]:
    """The loaded library, and what has made it. Raises ValueError where no compiler makes it."""
    path = compiler()
    with TemporaryDirectory() as folder:
        made = Path(folder) / "blocks.so"
        done = _output(path, *FLAGS, str(SOURCE), "-o", str(made))
        if done.returncode:
            raise ValueError(f"against: {path} cannot compile c-blocks: {done.stderr.strip()}; name another baseline")
        # A library stays loaded when its file is gone.
        library = ctypes.CDLL(str(made))
    version, _, _ = _output(path, "--version").stdout.partition("\n")
    return library, f"{version}, {' '.join(FLAGS[:3])}"


def _output(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class BlockLoop:
    """A matrix in blocks for the loops of `blocks.c`.

    Attributes
    ----------
    inputs, outputs : sizes of the matrix in whole blocks
    index   : (block rows + blocks,) int32, per block row the number of its blocks, then the first input of each
    weights : (blocks, 32) float32 or int8
    scale   : (outputs,) float32, value of a unit of an integer sum; empty for float32
    zero    : (outputs,) int32, the integer sum of an input of zeros; empty for float32
    meant   : (inputs, outputs), the matrix of which the loop computes the product
    """

    inputs: int
    outputs: int
    index: np.ndarray
    weights: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    meant: np.ndarray

    @classmethod
    def of(cls, dense: np.ndarray, dtype: str) -> BlockLoop:
        """Pack the blocks that are not zero of a matrix (inputs, outputs). Both sides are padded to whole blocks."""
        r, c = BLOCK
        inputs, outputs = round_up(dense.shape[0], r), round_up(dense.shape[1], c)
        padded = np.pad(dense, ((0, inputs - dense.shape[0]), (0, outputs - dense.shape[1])))
        scale, zero, meant = np.zeros(0, np.float32), np.zeros(0, np.int32), padded
        if dtype == "int8":
            step = np.abs(padded).max(axis=0) / LARGEST_WEIGHT
            padded = np.rint(padded / np.where(step > 0, step, 1)).astype(np.int8)
            scale = (step / LARGEST_INPUT).astype(np.float32)
            zero = LARGEST_INPUT * padded.sum(axis=0, dtype=np.int32)
            meant = padded * (scale.astype(np.float64) * LARGEST_INPUT)
        # (block rows, blocks of a row, 4 inputs, 8 outputs)
        blocks = padded.reshape(inputs // r, r, outputs // c, c).transpose(2, 0, 1, 3)
        kept = np.any(blocks, axis=(2, 3))
        chosen = blocks[kept] if dtype == "float32" else blocks[kept].transpose(0, 2, 1)
        index = np.concatenate([[len(found), *found] for found in (r * np.flatnonzero(row) for row in list(kept))])
        index = index.astype(np.int32)
        return cls(inputs, outputs, index, np.ascontiguousarray(chosen).reshape(-1, r * c), scale, zero, meant)

    def multiply(self, x: np.ndarray, out: np.ndarray) -> None:
        """The product of each step and sample, written over that of the step before.

        x   : (steps, batch, inputs) float32, contiguous; with int8 weights in [-1, 1]
        out : (batch, outputs) float32
        """
        library, _ = compiled()
        sizes = (ctypes.c_long(size) for size in (*x.shape[:2], self.inputs, self.outputs))
        if self.weights.dtype == np.float32:
            arrays, function = (self.index, self.weights, x, out), library.product_float32
        else:
            rounded = np.zeros(self.inputs, np.uint8)
            arrays = self.index, self.weights, self.scale, self.zero, x, rounded, out
            function = library.product_int8
        function(*sizes, *(ctypes.c_void_p(array.ctypes.data) for array in arrays))

    def inexactness(self, dense: np.ndarray, x: np.ndarray) -> np.ndarray | float:
        """Largest difference (batch, outputs) that int8 makes to a product; 0 for float32.

        It is that of the rounded weights, plus half a unit of the rounded inputs.

        dense : the matrix that was packed
        x     : (batch, inputs)
        """
        if self.weights.dtype == np.float32:
            return 0.0
        meant = self.meant[: dense.shape[0], : dense.shape[1]]
        # An input is rounded in float32, to which 127 + 127 x has an error of its own.
        half = (0.5 + 2.0**-16) / LARGEST_INPUT
        return np.abs(x.astype(np.float64)) @ np.abs(dense - meant) + half * np.abs(meant).sum(axis=0)
