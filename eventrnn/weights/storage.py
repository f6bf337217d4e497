"""Storages of weights: float32, bfloat16 (the upper half of the bits of a float32), or int8 with a scale per unit.

A storage is an option of every format. Products, counts and checks all use the decoded float32 weights: `bits << 16`
for bfloat16, and `float32(q) * scale` for int8, which is one float32 multiplication by the scale of the presynaptic
unit. A dense float32 matrix of the decoded weights therefore gives the same bits.
"""

from __future__ import annotations

import numpy as np

from eventrnn._checks import check_finite, in_parts, need_choice, need_whole

#: storage name -> dtype of a record's `values`. NumPy has no bfloat16, so its bits are held as integers.
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}

STORAGES = tuple(DTYPES)

#: Bits of the codes of int8, from the fewest that can be chosen to those that are taken where none are given.
FEWEST_BITS, MOST_BITS = 2, 8


def check_storage(storage: str) -> None:
    """Raise ValueError for a name that is not in `STORAGES`."""
    need_choice("storage", storage, STORAGES)


def check_bits(storage: str, bits: int) -> None:
    """Raise ValueError for bits per code that are not 2 to 8, and for fewer than 8 of a storage without codes."""
    need_whole("bits", bits, at_least=FEWEST_BITS, at_most=MOST_BITS)
    if storage != "int8" and bits != MOST_BITS:
        raise ValueError(f"bits: got {bits} for {storage}, but only int8 has codes; leave bits out, or take int8")


def largest_code(bits: int = MOST_BITS) -> int:
    """The largest code of so many bits: 127 of 8, 63 of 7, 31 of 6. The smallest is its negative, so that the negative
    of every weight has a code."""
    return 2 ** (bits - 1) - 1


def storage_of(values: np.ndarray) -> str:
    """The storage of an array of values, by its dtype. Raises TypeError for a dtype of no storage."""
    for name, dtype in DTYPES.items():
        if values.dtype == dtype:
            return name
    raise TypeError(
        f"weight values: got {values.dtype} with {values.ndim} dimensions, need float32, uint16 (bfloat16) or int8"
    )


def to_bfloat16(floats: np.ndarray) -> np.ndarray:
    """The bits (uint16) of the nearest bfloat16 of finite float32 numbers of any shape, ties to even.

    Exact for every float32 whose lower 16 bits are zero, subnormals included. Raises ValueError for a number that
    rounds to infinity, with its position.
    """
    bits = floats.view(np.uint32)
    # Add slightly less than half of the last place that is kept, plus the bit of that place. A tie then carries into
    # the last place only if its bit is set, that is to even.
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
    """The float32 value of each bfloat16; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def int8_scales(most: np.ndarray, bits: int = MOST_BITS) -> np.ndarray:
    """The scales (float32) of units with the largest magnitudes `most` (float32): `most / 127`, or 1 where it is zero.

    bits : of the codes; of fewer than 8, the largest code takes the place of 127

    A rounded scale can be too small to reach `most` (it may underflow to 0), or so large that `127 * scale` overflows.
    The next float32 up or down is taken then. Every weight is therefore within half a scale of its decoded code, apart
    from the rounding of the multiplication that decodes it.
    """
    code = largest_code(bits)
    scales = most / np.float32(code)
    reach = np.float64(code) + 0.5
    scales = np.where(most > reach * scales.astype(np.float64), np.nextafter(scales, np.float32(np.inf)), scales)
    with np.errstate(over="ignore"):
        overflows = np.isinf(code * scales)
    scales = np.where(overflows, np.nextafter(scales, np.float32(0)), scales)
    return np.where(most == 0, np.float32(1), scales).astype(np.float32)


def to_int8(floats: np.ndarray, scales: np.ndarray, bits: int = MOST_BITS) -> np.ndarray:
    """The codes `rint(floats / scales)`, clipped to those of so many bits; `scales` broadcast with `floats`.

    The division is in float64, so that a code is the nearest one.
    """
    codes = np.rint(floats.astype(np.float64) / scales)
    return np.clip(codes, -largest_code(bits), largest_code(bits)).astype(np.int8)


def from_int8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 value of each code: `float32(code) * scale`, one multiplication; `scales` broadcast with `codes`."""
    # A scale that is too large gives infinities, for which the checks of the formats raise an error with the position.
    with np.errstate(over="ignore", invalid="ignore"):
        return codes.astype(np.float32) * scales


