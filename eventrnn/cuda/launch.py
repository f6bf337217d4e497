"""Launches of event-driven layers: kernel arguments and kernel selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.kernels.cluster import cluster_kernel
from eventrnn.cuda.kernels.persistent import layers_kernel
from eventrnn.cuda.kernels.single_stream import single_kernel
from eventrnn.cuda.plan import Plan, blocks_from, roles_of
from eventrnn.cuda.run_buffers import UNWRITTEN_BYTE, RunBuffers, pitch_of

if TYPE_CHECKING:
    from eventrnn.cuda.device_network import DeviceNetwork


def launch_layers(network: DeviceNetwork, layers: range, each: Plan, buffers: RunBuffers, drive, status, after) -> None:
    """Put the launches of neighbouring layers on the stream, by the plan `each`.

    drive : (steps * batch, gates * units) float32, input drives of the only layer or of the first one of the network;
            None where the layers read the event log of the layer below
    after : per layer (steps, batch, units) float32 for the cells after each step, or None
    """
    key = (layers,)
    if after is not None:
        # The table holds the addresses of `after`, which the caller frees. Graphs keep using the other table.
        rows = network.device.put(_layer_rows(network, layers, each, buffers, drive, after))
    else:
        if key not in buffers.tables:
            buffers.tables[key] = network.device.put(_layer_rows(network, layers, each, buffers, drive, None))
        rows = buffers.tables[key]
    for k, is_input in roles_of(layers, each):
        if is_input:
            drives = _input_drives(network, buffers, k)
            drives.data.memset_async(UNWRITTEN_BYTE, drives.nbytes)
    _launch(network, each, rows, layers, buffers.steps, buffers.batch, status)


def _layer_rows(network: DeviceNetwork, layers: range, each: Plan, buffers: RunBuffers, drive, after) -> np.ndarray:
    """The table of a launch: one row of `tables.LAYER_FIELDS` int64 fields per role of a layer."""
    event_logs, gated, cells = buffers.event_logs, buffers.gated, buffers.cells
    roles = roles_of(layers, each)
    rows = np.zeros((len(roles), tables.LAYER_FIELDS), np.int64)
    for row, (k, is_input) in enumerate(roles):
        w_rec, placed = network.plain(network.w_rec[k]), each.layers[row]
        ready = network.drives_first(k, buffers.batch)
        below = event_logs[k - 1][1:] if not ready and (is_input or not each.cluster) else None
        drives = _input_drives(network, buffers, k) if k and each.cluster else drive
        fields = {
            tables.UNITS: network.units[k],
            tables.INPUTS: network.network.layers[k].inputs,
            tables.WIDTH: w_rec.width,
            tables.PITCH: pitch_of(network.units[k]),
            tables.INPUT_LOG: 0 if below is None else below.data.ptr,
            tables.INPUT_PITCH: 0 if k == 0 else pitch_of(network.units[k - 1]),
            tables.DRIVE: 0 if drives is None else drives.data.ptr,
            tables.EVENT_LOG: event_logs[k].data.ptr,
            tables.GATED: 0 if gated[k] is None else gated[k].data.ptr,
            tables.CELLS: cells[k].data.ptr,
            tables.STATES: 0 if after is None else after[k].data.ptr,
            tables.THRESHOLD: network.thresholds[k].data.ptr,
        }
        if each.cluster:
            matrix = network.plain(network.w_in[k]) if is_input else w_rec
            fields |= {
                tables.UNITS_OF: matrix.units.data.ptr,
                tables.ROWS_OF: matrix.rows.data.ptr,
                tables.BEGINS_OF: matrix.begins.data.ptr,
                tables.ROWS_BIAS: matrix.compact_bias.data.ptr,
                tables.CLOCKS: 0 if network.clocks is None else network.clocks.data.ptr,
            }
        else:
            # A layer with a finished drive needs no input matrix; its fields are set but not read.
            inside = w_rec if ready else network.plain(network.w_in[k])
            fields |= {
                tables.BIAS_IN: inside.bias.data.ptr,
                tables.BIAS_REC: w_rec.bias.data.ptr,
                tables.IN_LAYOUT: placed.layout_in,
                tables.IN_VALUES: inside.values.data.ptr,
                tables.IN_TABLE: inside.table.data.ptr,
                tables.IN_STARTS: inside.starts.data.ptr,
                tables.REC_LAYOUT: placed.layout_rec,
                tables.REC_VALUES: w_rec.values.data.ptr,
                tables.REC_TABLE: w_rec.table.data.ptr,
                tables.REC_STARTS: w_rec.starts.data.ptr,
            }
        for field, value in fields.items():
            rows[row, field] = value
    return rows


def _input_drives(network: DeviceNetwork, buffers: RunBuffers, k: int) -> Any:
    """The array to which the input cluster of layer k writes its drives, (steps * batch, 3 * units) float32."""
    return buffers.scratch(("input drives", k), (buffers.steps * buffers.batch, 3 * network.units[k]), np.float32)


def _launch(network: DeviceNetwork, each: Plan, rows, layers: range, steps: int, batch: int, status) -> None:
    """Select the kernel of a plan and launch it for as many groups of samples at a time as the plan has."""
    device, threads = network.device, 32 * each.warps
    cell = network.network.layers[layers.start].cell
    if each.cluster:
        # With several layers, the last two roles are INPUT and RECURRENT of the last layer.
        options = (each.layers[-1].layout_rec, each.layers[-2:][0].layout_in, each.cluster, *each.units_per_lane)
        options += each.single_strips, network.clocks is not None
        kernel = device.kernel(("cluster", *options), lambda: cluster_kernel(*options), threads)
    else:
        make, kind = single_kernel if each.single and cell.thresholded else layers_kernel, (cell.name, cell.variant)
        kernel = device.kernel((make.__name__, kind, each.layouts), lambda: make(kind, each.layouts), threads)
    for first in range(0, batch, each.groups * each.samples):
        key = (layers, batch, first)
        if key not in network.block_tables:
            table = blocks_from(each, first, batch)
            network.block_tables[key] = device.put(table), len(table)
        blocks, count = network.block_tables[key]
        arguments = rows.data.ptr, blocks.data.ptr, status[tables.STATUS_FAULT :].data.ptr, steps, batch
        device.launch(kernel, count, threads, *arguments, shared=each.shared, cooperative=True, cluster=each.cluster)
