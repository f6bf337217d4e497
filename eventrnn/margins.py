"""How far cells are from their thresholds: the margins that decide which units send."""

from __future__ import annotations

from typing import Any

import numpy as np

from eventrnn._checks import need_kind
from eventrnn.network import Layer, Network
from eventrnn.simulation import Simulation


def before_event(layer: Layer, cells: Any, sent: Any) -> np.ndarray:
    """Cells before their event, from the recorded cells after it, in float64.

    Parameters
    ----------
    layer : an event layer of N units
    cells : (..., N) cells after the event
    sent  : (..., N) outputs of the same steps; not 0 where a unit sent

    The released variant of the EGRU subtracts the threshold from a cell that sends in the same step (EvNN,
    `c = v - o threshold`); the paper's variant subtracts the output one step later, so that its recorded cell is v.
    The subtraction rounded, so the result is v to within one rounding of float32.
    """
    after = np.asarray(cells, np.float64)
    if layer.cell.variant != "evnn":
        return after
    return after + np.where(np.asarray(sent) != 0, np.asarray(layer.threshold, np.float64), 0.0)


def threshold_margins(network: Network, simulation: Simulation) -> dict[str, np.ndarray]:
    """Distances of cells from their thresholds before the event: a unit sends where its distance is above 0.

    simulation : a run with record=("events", "states")

    Returns `layers.k` -> (values,) float64 of v - threshold, one per unit and step of every sample without padding.
    Cells without a threshold (GRU, LSTM) are left out. Time and memory: O(steps * batch * units). Raises ValueError for
    a run that lacks a record, or of a network of another shape; TypeError for records on a GPU.
    """
    need_kind("network", network, Network, "a Network")
    need_kind("simulation", simulation, Simulation, "the result of simulate or Simulator.run")
    if not simulation.states or simulation.inputs is None:
        raise ValueError('simulation: has no recorded events and states; run with record=("events", "states")')
    if len(simulation.states) != len(network.layers):
        raise ValueError(
            f"simulation: the run of {len(simulation.states)} layers, but the network has {len(network.layers)}"
        )
    present = np.ones((simulation.steps, simulation.batch), bool)
    if simulation.lengths is not None:
        present &= np.arange(simulation.steps)[:, None] < simulation.lengths
    margins = {}
    for k, layer in enumerate(network.layers):
        if not layer.cell.thresholded:
            continue
        cells, events = simulation.states[k], simulation.events[k]
        if not isinstance(cells, np.ndarray):
            raise TypeError("simulation: its records are arrays on a GPU; run it with NumPy inputs")
        if cells.shape[2] != layer.units:
            raise ValueError(
                f"simulation: its layer {k} has {cells.shape[2]} units, but that of the network has {layer.units}"
            )
        before = before_event(layer, cells, events.to_dense())
        margins[f"layers.{k}"] = (before - np.asarray(layer.threshold, np.float64))[present].ravel()
    return margins
