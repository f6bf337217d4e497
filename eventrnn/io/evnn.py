"""Conversion of a layer from and to the parameters of `EGRU` in EvNN.

EvNN packs gate columns as (z, r, g). Its z is the gate that keeps the state, our u, so columns keep their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eventrnn._checks import check_finite, float32_array, need_kind, number_array, plain_array
from eventrnn._files import printable
from eventrnn.cells import Cell, Surrogate
from eventrnn.network import Layer
from eventrnn.weights import Dense
from eventrnn.weights.gated import need_matrices

# Name here -> names of EvNN: the parameter of its code first, then the name in its papers and recorded runs.
_EVNN_ARRAYS = {
    "kernel": ("kernel",),
    "recurrent_kernel": ("recurrent_kernel",),
    "bias": ("bias",),
    "recurrent_bias": ("recurrent_bias",),
    "threshold": ("thr", "threshold"),
}

_EVNN_SCALARS = {"dampening": ("dampening_factor", "gamma"), "support": ("pseudo_derivative_support", "support")}


def from_evnn(
    arrays: Mapping[str, Any], *, threshold: Any = None, dampening: float | None = None, support: float | None = None
) -> Layer:
    """A layer from the parameters of EvNN's `EGRU`, that is its `state_dict()` as arrays, converted to float32.

    Dropconnect and zoneout of EvNN act in training only and are not imported.

    Parameters
    ----------
    arrays    : kernel (I, 3H), recurrent_kernel (H, 3H), bias and recurrent_bias (3H,); threshold (H,), named
                `threshold` or `thr`; scalars `gamma` or `dampening_factor`, `support` or `pseudo_derivative_support`.
                Other names are ignored
    threshold : (H,) or a number, replaces the threshold in `arrays`
    dampening : replaces the dampening in `arrays`; 0.7, EvNN's default, if it is in neither
    support   : replaces the support in `arrays`; 1.0, EvNN's default, if it is in neither

    Raises `ValueError` for a missing array, for shapes that do not fit, and for NaN or infinity.
    """
    given = {"threshold": threshold, "dampening": dampening, "support": support}
    need_kind("arrays", arrays, Mapping, "a mapping of names to arrays")
    overrides = {key: plain_array(key, value) for key, value in given.items() if value is not None}
    found = {key: _first(arrays, names) for key, names in _EVNN_ARRAYS.items()} | overrides
    for key, names in _EVNN_ARRAYS.items():
        if found[key] is None:
            raise ValueError(f"arrays: no {' or '.join(names)} among {printable(', '.join(sorted(map(str, arrays))))}")
    recurrent, inputs = found["recurrent_kernel"], found["kernel"].shape[:1]
    units = recurrent.shape[0] if recurrent.ndim else 0
    if found["threshold"].ndim == 0:
        found["threshold"] = np.full(units, found["threshold"])
    needed = {
        "recurrent_kernel": (units, 3 * units),
        "kernel": (*inputs, 3 * units),
        "bias": (3 * units,),
        "recurrent_bias": (3 * units,),
        "threshold": (units,),
    }
    for key, shape in needed.items():
        if found[key].shape != shape or not units:
            raise ValueError(f"{key}: got shape {found[key].shape}, need {shape} for {units} units")
    single = {
        key: np.array(float32_array(key, found[key], f"{shape} for {units} units"), order="C")
        for key, shape in needed.items()
    }
    scalars = {key: _first(arrays, names) for key, names in _EVNN_SCALARS.items()} | overrides
    rule = {key: _scalar(key, scalars[key]) for key in _EVNN_SCALARS if scalars[key] is not None}
    return Layer(
        Dense(single["kernel"]),
        Dense(single["recurrent_kernel"]),
        single["bias"],
        single["recurrent_bias"],
        single["threshold"],
        Cell(variant="evnn", surrogate=Surrogate("triangle", **rule)),
    )


def to_evnn(layer: Layer) -> dict[str, np.ndarray]:
    """The parameters of a layer for `load_state_dict` of EvNN's `EGRU`, as float32 arrays.

    Keys: kernel (I, 3H), recurrent_kernel (H, 3H), bias and recurrent_bias (3H,), thr (H,), dampening_factor (1,),
    pseudo_derivative_support (1,). Raises `ValueError` for other cells than the EGRU, for the paper's variant and
    for surrogates other than the triangle, which EvNN does not have.
    """
    need_kind("layer", layer, Layer, "a Layer")
    cell = layer.cell
    if cell.name != "egru":
        raise ValueError(f"layer: got the cell {cell.name!r}; a layer of EvNN has the cell 'egru'")
    if cell.variant != "evnn" or cell.surrogate.kind != "triangle":
        raise ValueError(
            f"layer: got variant {cell.variant!r} with surrogate {cell.surrogate.kind!r}; "
            "EvNN has 'evnn' with 'triangle'"
        )
    need_matrices({"w_in": layer.w_in, "w_rec": layer.w_rec}, "the layout of EvNN")
    return {
        "kernel": layer.w_in.to_dense(),
        "recurrent_kernel": layer.w_rec.to_dense(),
        "bias": layer.bias_in.copy(),
        "recurrent_bias": layer.bias_rec.copy(),
        "thr": layer.threshold.copy(),
        "dampening_factor": np.array([cell.surrogate.dampening], np.float32),
        "pseudo_derivative_support": np.array([cell.surrogate.support], np.float32),
    }


def _scalar(key: str, array: np.ndarray) -> float:
    """The only number of an array. Raises ValueError for another count or type."""
    if array.size != 1:
        raise ValueError(f"{key}: got shape {array.shape}, need one number")
    number = number_array(key, array, "of one element")
    check_finite(key, number)
    return float(number.item())


def _first(arrays: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The array with the first of `names` that is in `arrays`, or None."""
    return next((plain_array(name, arrays[name]) for name in names if name in arrays), None)
