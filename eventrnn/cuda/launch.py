"""The launches of layers that go by events: what kernels are told, and which kernel it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables as k
from eventrnn.cuda.kernels.cluster import cluster_kernel
from eventrnn.cuda.kernels.persistent import layers_kernel
from eventrnn.cuda.kernels.single_stream import single_kernel
from eventrnn.cuda.plan import Plan, blocks_from, parts_of
from eventrnn.cuda.run_buffers import NOT_YET_BYTE, Piece, pitch_of

if TYPE_CHECKING:
    from eventrnn.cuda.engine import CudaEngine


def launch_layers(engine: CudaEngine, layers: range, each: Plan, piece: Piece, drive, report, after) -> None:
    """Neighbouring layers in one launch."""
    key = (layers, engine.ways.get(piece.batch, ()))
    if after is not None or key not in piece.tables:
        piece.tables[key] = engine.device.put(_layer_rows(engine, layers, each, piece, drive, after))
    for n, feeds in parts_of(layers, each):
        if feeds:
            drives = _fed(engine, piece, n)
            drives.data.memset_async(NOT_YET_BYTE, drives.nbytes)
    _launch(engine, each, piece.tables[key], layers, piece.steps, piece.batch, report)
    if after is not None:
        # It names an array that is somebody else's now.
        del piece.tables[key]


def _layer_rows(engine: CudaEngine, layers: range, each: Plan, piece: Piece, drive, after) -> np.ndarray:
    """What the kernel has to know of each layer."""
    records, gated, cells = piece.records, piece.gated, piece.cells
    parts = parts_of(layers, each)
    rows = np.zeros((len(parts), k.LAYER_FIELDS), np.int64)
    for row, (n, feeds) in enumerate(parts):
        w_in, w_rec, way = engine.w_in[n], engine.w_rec[n], each.layers[row]
        below = records[n - 1][1:] if n and (feeds or not each.cluster) else None
        drives = _fed(engine, piece, n) if n and each.cluster else drive
        fields = {
            k.UNITS: engine.units[n], k.INPUTS: engine.network.layers[n].inputs, k.WIDTH: w_rec.width,
            k.PITCH: pitch_of(engine.units[n]),
            k.X: 0 if below is None else below.data.ptr, k.X_PITCH: 0 if n == 0 else pitch_of(engine.units[n - 1]),
            k.DRIVE: 0 if drives is None else drives.data.ptr, k.RECORD: records[n].data.ptr,
            k.GATED: 0 if gated[n] is None else gated[n].data.ptr,
            k.CELLS: cells[n].data.ptr, k.STATES: 0 if after is None else after[n].data.ptr,
            k.THRESHOLD: engine.thresholds[n].data.ptr,
        }  # fmt: skip
        if each.cluster:
            matrix = w_in if feeds else w_rec
            fields |= {
                k.UNITS_OF: matrix.units.data.ptr, k.ROWS_OF: matrix.rows.data.ptr,
                k.FIRSTS_OF: matrix.firsts.data.ptr, k.ROWS_BIAS: matrix.column_bias.data.ptr,
            }  # fmt: skip
        else:
            # That of the first layer nobody reads.
            inside = w_in if n else w_rec
            fields |= {
                k.BIAS_IN: inside.bias.data.ptr, k.BIAS_REC: w_rec.bias.data.ptr,
                k.IN_WAY: way.way_in, k.IN_VALUES: inside.values.data.ptr, k.IN_TABLE: inside.table.data.ptr,
                k.IN_STARTS: inside.starts.data.ptr,
                k.REC_WAY: way.way_rec, k.REC_VALUES: w_rec.values.data.ptr, k.REC_TABLE: w_rec.table.data.ptr,
                k.REC_STARTS: w_rec.starts.data.ptr,
            }  # fmt: skip
        for field, value in fields.items():
            rows[row, field] = value
    return rows


def _fed(engine: CudaEngine, piece: Piece, n: int) -> Any:
    """Where a layer's feeder leaves drives: (rows, 3 * units)."""
    return piece.kept(("fed", n), (piece.steps * piece.batch, 3 * engine.units[n]), np.float32)


def _launch(engine: CudaEngine, each: Plan, rows, layers: range, steps: int, batch: int, report) -> None:
    device, threads = engine.device, 32 * each.warps
    variant = engine.network.layers[layers.start].cell.variant
    if each.cluster:
        # Of several layers, the last two parts are a feeder and the layer it feeds.
        arguments = (each.layers[-1].way_rec, each.layers[-2:][0].way_in, each.cluster, *each.rounds)
        kernel = device.kernel(("cluster", *arguments), lambda: cluster_kernel(*arguments), threads)
    else:
        make = single_kernel if each.single else layers_kernel
        kernel = device.kernel((make.__name__, variant, each.ways), lambda: make(variant, each.ways), threads)
    for first in range(0, batch, each.groups * each.samples):
        key = (layers, batch, first)
        if key not in engine.tables:
            table = blocks_from(each, first, batch)
            engine.tables[key] = device.put(table), len(table)
        blocks, count = engine.tables[key]
        device.launch(
            kernel, count, threads, rows.data.ptr, blocks.data.ptr, report[k.REPORT_FAULT :].data.ptr, steps, batch,
            shared=each.shared, together=True, cluster=each.cluster,
        )  # fmt: skip
