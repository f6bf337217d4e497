"""A fake GPU: NumPy arrays in host memory instead of device memory, Python functions instead of kernels.

It tests what surrounds the kernels: which memory is kept, what is copied where and in which order, and what is refused.
The fake kernels take addresses like the real ones, so that a wrong address gives a wrong result. Layers are computed by
`reference.py`.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from functools import partial, wraps
from types import SimpleNamespace

import numpy as np

from eventrnn.cells import Cell
from eventrnn.cuda import tables
from eventrnn.reference import forward, layer_parameters, propagate, step


class OutOfMemoryError(MemoryError):
    """CuPy's error."""

    def __init__(self, size: int):
        super().__init__(size)
        self._size = size


#: the calls of the graph that is being captured; None while nothing is captured
captured: list | None = None


def enqueued(call):
    """A decorator: the call takes place at once or, during a capture, whenever the captured graph is launched."""

    @wraps(call)
    def wrapped(*arguments):
        if captured is None:
            call(*arguments)
        else:
            captured.append(partial(call, *arguments))

    return wrapped


class Pointer:
    """CuPy's `ndarray.data`."""

    def __init__(self, array: np.ndarray):
        self.ptr = array.ctypes.data

    @enqueued
    def memset_async(self, value: int, nbytes: int) -> None:
        ctypes.memset(self.ptr, value, nbytes)

    @enqueued
    def copy_from_device_async(self, source: Pointer, nbytes: int) -> None:
        ctypes.memmove(self.ptr, source.ptr, nbytes)

    def copy_from_host_async(self, source: int, nbytes: int) -> None:
        if captured is not None:
            raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")
        ctypes.memmove(self.ptr, source, nbytes)

    @enqueued
    def copy_to_host_async(self, target: int, nbytes: int) -> None:
        ctypes.memmove(target, self.ptr, nbytes)


class Array(np.ndarray):
    """CuPy's array."""

    device = SimpleNamespace(id=0)

    @property
    def data(self) -> Pointer:
        return Pointer(self)

    @property
    def __cuda_array_interface__(self) -> dict:
        return self.__array_interface__

    def __dlpack_device__(self):
        return 2, 0

    def get(self) -> np.ndarray:
        return np.array(self.view(np.ndarray))

    def set(self, array: np.ndarray) -> None:
        self[...] = array


class Graph:
    """Captured calls, which every launch repeats in order."""

    def __init__(self, calls):
        self.calls = calls

    def launch(self, queue) -> None:
        for call in self.calls:
            call()


class Queue:
    """CuPy's stream."""

    ptr = 7

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def synchronize(self) -> None:
        return None

    def record(self) -> None:
        return None

    def wait_event(self, event) -> None:
        return None

    def is_capturing(self) -> bool:
        return captured is not None

    def begin_capture(self) -> None:
        global captured  # noqa: PLW0603 (one GPU, one stream)
        captured = []

    def end_capture(self) -> Graph:
        global captured
        graph, captured = Graph(captured), None
        return graph


def floats(address: int, count: int) -> np.ndarray:
    """The float32 array of `count` numbers at an address."""
    return np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(ctypes.c_float)), (int(count),))


def longs(address: int, count: int) -> np.ndarray:
    """The int64 array of `count` numbers at an address."""
    return np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(ctypes.c_int64)), (int(count),))


def ints(address: int, count: int) -> np.ndarray:
    """The int32 array of `count` numbers at an address."""
    return np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(ctypes.c_int32)), (int(count),))


def _raise_to(address: int, value: int) -> None:
    word = longs(address, 1)
    word[0] = max(word[0], value)


def _list_row(dense: np.ndarray, row: int, begins_at, counts_at, lists_at, capacity: int) -> None:
    at = np.flatnonzero(dense)
    longs(begins_at, row + 1)[row] = row * capacity
    ints(counts_at, row + 1)[row] = len(at)
    words = ints(lists_at + 8 * row * capacity, 2 * (len(at) + tables.LIST_PAD)).reshape(-1, 2)
    words[: len(at), 0], words[: len(at), 1], words[len(at) :] = at, dense[at].view(np.int32), 0


