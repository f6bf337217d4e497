"""Calls of kernels by their address.

A kernel that calls another one by name contains it: Numba compiles the callee once more as a part of each caller. A
kernel that is called by its address is compiled once, and only if a network needs it. The address comes with the data
(`tables.KERNEL`), so that the caller can be kept on disk.
"""

from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from eventrnn.cpu.kernel_cache import machine_code
from eventrnn.cpu.tables import (
    EventLists,
    InputEvents,
    NetworkTables,
    RowEvents,
    RunBuffers,
    RunOutputs,
    RunSize,
    SilentUnits,
    ThreadTables,
    WeightPools,
    Workspace,
)
from eventrnn.cpu.uninterrupted import uninterrupted


def _record(record, **fields: types.Type) -> types.Type:
    """The type of a record with these types of fields."""
    assert tuple(fields) == record._fields
    return types.BaseTuple.from_types(list(fields.values()), record)


def _array(kind: types.Type, axes: int = 1) -> types.Type:
    return types.Array(kind, axes, "C")


_FLOATS, _INTS, _LONGS = _array(types.float32), _array(types.int32), _array(types.int64)

_POOLS = _record(WeightPools, values=_FLOATS, index=_INTS, pointers=_LONGS, biases=_FLOATS)


def _workspace(leading_axes: int = 0) -> types.Type:
    """The type of a workspace of one thread; with one leading axis, of those of all threads."""
    return _record(
        Workspace,
        panel_begins=_array(types.int64, leading_axes + 1),
        panel_indices=_array(types.int32, leading_axes + 1),
        panel_values=_array(types.float32, leading_axes + 1),
        segment_numbers=_array(types.int32, leading_axes + 2),
        segment_factors=_array(types.float32, leading_axes + 2),
        dense_inputs=_array(types.float32, leading_axes + 1),
        tile=_array(types.float32, leading_axes + 1),
        scratch=_array(types.float32, leading_axes + 1),
    )


_LISTS = _record(EventLists, indices=_INTS, values=_FLOATS, begins=_LONGS, counts=_LONGS)

_THREAD = _record(
    ThreadTables,
    column_tiles=_array(types.int64, 2),
    pools=_POOLS,
    workspace=_workspace(),
    drive_pitch=types.int64,
)

_EVENTS = _record(
    RowEvents,
    lists=_LISTS,
    first=types.int64,
    per_row=types.int64,
    rows=types.int64,
)

#: types of the arguments of a product kernel (`products.py`): those of `spmm.propagate_all`
PRODUCT = (
    _THREAD,  # tables
    types.int64,  # first_tile
    types.int64,  # last_tile
    types.int64,  # bias_begin
    types.int64,  # n_pre
    _EVENTS,  # events
    _FLOATS,  # drives
)

#: types of the arguments of the updates of `cell_update.py`
UPDATE = (
    types.int64,  # n
    _FLOATS,  # drive_in
    types.int64,  # a
    _FLOATS,  # drive_rec
    types.int64,  # b
    _FLOATS,  # threshold
    types.int64,  # p
    _FLOATS,  # c
    _FLOATS,  # y
    types.int64,  # s
)

#: types of the arguments of `cell_update.compact_gated_events`
GATING = (
    types.int64,  # low
    types.int64,  # high
    _FLOATS,  # drive_in
    types.int64,  # a
    _FLOATS,  # drive_rec
    types.int64,  # b
    _FLOATS,  # y
    types.int64,  # at
    _INTS,  # indices
    _FLOATS,  # values
    types.int64,  # to
)

#: types of the arguments of `silence.rest`
REST = (
    types.int64,  # most
    _record(
        SilentUnits,
        keep=_FLOATS,
        pull=_FLOATS,
        threshold=_FLOATS,
        unit=types.int64,
        count=types.int64,
        c=_FLOATS,
        y=_FLOATS,
        at=types.int64,
        samples=types.int64,
        pitch=types.int64,
        spare=_FLOATS,
        spare_at=types.int64,
        spare_pitch=types.int64,
    ),  # units
)

_NETWORK = _record(
    NetworkTables,
    layers=_array(types.int64, 2),
    column_tiles=_array(types.int64, 3),
    pools=_POOLS,
    threshold=_FLOATS,
    keep=_FLOATS,
    pull=_FLOATS,
    share_rows=types.int64,
    unit_bounds=_array(types.int64, 2),
    drive_begins=_array(types.int64, 2),
    drive_pitch=types.int64,
)

_INPUT = _record(InputEvents, indptr=_LONGS, indices=_INTS, values=_FLOATS, row_of=_LONGS)

_BUFFERS = _record(
    RunBuffers,
    input_drives=_FLOATS,
    recurrent_drives=_FLOATS,
    events=_LISTS,
    list_begins=_array(types.int64, 2),
    list_counts=_array(types.int64, 2),
    drive_of=_array(types.int64, 2),
    rests=_LONGS,
    gated_indices=_array(types.int32, 2),
    gated_values=_array(types.float32, 2),
    workspace=_workspace(1),
)

_OUTPUTS = _record(RunOutputs, output=_FLOATS, events=_FLOATS, states=_FLOATS, graded=_LONGS, binary=_LONGS)

#: types of the arguments of `time_loop.run`
RUN = (
    types.int64,  # thread
    types.int64,  # n_threads
    _LONGS,  # barrier
    _NETWORK,  # network
    _INPUT,  # inputs
    _record(RunSize, **dict.fromkeys(RunSize._fields, types.int64)),  # size
    _BUFFERS,  # buffers
    _FLOATS,  # c
    _FLOATS,  # y
    _OUTPUTS,  # outputs
)


def _call(arguments: tuple[types.Type, ...], result: types.Type):
    """An intrinsic call(address, (argument, ...)) of kernels with these types; other types are refused by Numba."""

    @intrinsic
    def call(typingctx, kernel, values):
        def generate(context, builder, signature, args):
            convention = context.call_conv
            kind = convention.get_function_type(result, arguments)
            function = builder.inttoptr(args[0], kind.as_pointer())
            status, value = convention.call_function(
                builder, function, result, arguments, cgutils.unpack_tuple(builder, args[1], len(arguments))
            )
            # Kernels raise nothing by themselves, but Numba makes them, where it is told to check every index.
            with builder.if_then(status.is_error, likely=False):
                convention.return_status_propagate(builder, status)
            return context.get_dummy_value() if result == types.none else value

        return result(types.int64, types.BaseTuple.from_types(arguments)), generate

    return call


call_product, call_update, call_run = (_call(each, types.none) for each in (PRODUCT, UPDATE, RUN))

call_gating, call_rest = (_call(each, types.int64) for each in (GATING, REST))


def address_of(kernel, arguments: tuple[types.Type, ...]) -> int:
    """The address of a kernel for these types of arguments; compiled, or read from disk, at the first call."""

    def address() -> int:
        kernel.compile(arguments)
        made = kernel.overloads[arguments]
        return machine_code(made).get_pointer_to_function(made.fndesc.llvm_func_name)

    return uninterrupted(address)