def rounded(floats: np.ndarray, storage: str, bits: int = MOST_BITS) -> np.ndarray:
    """Float32 numbers (rows, columns) as a storage gives them back; int8 has a scale per row, and codes of `bits`.

    Raises ValueError for an unknown storage, for bits that it does not have, and for a number that bfloat16 rounds to
    infinity.
    """
    check_storage(storage)
    check_bits(storage, bits)
    if storage == "bfloat16":
        return from_bfloat16(to_bfloat16(floats))
    if storage == "int8":
        scales = int8_scales(_largest(floats), bits)[:, None]
        return from_int8(to_int8(floats, scales, bits), scales)
    return floats


def narrowest(floats: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The narrowest storage that gives back every bit of float32 numbers (rows, columns), and scales per row of int8.

    Numbers that `rounded` returned are stored in their storage; others stay float32. O(size), and for numbers of no
    narrow storage little more than a pass.
    """
    # The first row whose numbers are not all zero rules out most numbers of bits, and so all of them for most arrays.
    first = int(floats.any(axis=1).argmax()) if floats.size else 0
    for bits in range(MOST_BITS, FEWEST_BITS - 1, -1):
        scales = _exact_scales(floats[first : first + 1], bits)
        if scales is not None:
            scales = _exact_scales(floats, bits)
        if scales is not None:
            return to_int8(floats, scales[:, None]), scales
    if not any(bool((part.view(np.uint32) & 0xFFFF).any()) for part in (floats[:1], floats)):
        return (floats.view(np.uint32) >> 16).astype(np.uint16), None
    return floats, None


def _exact_scales(floats: np.ndarray, bits: int) -> np.ndarray | None:
    """Scales of codes of so many bits that decode to every bit of the rows, or None. A float32 scale can differ in its
    last place from the one that the rounded numbers suggest, so that its neighbours are tried too."""
    found = int8_scales(_largest(floats), bits)
    scales, left = found.copy(), np.ones(len(floats), bool)
    for towards in (None, np.float32(np.inf), np.float32(0)):
        tried = found[left] if towards is None else np.nextafter(found[left], towards)
        part = floats[left]
        with np.errstate(divide="ignore", invalid="ignore"):
            decoded = from_int8(to_int8(part, tried[:, None]), tried[:, None])
        exact = (decoded.view(np.uint32) == part.view(np.uint32)).all(axis=1) & (tried > 0)
        rows = np.flatnonzero(left)[exact]
        scales[rows], left[rows] = tried[exact], False
        if not left.any():
            return scales
    return None


def _largest(floats: np.ndarray) -> np.ndarray:
    return np.abs(floats).max(axis=1, initial=0).astype(np.float32)


def not_zero(values: np.ndarray) -> np.ndarray:
    """Which weights are not zero, of any storage. A code that is not zero decodes to no zero."""
    return (values & 0x7FFF) != 0 if values.dtype == np.uint16 else values != 0


def may_be_infinite(values: np.ndarray, scales: np.ndarray | None) -> bool:
    """Whether some weight may decode to NaN or infinity. False is certain; scales only bound int8 weights."""
    if scales is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            return not np.isfinite(scales * np.float32(128)).all()
    if values.dtype == np.uint16:
        return any(bool(((part & 0x7F80) == 0x7F80).any()) for part in in_parts(values))
    return True


def check_scales(values: np.ndarray, scales: np.ndarray | None, n_pre: int, full: bool) -> None:
    """Check that int8 values have (n_pre,) float32 scales and other storages have none. Raises TypeError.

    With `full`, also check that scales are finite and > 0 and that codes are in -127..127. Raises ValueError.
    """
    if (values.dtype == np.int8) != (scales is not None):
        got, need = ("None", "one float32 per presynaptic unit") if scales is None else (scales.dtype, "None")
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
        below = values < -largest_code()
        if below.any():
            position = tuple(int(k) for k in np.argwhere(below)[0])
            raise ValueError(f"weight: got code {values[position]} at position {position}, need -127 to 127")