def _dense_events(blocks, x_at, n, row_0, begins_at, counts_at, lists_at, capacity, status_at):
    for row in range(blocks):
        dense = floats(x_at + 4 * row * n, n)
        bad = np.flatnonzero(~np.isfinite(dense))
        if len(bad):
            _raise_to(status_at + 8 * tables.STATUS_INPUT, tables.LAST - ((row_0 + row) * n + int(bad[0])))
        _list_row(dense, row, begins_at, counts_at, lists_at, capacity)


def _log_events(blocks, event_log_at, pitch, n, rows, begins_at, counts_at, lists_at, capacity):
    for row in range(rows):
        _list_row(floats(event_log_at + 4 * row * pitch, n), row, begins_at, counts_at, lists_at, capacity)


def _symbols(blocks, symbols_at, rows, row_0, size, row_of_at, status_at):
    for row, symbol in enumerate(longs(symbols_at, rows)):
        good = 0 <= symbol < size
        if not good:
            _raise_to(status_at + 8 * tables.STATUS_INPUT, tables.LAST - (row_0 + row))
        longs(row_of_at, rows)[row] = symbol if good else 0


def _finite(blocks, values_at, count, status_at):
    if not np.isfinite(floats(values_at, count)).all():
        _raise_to(status_at + 8 * tables.STATUS_CELLS, 1)


def _count_events(blocks, dense_at, pitch, n, rows, graded_at, binary_at):
    for row in range(rows):
        dense = floats(dense_at + 4 * row * pitch, n)
        longs(graded_at, n)[:] += (dense != 0) & (np.abs(dense) != 1)
        longs(binary_at, n)[:] += np.abs(dense) == 1


def _single_step(layout_in, layout_rec, blocks, *fields):
    n, inputs, batch = int(fields[tables.STEP_UNITS]), int(fields[tables.STEP_INPUTS]), blocks[1]

    def matrix(first: int, n_pre: int, layout: int) -> tuple[np.ndarray, np.ndarray]:
        units_at, rows_at, begins_at, bias_at = (int(fields[first + k]) for k in range(4))
        strips = -(-3 * n // tables.LANES)
        begins, dense = longs(begins_at, strips + 1), np.zeros((n_pre, strips * tables.LANES), np.float32)
        entries, precision = int(begins[-1]), "bfloat16" if layout & tables.NARROW else "tf32"
        rows = widened(half(rows_at, tables.LANES * entries, precision), precision).reshape(entries, tables.LANES)
        for strip in range(strips):
            own = slice(int(begins[strip]), int(begins[strip + 1]))
            dense[ints(units_at, entries)[own] // 4, strip * tables.LANES : (strip + 1) * tables.LANES] = rows[own]
        return dense[:, : 3 * n], floats(bias_at, 3 * n)

    def array(field: int, width: int) -> np.ndarray:
        return floats(fields[field], batch * width).reshape(batch, width)

    w_in, bias_in = matrix(tables.STEP_IN_UNITS, inputs, layout_in)
    w_rec, bias_rec = matrix(tables.STEP_REC_UNITS, n, layout_rec)
    threshold = floats(fields[tables.STEP_THRESHOLD], n)
    parameters = {"w_in": w_in, "w_rec": w_rec, "bias_in": bias_in, "bias_rec": bias_rec, "threshold": threshold}
    x = array(tables.STEP_X, inputs)
    tape = step(Cell(), parameters, x, array(tables.STEP_C_BEFORE, n), array(tables.STEP_Y_BEFORE, n))
    array(tables.STEP_Y_AFTER, n)[:], array(tables.STEP_C_AFTER, n)[:] = tape.y, tape.c
    status = fields[tables.STEP_STATUS]
    if not np.isfinite(tape.c).all():
        _raise_to(status + 8 * tables.STATUS_CELLS, 1)
    if fields[tables.STEP_CHECKED] and not np.isfinite(x).all():
        _raise_to(status + 8 * tables.STATUS_INPUT, tables.LAST - int(np.argmin(np.isfinite(x))))
    if fields[tables.STEP_OUTPUT]:
        array(tables.STEP_OUTPUT, n)[:] = tape.y
    if fields[tables.STEP_ANSWER]:
        answer = longs(fields[tables.STEP_ANSWER], tables.STATUS_FIELDS + 1)
        answer[:-1] = longs(status, tables.STATUS_FIELDS)
        answer[-1] = 2 if answer[:-1].any() else 1


def half(address: int, count: int, precision: str) -> np.ndarray:
    """The array of `count` numbers of this precision at an address: uint16 words, or float32 for "tf32"."""
    kind = ctypes.c_float if precision == "tf32" else ctypes.c_uint16
    return np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(kind)), (int(count),))


