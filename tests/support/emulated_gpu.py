"""A fake GPU that runs kernels whose warps vote, exchange words and wait for each other, as plain Python.

The CUDA threads of a launch take turns (`turns.py`). PTX instructions are replaced by NumPy.
Shared memory is host memory of each block. It is slow, so networks must be small; `install` makes blocks of two warps.
Kernels of independent rows are those of `fake_gpu.py`.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
import time
from types import CellType, FunctionType, SimpleNamespace

import numpy as np

from support import fake_gpu
from support.fake_gpu import FakeDevice, enqueued
from support.python_kernels import KINDS, TYPES, Pointed, _add, fused, rules
from support.turns import Group, Turns

WARPS = 2


class Here(threading.local):
    """The place of the running thread: its indices, its warp, its block, its cluster, and their shared memory."""

    thread = lane = block_x = block_y = shared_at = rank = 0
    turns: Turns
    warp: Group
    block: Group
    cluster: Group
    memories: tuple[int, ...]


here = Here()


class _Place:
    """An index of a thread that a kernel reads as `.x` and `.y`."""

    def __init__(self, x, y=lambda: 0):
        self._x, self._y = x, y

    x = property(lambda self: self._x())
    y = property(lambda self: self._y())


def _as_int(x) -> np.int32:
    return np.int32(struct.unpack("<i", struct.pack("<f", float(x)))[0])


def _as_float(x) -> np.float32:
    return np.int32(x).view(np.float32)


def _whole(address) -> int:
    """A shared address of 32 bits, of any block, as the address in host memory that it was cut from."""
    return here.shared_at + int(np.int64(int(address) - here.shared_at).astype(np.int32))


class TransactionBarrier:
    """An mbarrier: a phase is complete after some arrivals and once as many bytes have come as were announced."""

    def __init__(self, arrivals: int):
        self.arrivals = arrivals
        self.pending, self.bytes, self.phase = arrivals, 0, 0

    def count(self, arrivals: int, announced: int) -> None:
        """Take arrivals and announced bytes; arriving bytes are negative."""
        self.pending -= arrivals
        self.bytes += announced
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.arrivals, self.phase + 1

    def complete(self, parity: int) -> bool:
        """Whether the latest phase of that parity is complete."""
        return self.phase % 2 != parity


#: by address, the transaction barriers of all blocks
transactions: dict[int, TransactionBarrier] = {}


def _try_wait(address, parity) -> np.int32:
    complete = transactions[_whole(address)].complete(int(parity))
    if not complete:
        here.turns.give_way()
    return np.int32(complete)


def _store_async(address, word, barrier) -> None:
    ctypes.memmove(_whole(address), struct.pack("<i", int(word)), 4)
    transactions[_whole(barrier)].count(0, -4)


def _copy_bulk(target, source, size, barrier) -> None:
    ctypes.memmove(_whole(target), int(source), int(size))
    transactions[_whole(barrier)].count(0, -int(size))


def _copy_to_block(target, source, size, barrier) -> None:
    ctypes.memmove(_whole(target), _whole(source), int(size))
    transactions[_whole(barrier)].count(0, -int(size))


def _to_rank(address, rank) -> np.int32:
    at = here.memories[int(rank)] + _whole(address) - here.shared_at
    return np.int64(at).astype(np.int32)


#: PTX instructions of clusters and of barriers in shared memory
CLUSTERS = {
    "cluster_arrive": lambda: None,
    "cluster_wait": lambda: here.cluster.exchange(here.rank, 0),
    "map_to_rank": _to_rank,
    "barrier_init": lambda at, arrivals: transactions.update({_whole(at): TransactionBarrier(int(arrivals))}),
    "barrier_init_done": lambda: None,
    "barrier_expect_bytes": lambda at, size: transactions[_whole(at)].count(1, int(size)),
    "barrier_try_wait": _try_wait,
    "barrier_test": _try_wait,
    "sleep": lambda nanoseconds: None,
    "warps_barrier": lambda number, size: here.block.some(int(number), int(size)).exchange(here.thread % int(size), 0),
    "barrier_arrive": lambda at: transactions[_whole(at)].count(1, 0),
    "store_async": _store_async,
    "copy_bulk": _copy_bulk,
}


def _store_pair_if(address, word, value, flag) -> None:
    if flag:
        ctypes.memmove(_whole(address), struct.pack("<if", int(word), float(value)), 8)


def _load_relaxed(address) -> np.int32:
    # Whatever the word is, it may be one that this thread waits to change.
    here.turns.give_way()
    return np.int32(fake_gpu.ints(address, 1)[0])


def _load_relaxed_int64(address) -> np.int64:
    here.turns.give_way()
    return np.int64(fake_gpu.longs(address, 1)[0])


def _count_arrival(address, number) -> np.int32:
    word = fake_gpu.ints(address, 1)
    before = np.int32(word[0])
    word[0] += number
    return before


#: PTX instructions of kernels whose shared addresses have 32 bits
SHORT_ADDRESSES = {
    "load_shared": lambda at: np.int32(fake_gpu.ints(_whole(at), 1)[0]),
    "load_shared_uint16": lambda at: np.int32(fake_gpu.half(_whole(at), 1, "float16")[0]),
    "load_shared4": lambda at: tuple(map(np.int32, fake_gpu.ints(_whole(at), 4))),
    "load_shared_float": lambda at: np.float32(fake_gpu.floats(_whole(at), 1)[0]),
    "store_shared2": lambda at, a, b: ctypes.memmove(_whole(at), struct.pack("<ii", int(a), int(b)), 8),
    "store_shared_float4": lambda at, *values: ctypes.memmove(_whole(at), struct.pack("<4f", *map(float, values)), 16),
    "load_shared_float2": lambda at: tuple(map(np.float32, fake_gpu.floats(_whole(at), 2))),
    "store_shared_float": lambda at, value: ctypes.memmove(_whole(at), struct.pack("<f", float(value)), 4),
    "store_shared_pair_if": _store_pair_if,
    "at_most_one": lambda word: np.int32(int(word) != 0),
    "load_readonly": lambda at: np.float32(fake_gpu.floats(at, 1)[0]),
    "load_readonly4": lambda at: tuple(map(np.float32, fake_gpu.floats(at, 4))),
    "load_readonly_uint16": lambda at: np.int32(fake_gpu.half(at, 1, "float16")[0]),
    "load_readonly2": lambda at: tuple(map(np.int32, fake_gpu.ints(at, 2))),
    "store_float": lambda at, value: ctypes.memmove(int(at), struct.pack("<f", float(value)), 4),
    "load_relaxed_int64": _load_relaxed_int64,
    "store_relaxed_int64": lambda at, word: ctypes.memmove(int(at), struct.pack("<q", int(word)), 8),
    "count_arrival": _count_arrival,
    "add_shared": lambda at, number: _count_arrival(_whole(at), number),
    "take_shared": lambda at, number: _count_arrival(_whole(at), number),
    "fence_system": lambda: None,
    "fence_gpu": lambda: None,
    "load_relaxed": _load_relaxed,
}


def _ballot(mask, vote) -> np.int32:
    votes = here.warp.exchange(here.lane, bool(vote))
    return np.uint32(sum(1 << k for k, each in enumerate(votes) if each)).view(np.int32)


def _load4(address):
    words = struct.unpack("<4i", ctypes.string_at(int(address), 16))
    if -1 in words:
        # The thread polls until every word was written.
        here.turns.give_way()
    return tuple(map(np.int32, words))


def _load_relaxed2(address):
    here.turns.give_way()
    return tuple(map(np.int32, fake_gpu.ints(address, 2)))


def _copy_four(target, source):
    for k in range(4):
        ctypes.memmove(int(target) + 512 * k, int(source) + 512 * k, 16)


def _store(address, value):
    fake_gpu.floats(address, 1)[0] = value


def _halves(word) -> np.ndarray:
    return np.array([word], np.int32).view(np.uint16)


def _fragment(given: list, words: list[tuple[int, int, int]], shape: tuple[int, int], precision: str) -> np.ndarray:
    """The matrix whose fragment all lanes gave. words: of each its number, its row and its column in lane 0."""
    numbers, rows, columns = np.array(words).T
    held = np.array([[own[number] for number in numbers] for own in given], np.int32)
    values = fake_gpu.widened(held.view(np.uint16), precision).reshape(len(given), len(words), 2)
    lane, half = np.arange(len(given))[:, None, None], np.arange(2)
    along, across = 2 * (lane % 4) + half, lane // 4
    if shape[1] == 8:
        along, across = across, along
    matrix = np.zeros(shape)
    matrix[rows[:, None] + across, columns[:, None] + along] = values
    return matrix


def _multiply(precision: str):
    def multiply(*own):
        given = here.warp.exchange(here.lane, own)
        a = _fragment(given, [(0, 0, 0), (1, 8, 0), (2, 0, 8), (3, 8, 8)], (16, 16), precision)
        b = _fragment(given, [(4, 0, 0), (5, 8, 0)], (16, 8), precision)
        row, column = here.lane // 4, 2 * (here.lane % 4)
        places = (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1)
        return tuple(np.float32(c + a[i] @ b[:, j]) for c, (i, j) in zip(own[6:], places, strict=True))

    return multiply


def _load_columns(count: int):
    """Fragments of `count` matrices of 8 rows, whose addresses neighbouring lanes gave."""

    def load(address):
        given = here.warp.exchange(here.lane, _whole(address))
        row, column = 2 * (here.lane % 4), here.lane // 4
        found = []
        for first in range(0, 8 * count, 8):
            pair = [ctypes.string_at(given[first + row + half] + 2 * column, 2) for half in range(2)]
            found.append(np.frombuffer(b"".join(pair), np.int32)[0])
        return tuple(found)

    return load


def _store_word(address, word) -> None:
    ctypes.memmove(int(address), struct.pack("<i", int(word)), 4)


def _store_two(address, a, b) -> None:
    ctypes.memmove(_whole(address), struct.pack("<2f", float(a), float(b)), 8)


def _pack(precision: str):
    return lambda a, b: fake_gpu.rounded(np.array([a, b], np.float32), precision).view(np.int32)[0]


def _store_half(precision: str):
    def store(address, value) -> None:
        fake_gpu.half(address, 1, precision)[:] = fake_gpu.rounded(np.array([value], np.float32), precision)

    return store


def _widen(precision: str):
    return lambda word: np.float32(fake_gpu.widened(_halves(word)[:1], precision)[0])


def emulated(function, blocks, threads: int, shared: int, cluster: int = 0):
    """A kernel as a Python function of its arguments. blocks: their number, or (x, y); cluster: blocks per cluster."""
    from eventrnn.cuda.kernels import ptx, strip_product, tensor_core_cells, tensor_core_ptx

    grid = blocks if isinstance(blocks, tuple) else (blocks, 1)
    cuda = SimpleNamespace(
        threadIdx=_Place(lambda: here.thread),
        blockIdx=_Place(lambda: here.block_x, lambda: here.block_y),
        blockDim=SimpleNamespace(x=threads),
        gridDim=SimpleNamespace(x=grid[0], y=grid[1]),
        syncthreads=lambda: here.block.exchange(here.thread, 0),
        syncthreads_count=lambda vote: np.int32(sum(here.block.exchange(here.thread, int(vote)))),
        syncthreads_or=lambda vote: any(here.block.exchange(here.thread, int(vote))),
        syncwarp=lambda mask: here.warp.exchange(here.lane, 0),
        ballot_sync=_ballot,
        shfl_sync=lambda mask, word, lane: here.warp.exchange(here.lane, word)[int(lane)],
        local=SimpleNamespace(array=lambda length, kind: np.zeros(length, getattr(kind, "name", kind))),
        ffs=lambda word: np.int32((int(word) & -int(word)).bit_length()),
        fma=fused(),
    )
    fakes = {id(getattr(ptx, name)): lambda at, kind=kind: Pointed(at, kind) for name, kind in KINDS.items()}
    shared_kinds = {name.replace("global", "shared"): kind for name, kind in KINDS.items()}
    fakes |= {
        id(getattr(ptx, name)): lambda at, kind=kind: Pointed(at, kind)
        for name, kind in shared_kinds.items()
        if hasattr(ptx, name)
    }
    fakes |= {id(getattr(ptx, name)): rule for name, rule in rules().items()}
    fakes |= {
        id(ptx.cuda): cuda,
        id(ptx.libdevice): SimpleNamespace(float_as_int=_as_int, int_as_float=_as_float),
        id(ptx.shared_base): lambda: np.int64(here.shared_at),
        id(ptx.load_relaxed4): _load4,
        id(ptx.load_shared_float4): lambda at: tuple(
            map(np.float32, struct.unpack("<4f", ctypes.string_at(int(at), 16)))
        ),
        id(ptx.store_relaxed): _store,
        id(ptx.sum_of_warp): lambda value: np.int32(sum(here.warp.exchange(here.lane, int(value)))),
        id(ptx.copy_async): lambda target, source: _store(_whole(target), fake_gpu.floats(source, 1)[0]),
        id(ptx.copy_async16): lambda target, source: ctypes.memmove(int(target), int(source), 16),
        id(ptx.copy_async16_four): _copy_four,
        id(ptx.commit_copies): lambda: None,
        id(ptx.wait_for_copies): lambda: None,
        id(ptx.clock): lambda: np.int64(time.monotonic_ns()),
        id(ptx.wait_for_oldest_copies): lambda: None,
        id(ptx.max_of_warp): lambda value: np.int32(max(here.warp.exchange(here.lane, int(value)))),
        id(ptx.min_of_warp): lambda value: np.int32(min(here.warp.exchange(here.lane, int(value)))),
        id(ptx.libdevice.int_as_float): _as_float,
        id(ptx.fma): cuda.fma,
        **{id(getattr(ptx, name)): fake for name, fake in (SHORT_ADDRESSES | CLUSTERS).items()},
        **TYPES,
        **{id(each): _multiply(precision) for precision, each in tensor_core_ptx.MULTIPLY.items()},
        **{id(each): _pack(precision) for precision, each in tensor_core_ptx.PACK.items()},
        **{id(each): _widen(precision) for precision, each in tensor_core_ptx.WIDEN.items()},
        id(tensor_core_ptx.load_two_columns): _load_columns(4),
        id(tensor_core_ptx.load_one_column): _load_columns(2),
        id(tensor_core_ptx.store_shared_float2): _store_two,
        id(tensor_core_ptx.load_shared2): lambda at: tuple(map(np.int32, fake_gpu.ints(_whole(at), 2))),
        id(tensor_core_ptx.load_relaxed2): _load_relaxed2,
        id(tensor_core_ptx.store_relaxed_word): _store_word,
        id(tensor_core_ptx.store_shared_word): lambda at, word: _store_word(_whole(at), word),
        **{id(each): _store_half(precision) for precision, each in tensor_core_cells._STORES.items()},
        id(tensor_core_ptx.copy_to_block): _copy_to_block,
        id(tensor_core_ptx.fence_copies): lambda: None,
        id(tensor_core_ptx.tanh_approx): lambda x: np.float32(math.tanh(float(x))),
        id(tensor_core_ptx.load_readonly_words): lambda at: tuple(map(np.int32, fake_gpu.ints(at, 4))),
        id(tensor_core_ptx.load_readonly_word): lambda at: np.int32(fake_gpu.ints(at, 1)[0]),
        id(tensor_core_cells.power_of_two_approx): np.exp2,
        id(tensor_core_cells.reciprocal_approx): np.reciprocal,
        id(ptx.add_relaxed): _add,
        id(ptx.max_relaxed): fake_gpu._raise_to,
        id(strip_product.popcount): lambda word: np.int32((int(word) & 0xFFFFFFFF).bit_count()),
    }
    made: dict[int, FunctionType] = {}

    def plain(value):
        if id(value) in fakes:
            return fakes[id(value)]
        value = getattr(value, "py_func", value)
        if not isinstance(value, FunctionType) or not (value.__module__ or "").startswith("eventrnn.cuda"):
            return value
        if id(value) not in made:
            names = dict(value.__globals__)
            names |= {name: plain(names[name]) for name in value.__code__.co_names if name in names}
            closure = tuple(CellType(plain(each.cell_contents)) for each in value.__closure__ or ())
            made[id(value)] = FunctionType(value.__code__, names, value.__name__, value.__defaults__, closure)
        return made[id(value)]

    kernel = plain(function)

    def launch(*arguments):
        def call():
            with np.errstate(all="ignore"):
                kernel(*map(np.int64, arguments))

        turns, calls, kept = Turns(here), [], []
        # A block without a cluster is a cluster of its own.
        size, room = max(1, cluster), -(-shared // 16) * 16
        for y in range(grid[1]):
            for x in range(grid[0]):
                if x % size == 0:
                    kept.append((ctypes.c_char * (size * room + 16))())
                    # Shared memory that no thread wrote must not look like a result.
                    ctypes.memset(kept[-1], 0x5A, size * room + 16)
                    begin = -(-ctypes.addressof(kept[-1]) // 16) * 16
                    memories, neighbours = tuple(begin + room * k for k in range(size)), Group(size * threads, turns)
                place = {"turns": turns, "block_x": x, "block_y": y, "memories": memories, "cluster": neighbours}
                place |= {"shared_at": memories[x % size], "block": Group(threads, turns)}
                for first in range(0, threads, 32):
                    place |= {"warp": Group(min(32, threads - first), turns)}
                    for t in range(first, min(first + 32, threads)):
                        own = {"thread": np.int32(t), "lane": t % 32, "rank": x % size * threads + t}
                        calls.append((place | own, call))
        turns.run(calls)

    return launch


class EmulatedDevice(FakeDevice):
    """Stands for `device.Device`; kernels that `fake_gpu.py` does not know are emulated."""

    multiprocessors = 2

    def kernel(self, key, make, threads):
        return key if key[0] in fake_gpu.KERNELS or key[0] in fake_gpu.ROUNDING else (key, make()[0])

    def launch(self, kernel, blocks, threads, *arguments, **options) -> None:
        if not isinstance(kernel[0], tuple):
            super().launch(kernel, blocks, threads, *arguments, **options)
            return
        (key, function), shared = kernel, options.get("shared", 0)
        call = emulated(function, blocks, threads, shared, options.get("cluster", 0))
        enqueued(lambda: (self.launched.append(key[0]), call(*arguments)))()


def install(monkeypatch) -> EmulatedDevice:
    """Make every CUDA engine of the test run on an emulated GPU of two multiprocessors, which is returned."""
    from eventrnn.cuda import device_network, engine, gated_layer, gated_matrix, plan
    from eventrnn.cuda.gated_matrix import GatedMatrix
    from eventrnn.cuda.kernels import gated_kernels, gated_loop
    from eventrnn.cuda.matrix import Matrix

    device = EmulatedDevice()
    monkeypatch.setattr(engine, "current_device", lambda: device)
    monkeypatch.setattr(device_network, "Cublas", fake_gpu.Cublas)
    monkeypatch.setattr(Matrix, "products", fake_gpu._products)
    monkeypatch.setattr(plan, "_warps", lambda *arguments: WARPS)
    # The kernel of a single stream needs a warp for each of its six strips.
    monkeypatch.setattr(plan.Plan, "single", False)
    monkeypatch.setattr(GatedMatrix, "warps", WARPS)
    monkeypatch.setattr(gated_matrix, "ROWS_PER_SAMPLE", 2)
    # Small stages, so that small blocks have several.
    for module in (gated_matrix, gated_kernels):
        monkeypatch.setattr(module, "ROWS_STAGE_BYTES", 8 * 4 * 32)
    for module in (gated_layer, gated_loop):
        monkeypatch.setattr(module, "LAYER_STAGE_BYTES", 8 * 4 * 32)
    monkeypatch.setattr(gated_loop, "RESIDENT_STEPS", 2)
    return device
