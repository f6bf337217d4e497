"""Everything random of one training window, drawn beforehand: the model only applies it.

So a window is a function of its noise, and whoever draws it (a regulariser) keeps the generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Noise:
    """Masks of one window. B samples, T steps; 1 in place of B shares a mask over the batch. None: no noise there.

    Scales are float32 and already rescaled (0, or 1 / (1 - rate) where kept). `inputs`, `between` and `top` may also be
    (T, 1, size): a mask a step, shared over the batch.

    Attributes
    ----------
    inputs    : (B or 1, I) scale of what the first layer reads, shared over time (locked dropout)
    between   : one (B or 1, N) scale a gap between layers, or nothing
    top       : (B or 1, N) scale of what the read-out reads
    recurrent : one (N, 3N) scale of `w_rec` a layer, or nothing (DropConnect; Wan et al. 2013)
    zoneout   : one boolean (T, B, N) a layer, or nothing: True holds a unit's keep gate at 1, so that it keeps its
                previous cell state (Krueger et al. 2017); applied before the threshold
    words     : (V,) scale of the embedding's rows when they are looked up (word dropout)
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

    def check(self, steps: int, batch: int, sizes: list[int], inputs: int, symbols: int | None) -> None:
        """Refuse what does not fit a window; `sizes` are the layers' units, `inputs` what the first layer reads.

        Raises ValueError naming the field.
        """
        for name, wanted in (("between", len(sizes) - 1), ("recurrent", len(sizes)), ("zoneout", len(sizes))):
            got = getattr(self, name)
            if got and len(got) != wanted:
                raise ValueError(f"noise {name}: got {len(got)} entries, need {wanted}, or none at all")
        scales = [("inputs", self.inputs, inputs), ("top", self.top, sizes[-1])]
        scales += [(f"between[{k}]", mask, sizes[k]) for k, mask in enumerate(self.between)]
        for name, mask, size in scales:
            if mask is not None and mask.shape not in ((batch, size), (1, size), (steps, 1, size)):
                need = f"({batch}, {size}), (1, {size}) or ({steps}, 1, {size})"
                raise ValueError(f"noise {name}: got shape {mask.shape}, need {need}")
        for k, mask in enumerate(self.recurrent):
            if mask is not None and mask.shape != (sizes[k], 3 * sizes[k]):
                raise ValueError(f"noise recurrent[{k}]: got shape {mask.shape}, need ({sizes[k]}, {3 * sizes[k]})")
        for k, mask in enumerate(self.zoneout):
            if mask is not None and (mask.shape != (steps, batch, sizes[k]) or mask.dtype != bool):
                need = f"bool ({steps}, {batch}, {sizes[k]})"
                raise ValueError(f"noise zoneout[{k}]: got {mask.dtype} {mask.shape}, need {need}")
        if self.words is not None and symbols is None:
            raise ValueError("noise words: the network reads numbers, not symbols; leave it out")
        if self.words is not None and self.words.shape != (symbols,):
            raise ValueError(f"noise words: got shape {self.words.shape}, need ({symbols},)")