def rounded(values: np.ndarray, precision: str) -> np.ndarray:
    """float32 numbers rounded to the precision, as `half` stores them; "tf32" is rounded by the product only."""
    if precision == "float16":
        return values.astype(np.float16).view(np.uint16)
    if precision == "bfloat16":
        words = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return values


def widened(words: np.ndarray, precision: str) -> np.ndarray:
    """Numbers as `half` stores them, in float32."""
    if precision == "float16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32) if precision == "bfloat16" else words


@np.errstate(over="ignore")
def _store(address: int, values: np.ndarray, precision: str, status_at: int) -> None:
    if precision == "float16" and (np.abs(values) > 65504).any():
        _raise_to(status_at + 8 * tables.STATUS_LARGE, 1)
    half(address, values.size, precision)[:] = rounded(np.ascontiguousarray(values.ravel(), np.float32), precision)


def _densify(precision, blocks, begins_at, counts_at, lists_at, row_of_at, rows, width, out_at, status_at):
    size = 4 if precision == "tf32" else 2
    for row in range(rows):
        source = int(longs(row_of_at, rows)[row]) if row_of_at else row
        count = int(ints(counts_at, source + 1)[source])
        words = ints(lists_at + 8 * int(longs(begins_at, source + 1)[source]), 2 * max(count, 1)).reshape(-1, 2)[:count]
        dense = np.zeros(width, np.float32)
        dense[words[:, 0]] = words[:, 1].copy().view(np.float32)
        _store(out_at + size * row * width, dense, precision, status_at)


def _round_rows(precision, blocks, dense_at, pitch, n, width, out_at, status_at):
    size = 4 if precision == "tf32" else 2
    for row in range(blocks):
        dense = np.zeros(width, np.float32)
        dense[:n] = floats(dense_at + 4 * row * pitch, n)
        _store(out_at + size * row * width, dense, precision, status_at)


