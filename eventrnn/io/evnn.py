"""MOVED."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eventrnn.cells import Cell, Surrogate
from eventrnn.events import check_finite
from eventrnn.network import Layer
from eventrnn.weights import Dense

# --- EvNN ---------------------------------------------------------------------------------------------------

# Here -> what EvNN's parameter is called, then what its papers and recordings say.
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
    """A layer from the parameters of EvNN's `EGRU` (its `state_dict()` as arrays), cast to float32.

    Columns are packed (z, r, g) there; z keeps, so it is our u and nothing moves. EvNN drops connections and zones
    out in training only; neither travels.

    Parameters
    ----------
    arrays    : kernel (I, 3H), recurrent_kernel (H, 3H), bias and recurrent_bias (3H,); threshold (H,), named
                `threshold` or `thr`; scalars `gamma` or `dampening_factor`, `support` or
                `pseudo_derivative_support`. Other names are left alone
    threshold : (H,) or a number, in place of the one in `arrays`
    dampening, support : likewise; 0.7 and 1.0, EvNN's defaults, where neither is given

    Raises `ValueError` for what is missing, for shapes that do not fit, and for NaN or infinity.
    """
    given = {"threshold": threshold, "dampening": dampening, "support": support}
    overrides = {key: np.asarray(value) for key, value in given.items() if value is not None}
    found = {key: _first(arrays, names) for key, names in _EVNN_ARRAYS.items()} | overrides
    for key, names in _EVNN_ARRAYS.items():
        if found[key] is None:
            raise ValueError(f"arrays: no {' or '.join(names)} among {', '.join(sorted(arrays))}")
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
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is refused by name
        single = {key: np.array(found[key], np.float32, order="C") for key in needed}
    for key, array in single.items():
        check_finite(key, array)
    scalars = {key: _first(arrays, names) for key, names in _EVNN_SCALARS.items()} | overrides
    rule = {key: scalars[key].item() for key in _EVNN_SCALARS if scalars[key] is not None}
    return Layer(
        Dense(single["kernel"]),
        Dense(single["recurrent_kernel"]),
        single["bias"],
        single["recurrent_bias"],
        single["threshold"],
        Cell(variant="evnn", surrogate=Surrogate("triangle", **rule)),
    )


def to_evnn(layer: Layer) -> dict[str, np.ndarray]:
    """The layer as EvNN's `EGRU` names and shapes its parameters, float32: what its `load_state_dict` takes.

    Keys: kernel (I, 3H), recurrent_kernel (H, 3H), bias, recurrent_bias (3H,), thr (H,), dampening_factor (1,),
    pseudo_derivative_support (1,). Raises `ValueError` for the paper's variant and for other surrogates, which EvNN
    does not have.
    """
    cell = layer.cell
    if cell.variant != "evnn" or cell.surrogate.kind != "triangle":
        raise ValueError(
            f"layer: got variant {cell.variant!r} with surrogate {cell.surrogate.kind!r}; "
            "EvNN has 'evnn' with 'triangle'"
        )
    return {
        "kernel": layer.w_in.to_dense(),
        "recurrent_kernel": layer.w_rec.to_dense(),
        "bias": layer.bias_in.copy(),
        "recurrent_bias": layer.bias_rec.copy(),
        "thr": layer.threshold.copy(),
        "dampening_factor": np.array([cell.surrogate.dampening], np.float32),
        "pseudo_derivative_support": np.array([cell.surrogate.support], np.float32),
    }


def _first(arrays: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The array under the first of the names that is there, or None."""
    return next((np.asarray(arrays[name]) for name in names if name in arrays), None)
