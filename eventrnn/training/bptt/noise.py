"""The random masks of one training window: dropout, DropConnect, zoneout and word dropout.

A regulariser draws them beforehand; the model only applies them. The result of a window is therefore a function of its
inputs and its noise. Random numbers are a function of the seed, the step and the place of a mask (Philox; Salmon et al.
2011), so that no generator has to be kept, and every backend draws the same masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eventrnn._checks import need_kind

# A Philox key has 64 bits for the seed.
SEED_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Mask:
    """A random mask that every window draws.

    Attributes
    ----------
    name   : field of `Noise`
    layer  : entry of that field, 0 for a field without entries
    rate   : share of the elements that are dropped, or, for zoneout, held
    place  : number of the mask among all masks of a step
    shape  : sizes of its axes; "T" and "B" stand for the steps and the samples of the window
    """

    name: str
    layer: int
    rate: float
    place: int
    shape: tuple[int | str, ...]

    def sizes(self, steps: int, batch: int) -> tuple[int, ...]:
        """The shape in a window of so many steps and samples."""
        sizes = {"T": steps, "B": batch}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)

    def draw(self, seed: int, step: int, steps: int, batch: int) -> np.ndarray:
        """The mask of one step of a run: a float32 scale, 0 or 1 / (1 - rate), or, for zoneout, booleans.

        The numbers are those of `numpy.random.Philox` with key (seed modulo 2^64, place) and counter (0, 0, step, 0).
        """
        # Philox would read a list with a number beyond the range of int64 as floats.
        key, counter = np.array([seed & SEED_BITS, self.place], np.uint64), np.array([0, 0, step, 0], np.uint64)
        bits = np.random.Philox(counter=counter, key=key)
        drawn = np.random.Generator(bits).random(self.sizes(steps, batch), np.float32)
        if self.name == "zoneout":
            return drawn < np.float32(self.rate)
        return (drawn >= np.float32(self.rate)) * self.scale

    @property
    def scale(self) -> np.float32:
        """The factor of an element that is kept."""
        return np.float32(1) / np.float32(1 - self.rate)


@dataclass(frozen=True, eq=False)
class Noise:
    """Masks of a window of T steps and B samples. A 1 in place of B shares a mask over the batch; None applies no mask.

    Scales are float32, and 0 or 1 / (1 - rate). `inputs`, `between` and `top` may also have shape (T, 1, size): one
    mask per step, shared over the batch; or (T, B, size): one per step and sample.

    Attributes
    ----------
    inputs    : (B or 1, I) scale of the first layer's inputs, shared over time (locked dropout)
    between   : for each pair of neighbouring layers a scale (B or 1, N) of the lower layer's output; or empty
    top       : (B or 1, N) scale of the read-out's input
    recurrent : for each layer a scale (N, GN) of `w_rec`, of a cell with G gates; or empty (DropConnect; Wan et al.
                2013)
    zoneout   : for each layer a boolean (T, B, N); or empty. Where True, the keep gate is 1 and the unit keeps its
                cell state of the step before (Krueger et al. 2017); applied before the threshold. In an LSTM the
                forget gate is 1 and the input gate 0; the output gate acts as ever
    words     : (V,) scale of the embedding's rows (word dropout)
    """

    inputs: np.ndarray | None = None
    between: tuple[np.ndarray | None, ...] = ()
    top: np.ndarray | None = None
    recurrent: tuple[np.ndarray | None, ...] = ()
    zoneout: tuple[np.ndarray | None, ...] = ()
    words: np.ndarray | None = None

    def of(self, name: str, k: int) -> np.ndarray | None:
        """Entry k of `between`, `recurrent` or `zoneout`; None where there is none."""
        each = getattr(self, name)
        return each[k] if each else None

    def check(
        self, steps: int, batch: int, sizes: list[int], inputs: int, symbols: int | None, gates: list[int]
    ) -> None:
        """Check the shapes of all masks.

        steps, batch : of the window
        sizes        : units of each layer
        inputs       : inputs of the first layer
        symbols      : symbols of the embedding, or None without one
        gates        : gate rows per unit of each layer

        Raises ValueError naming the field.
        """
        for name in ("inputs", "top", "words"):
            if (mask := getattr(self, name)) is not None:
                need_kind(f"noise {name}", mask, np.ndarray, "an array, or None")
        for name in ("between", "recurrent", "zoneout"):
            for k, mask in enumerate(getattr(self, name)):
                if mask is not None:
                    need_kind(f"noise {name}[{k}]", mask, np.ndarray, "an array, or None")
        for name, wanted in (("between", len(sizes) - 1), ("recurrent", len(sizes)), ("zoneout", len(sizes))):
            got = getattr(self, name)
            if got and len(got) != wanted:
                raise ValueError(f"noise {name}: got {len(got)} entries, need {wanted}, or none at all")
        scales = [("inputs", self.inputs, inputs), ("top", self.top, sizes[-1])]
        scales += [(f"between[{k}]", mask, sizes[k]) for k, mask in enumerate(self.between)]
        for name, mask, size in scales:
            shapes = ((batch, size), (1, size), (steps, 1, size), (steps, batch, size))
            if mask is not None and mask.shape not in shapes:
                need = f"({batch}, {size}), (1, {size}), ({steps}, 1, {size}) or ({steps}, {batch}, {size})"
                raise ValueError(f"noise {name}: got shape {mask.shape}, need {need}")
        for k, mask in enumerate(self.recurrent):
            if mask is not None and mask.shape != (shape := (sizes[k], gates[k] * sizes[k])):
                raise ValueError(f"noise recurrent[{k}]: got shape {mask.shape}, need {shape}")
        for k, mask in enumerate(self.zoneout):
            if mask is not None and (mask.shape != (steps, batch, sizes[k]) or mask.dtype != bool):
                need = f"bool ({steps}, {batch}, {sizes[k]})"
                raise ValueError(f"noise zoneout[{k}]: got {mask.dtype} {mask.shape}, need {need}")
        if self.words is not None and symbols is None:
            raise ValueError("noise words: the network reads numbers, not symbols; leave it out")
        if self.words is not None and self.words.shape != (symbols,):
            raise ValueError(f"noise words: got shape {self.words.shape}, need ({symbols},)")
