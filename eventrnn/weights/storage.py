"""How a weight is stored: float32, bfloat16 (the upper half of a float32's bits) or int8 with a scale.

A storage is an option of every format. What counts everywhere, in products, counts and checks, is the decoded
float32: `bits << 16` for bfloat16, `float32(q) * scale` for int8, one float32 multiplication, the scale that of the
presynaptic unit. A dense float32 twin therefore gives the same bits. Knows nothing of formats.
"""

from __future__ import annotations

import numpy as np

from eventrnn.events import check_finite

#: storage name -> type of a record's `values`; NumPy has no bfloat16, so its bits are held as integers
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}

STORAGES = tuple(DTYPES)

#: int8 weights span -INT8_MOST to INT8_MOST, so that every weight has its negative
INT8_MOST = 127


def check_storage(storage: str) -> None:
    """Refuse what is not in `STORAGES`."""
    if storage not in DTYPES:
        raise ValueError(f"storage: got {storage!r}, need one of {', '.join(STORAGES)}")


def storage_of(values: np.ndarray) -> str:
    """The storage of an array of values, by its type. Raises TypeError."""
    for name, dtype in DTYPES.items():
        if values.dtype == dtype:
            return name
    raise TypeError(
        f"weight values: got {values.dtype} with {values.ndim} dimensions, need float32, uint16 (bfloat16) or int8"
    )


def to_bfloat16(floats: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 (uint16), ties to even; ValueError with its position where that is infinite.

    Exact for every float32 whose lower 16 bits are zero, subnormals included. floats: finite float32, any shape.
    """
    bits = floats.view(np.uint32)
    # Just below half of the last place kept, and that place's own bit: a tie carries into an odd one only.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    infinite = (rounded & 0x7F80) == 0x7F80
    if infinite.any():
        position = tuple(int(k) for k in np.argwhere(infinite)[0])
        raise ValueError(
            f"weight: got {floats[position]} at position {position}, which bfloat16 rounds to infinity; "
            "scale the weights down or keep float32"
        )
    return rounded


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 of each bfloat16, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def int8_scales(most: np.ndarray) -> np.ndarray:
    """float32 scales for units whose largest magnitudes are `most` (float32): `most / 127`, 1 where that is zero.

    Where rounding would leave the scale too small to reach `most` (it may underflow to 0), or so large that
    `127 * scale` overflows, it is the next float32 up or down. So every weight is within half a scale of its code,
    but for the rounding of the one multiplication.
    """
    scales = most / np.float32(INT8_MOST)
    reach = np.float64(INT8_MOST) + 0.5
    scales = np.where(most > reach * scales.astype(np.float64), np.nextafter(scales, np.float32(np.inf)), scales)
    with np.errstate(over="ignore"):
        overflows = np.isinf(INT8_MOST * scales)
    scales = np.where(overflows, np.nextafter(scales, np.float32(0)), scales)
    return np.where(most == 0, np.float32(1), scales).astype(np.float32)


def to_int8(floats: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`rint(floats / scales)` within ±127; scales broadcast with floats. Divides in float64, so the nearest code."""
    codes = np.rint(floats.astype(np.float64) / scales)
    return np.clip(codes, -INT8_MOST, INT8_MOST).astype(np.int8)


def from_int8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`float32(code) * scale`, one float32 multiplication; scales broadcast with codes."""
    # Scales that overflow make infinities, which are refused by name.
    with np.errstate(over="ignore", invalid="ignore"):
        return codes.astype(np.float32) * scales


def check_scales(values: np.ndarray, scales: np.ndarray | None, n_pre: int, full: bool) -> None:
    """Cheap: int8 has (n_pre,) float32 scales, other storages none. `full`: scales finite and > 0, codes within ±127.

    Raises TypeError or ValueError.
    """
    if (values.dtype == np.int8) != (scales is not None):
        got, need = ("None", "one float32 a presynaptic unit") if scales is None else (scales.dtype, "None")
        raise TypeError(f"weight scales: got {got} for {storage_of(values)} values, need {need}")
    if scales is None:
        return
    if scales.dtype != np.float32 or scales.shape != (n_pre,):
        raise TypeError(f"weight scales: got {scales.dtype} of shape {scales.shape}, need float32 of shape ({n_pre},)")
    if full:
        check_finite("weight scale", scales)
        if (scales <= 0).any():
            unit = int(np.argmax(scales <= 0))
            raise ValueError(f"weight scale: got {scales[unit]} for unit {unit}, need > 0")
        if (values < -INT8_MOST).any():
            position = tuple(int(k) for k in np.argwhere(values < -INT8_MOST)[0])
            raise ValueError(f"weight: got code {values[position]} at position {position}, need -127 to 127")