def _cells(precision, blocks, *arguments):
    drive_at, rec_at, vectors_at, cells_at, y_at, sent_at, after_at, *sizes, sums_at, sums_pitch, status_at = arguments
    units, padded, pitch, batch = sizes
    words = (half(at, 3 * padded * batch, precision) for at in (drive_at, rec_at))
    drive, rec = (widened(each, precision).reshape(batch, 3, padded)[:, :, :units] for each in words)
    bias_u, bias_r, bias_g, bias_rec_g, threshold = floats(vectors_at, 5 * padded).reshape(5, padded)[:, :units]
    c, size = floats(cells_at, batch * units).reshape(batch, units), 4 if precision == "tf32" else 2
    u, r = (1 / (1 + np.exp(-(drive[:, g] + rec[:, g] + bias))) for g, bias in enumerate((bias_u, bias_r)))
    v = u * c + (1 - u) * np.tanh(r * (rec[:, 2] + bias_rec_g) + drive[:, 2] + bias_g)
    fired = v > threshold
    sent = (fired * v).astype(np.float32)
    c[:] = v - fired * threshold
    for b in range(batch):
        floats(sent_at + 4 * b * pitch, units)[:] = sent[b]
        _store(y_at + size * b * padded, sent[b], precision, status_at)
    if sums_at:
        for split in range(blocks[1]):
            found = np.zeros((2, -(-units // 2), 2), int)
            found.reshape(2, -1)[:, :units] = [each[split :: blocks[1]].sum(axis=0) for each in (sent != 0, sent == 1)]
            assert found.max() < 16, "a sum has four bits"
            own = half(sums_at + 2 * split * sums_pitch, found.shape[1], "float16")
            own[:] = found[0] @ [1, 1 << 4] + found[1] @ [1 << 8, 1 << 12]
    if after_at:
        floats(after_at, batch * units)[:] = c.ravel()


def _count_pairs(blocks, sums_at, pairs, pitch, rows, graded_at, binary_at):
    words = half(sums_at, rows * pitch, "float16").reshape(rows, pitch)[:, :pairs]
    found = ((words[:, :, None] >> np.arange(0, 16, 4)) & 15).sum(axis=0)
    sent, binary = found[:, :2].ravel(), found[:, 2:].ravel()
    # The last pair has one unit only if the number of units is odd.
    units = 2 * pairs - (not sent[-1])
    longs(graded_at, units)[:] += (sent - binary)[:units]
    longs(binary_at, units)[:] += binary[:units]


class Cublas:
    """Stands for `cublas.Cublas`."""

    def __init__(self, device):
        self.device = device

    def product(self, precision, a, b, out, rows, width, columns) -> None:
        enqueued(self._product)(precision, a.data.ptr, b.data.ptr, out.data.ptr, rows, width, columns)

    @np.errstate(all="ignore")
    def _product(self, precision, a, b, out, rows, width, columns) -> None:
        self.device.launched.append("gemm")
        left = widened(half(a, rows * width, precision), precision).reshape(rows, width)
        right = widened(half(b, width * columns, precision), precision).reshape(width, columns)
        half(out, rows * columns, precision)[:] = rounded((left @ right).ravel(), precision)


#: by name, the fake kernels that take what they were made for first: a precision, or two layouts
ROUNDING = {"densify": _densify, "round_rows": _round_rows, "cells": _cells, "single_step": _single_step}
#: by name, the other fake kernels
KERNELS = {
    "dense_events": _dense_events,
    "log_events": _log_events,
    "symbols": _symbols,
    "finite": _finite,
    "count_events": _count_events,
    "count_pairs": _count_pairs,
}


class FakeDevice:
    """Stands for `device.Device`.

    room      : bytes that one array may have, at most
    launched  : the names of the kernels that have run, in order
    allocated : the number of arrays that have been allocated
    timed     : seconds that `seconds` reports, as a function of the kernels that ran
    """

    name, architecture, multiprocessors, shared_bytes = "fake", (9, 0), 132, 232_448

    def __init__(self, room: int = 1 << 40):
        self.room, self.launched, self.allocated = room, [], 0
        self.timed = len
        self.core = SimpleNamespace(device_id=0)
        self.stream, self.queue = None, Queue()
        self.arrays = SimpleNamespace(
            empty=self._empty,
            ndarray=Array,
            asarray=lambda a: a.view(Array),
            ascontiguousarray=np.errstate(over="ignore")(lambda a, dtype: np.ascontiguousarray(a, dtype).view(Array)),
            bincount=lambda a, minlength: np.bincount(a, minlength=minlength).view(Array),
            concatenate=lambda parts: np.concatenate(parts).view(Array),
            take=lambda a, positions, axis: np.take(a, positions, axis=axis).view(Array),
            zeros=lambda shape, dtype: np.zeros(shape, dtype).view(Array),
            cuda=SimpleNamespace(
                memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
                alloc_pinned_memory=bytearray,
                get_current_stream=lambda: SimpleNamespace(ptr=0),
                runtime=SimpleNamespace(
                    memcpy2DAsync=_copy_rows, memcpyAsync=_copy, memcpyHostToDevice=1, memcpyDeviceToDevice=3
                ),
            ),
        )

    def _empty(self, shape, dtype) -> Array:
        assert captured is None, "a graph must not hold memory that is not kept"
        array = np.zeros(shape, dtype).view(Array)
        if array.nbytes > self.room:
            raise OutOfMemoryError(array.nbytes)
        self.allocated += 1
        # Memory that no kernel writes must not look like a result.
        ctypes.memset(array.ctypes.data, 0x5A, array.nbytes)
        return array

    def clusters(self, size: int) -> int:
        return 0

    def new_stream(self, *, urgent: bool = False) -> tuple:
        return None, self.queue

    def free_bytes(self) -> int:
        return self.room

    def need(self, needed: int) -> None:
        if needed > self.room:
            raise MemoryError(f"cuda: {needed:,} bytes are needed and {self.room:,} are free on {self.name}")

    def kernel(self, key, make, threads):
        return key

    def launch(self, kernel, blocks, threads, *arguments, **options) -> None:
        name, *kind = kernel
        call = partial(ROUNDING[name], *kind) if name in ROUNDING else KERNELS[name]
        call = np.errstate(all="ignore")(call)
        enqueued(lambda: (self.launched.append(name), call(blocks, *arguments)))()

    def seconds(self, enqueue) -> float:
        """The time that the test assigns to the work of `enqueue`."""
        self.launched.clear()
        enqueue()
        return self.timed(self.launched)

    def follow(self, array) -> None:
        return None

    def precede(self, array) -> None:
        return None

    @contextmanager
    def on_stream(self):
        yield

    def put(self, array) -> Array:
        target = self.empty(np.shape(array), array.dtype)
        target.set(array)
        return target

    def fetch(self, array, target) -> None:
        assert target.flags.c_contiguous
        target[...] = array

    def send(self, array, target) -> None:
        target.data.copy_from_host_async(array.ctypes.data, array.nbytes)

    def empty(self, shape, dtype) -> Array:
        try:
            return self._empty(shape, dtype)
        except OutOfMemoryError as error:
            raise MemoryError(f"cuda: {error._size:,} bytes are needed") from None


@enqueued
def _copy(target, source, nbytes, direction, stream) -> None:
    assert direction == 1 and stream == Queue.ptr
    ctypes.memmove(target, source, nbytes)


@enqueued
def _copy_rows(target, target_pitch, source, source_pitch, width, rows, kind, stream) -> None:
    for row in range(rows):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)


def _launch_layers(network, layers, each, buffers, drive, status, after) -> None:
    """`launch.launch_layers` by the specification; layers above the first read the event log of the layer below."""
    enqueued(_run_layers)(network, layers, buffers, drive, after)


@np.errstate(all="ignore")
def _run_layers(network, layers, buffers, drive, after) -> None:
    network.device.launched.append("layers")
    for k in layers:
        layer, units = network.network.layers[k], network.units[k]
        parameters = layer_parameters(layer)
        carried = np.array(buffers.event_logs[k][0, :, :units])
        if k == 0:
            # The drive holds the finished input drives: they replace the biases of an input of no units.
            x = np.zeros((buffers.steps, buffers.batch, 0), np.float32)
            drives = np.array(drive).reshape(buffers.steps, buffers.batch, -1)
        else:
            x, drives = np.array(buffers.sent(k - 1)), None
        c, y = np.array(buffers.cells[k]), carried
        for t in range(buffers.steps):
            if drives is not None:
                ys, cs = [], []
                for b in range(buffers.batch):
                    own = parameters | {"w_in": np.zeros((0, drives.shape[2]), np.float32), "bias_in": drives[t, b]}
                    tape = forward(layer.cell, own, x[t : t + 1, b : b + 1], c[b : b + 1], y[b : b + 1])[0]
                    ys.append(tape.y), cs.append(tape.c)
                y, c = np.concatenate(ys), np.concatenate(cs)
            else:
                tape = forward(layer.cell, parameters, x[t : t + 1], c, y)[0]
                y, c = tape.y, tape.c
            buffers.event_logs[k][t + 1, :, :units] = y
            if after is not None:
                after[k][t] = c
        buffers.cells[k][...] = c


def _products(matrix, device, table, rows, row_of=None, out=None, status=None):
    """`Matrix.products` by the specification."""
    weights, bias = matrix.weights.to_dense(), matrix.host_bias
    begins, counts, lists = table
    if out is None:
        out = device.empty((rows, weights.shape[1]), np.float32)
    _multiply(weights, bias, begins, counts, lists, rows, row_of, out)
    return out


@enqueued
@np.errstate(all="ignore")
def _multiply(weights, bias, begins, counts, lists, rows, row_of, out) -> None:
    words = np.array(lists).view(np.int32).reshape(-1, 2)
    for row in range(rows):
        source = row if row_of is None else int(row_of[row])
        events = words[int(begins[source]) :][: int(counts[source])]
        values = np.zeros((1, weights.shape[0]), np.float32)
        values[0, events[:, 0]] = events[:, 1].copy().view(np.float32)
        out.reshape(rows, -1)[row] = propagate(weights, values, bias)[0]


def install(monkeypatch, room: int = 1 << 40) -> FakeDevice:
    """Make every CUDA engine of the test run on a fake GPU, which is returned."""
    from eventrnn.cuda import device_network, engine, run, tensor_core_layer
    from eventrnn.cuda.matrix import Matrix

    device = FakeDevice(room)
    # The kernel that holds weights in registers runs on the emulated GPU only.
    monkeypatch.setattr(tensor_core_layer, "grid_plan", lambda units, batch, chip: None)
    monkeypatch.setattr(engine, "current_device", lambda: device)
    monkeypatch.setattr(device_network, "Cublas", Cublas)
    monkeypatch.setattr(run, "launch_layers", _launch_layers)
    monkeypatch.setattr(Matrix, "products", _products)
    return device
