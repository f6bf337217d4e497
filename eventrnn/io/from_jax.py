"""GRU cells of three libraries for JAX, which is not needed to read their arrays: Flax, Equinox and Haiku."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eventrnn._checks import need_kind
from eventrnn.cells import Cell
from eventrnn.io.imported import CellArrays, ImportRefused, listed, plain
from eventrnn.network import Layer

_AFTER, _BEFORE = Cell("gru", "after"), Cell("gru", "before")


def from_flax(params: Mapping[str, Any]) -> Layer:
    """A layer from the parameters of a `GRUCell` of Flax, linen or nnx.

    params : of linen `variables["params"]`, with ir, iz, in, hr, hz and hn; of nnx a mapping with dense_i and dense_h,
             as `nnx.to_pure_dict(nnx.state(cell))` makes it

    Raises `ImportRefused`, a ValueError, for other parameters.
    """
    need_kind("params", params, Mapping, "the mapping of the cell's parameters")
    params = params.get("params", params)
    if "dense_i" in params:
        dense_i, dense_h = params["dense_i"], params["dense_h"]
        return CellArrays(
            "dense_i and dense_h",
            _AFTER,
            (1, 0, 2),
            _value(dense_i, "kernel"),
            _value(dense_h, "kernel"),
            _value(dense_i, "bias", optional=True),
            _value(dense_h, "bias", optional=True),
        ).layer()
    missing = [name for name in ("ir", "iz", "in", "hr", "hz", "hn") if name not in params]
    if missing:
        what = "an LSTM" if "hf" in params else "parameters"
        raise ImportRefused(
            f"params: got {what} with {listed(params)}, need those of a GRUCell; {missing[0]} is missing"
        )

    def beside(names: tuple[str, ...], array: str) -> Any:
        """The arrays of several gates side by side; zeros for a missing bias."""
        units = np.shape(_value(params["hn"], "kernel"))[-1]
        parts = [_value(params[name], array, optional=array == "bias") for name in names]
        return np.concatenate([np.zeros(units, np.float32) if part is None else part for part in parts], axis=-1)

    inner, outer = ("iz", "ir", "in"), ("hz", "hr", "hn")
    return CellArrays(
        "params",
        _AFTER,
        (0, 1, 2),
        beside(inner, "kernel"),
        beside(outer, "kernel"),
        beside(inner, "bias"),
        beside(outer, "bias"),
    ).layer()


def from_equinox(cell: Any) -> Layer:
    """A layer from an `equinox.nn.GRUCell`, or any object with its arrays weight_ih, weight_hh, bias and bias_n.

    Raises `ImportRefused`, a ValueError, for another object.
    """
    missing = [name for name in ("weight_ih", "weight_hh") if getattr(cell, name, None) is None]
    if missing or (getattr(cell, "bias", None) is not None and not hasattr(cell, "bias_n")):
        what = " (an LSTM has no bias_n)" if not missing else ""
        raise ImportRefused(f"cell: got {type(cell).__name__}, need an equinox.nn.GRUCell{what}")
    bias, bias_n = getattr(cell, "bias", None), getattr(cell, "bias_n", None)
    bias_rec = None
    if bias_n is not None:
        bias_rec = np.concatenate([np.zeros(2 * len(plain(bias_n)), np.float32), plain(bias_n)])
    return CellArrays(
        "cell",
        _AFTER,
        (1, 0, 2),
        plain(cell.weight_ih).T,
        plain(cell.weight_hh).T,
        None if bias is None else plain(bias),
        bias_rec,
    ).layer()


def from_haiku(params: Mapping[str, Any]) -> Layer:
    """A layer from the parameters of a `haiku.GRU`: w_i (I, 3 N), w_h (N, 3 N) and b (3 N,), or a mapping with one
    entry that holds them, as `transformed.init` returns it.

    The update gate of Haiku is 1 less our keep gate, so that its columns are negated. The reset gate acts before the
    product.

    Raises `ImportRefused`, a ValueError, for other parameters.
    """
    need_kind("params", params, Mapping, "the mapping of the cell's parameters")
    if "w_i" not in params and len(params) == 1 and isinstance(inner := next(iter(params.values())), Mapping):
        params = inner
    missing = [name for name in ("w_i", "w_h", "b") if name not in params]
    if missing:
        raise ImportRefused(f"params: got {listed(params)}, need those of a haiku.GRU; {missing[0]} is missing")
    arrays = []
    for name in ("w_i", "w_h", "b"):
        array = np.array(plain(params[name]))
        units = array.shape[-1] // 3 if array.ndim else 0
        array[..., :units] *= -1
        arrays.append(array)
    return CellArrays("params", _BEFORE, (0, 1, 2), *arrays).layer()


def _value(group: Any, name: str, *, optional: bool = False) -> Any:
    """An array of a group of parameters, which may wrap it."""
    if not isinstance(group, Mapping) or name not in group:
        if optional:
            return None
        raise ImportRefused(f"params: a group has no {name}; need the parameters of a GRUCell")
    value = group[name]
    if value is None:
        return None
    return plain(getattr(value, "value", value))
