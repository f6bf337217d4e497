"""Calls of kernels by their address.

A kernel that calls another one by name contains it: Numba compiles the callee once more as a part of each caller. A
kernel that is called by its address is compiled once, and only if a network needs it. The address comes with the data
(`tables.KERNEL`), so that the caller can be kept on disk.
"""

from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from eventrnn.cpu.tables import EventLists, WeightPools, Workspace


def _arrays(**fields) -> types.Type:
    """A record of contiguous arrays, each given by its type and number of axes."""
    record, kinds = fields.pop("record"), [types.Array(kind, axes, "C") for kind, axes in fields.values()]
    assert tuple(fields) == record._fields
    return types.BaseTuple.from_types(kinds, record)


_POOLS = _arrays(
    record=WeightPools,
    values=(types.float32, 1),
    index=(types.int32, 1),
    pointers=(types.int64, 1),
    biases=(types.float32, 1),
)

_EVENTS = _arrays(
    record=EventLists,
    indices=(types.int32, 1),
    values=(types.float32, 1),
    begins=(types.int64, 1),
    counts=(types.int64, 1),
)

_WORKSPACE = _arrays(
    record=Workspace,
    panel_begins=(types.int64, 1),
    panel_indices=(types.int32, 1),
    panel_values=(types.float32, 1),
    segment_numbers=(types.int32, 2),
    segment_factors=(types.float32, 2),
    dense_inputs=(types.float32, 1),
    tile=(types.float32, 1),
    blas_product=(types.float32, 1),
)

_FLOATS = types.Array(types.float32, 1, "C")

#: types of the arguments of a product kernel (`products.py`): those of `spmm.propagate_all`
PRODUCT = (
    types.Array(types.int64, 2, "C"),  # column_tiles
    types.int64,  # first_tile
    types.int64,  # last_tile
    _POOLS,
    types.int64,  # bias_begin
    types.int64,  # n_pre
    _EVENTS,
    types.int64,  # first_list
    types.int64,  # lists_per_row
    types.int64,  # rows
    _WORKSPACE,
    _FLOATS,  # drives
    types.int64,  # drive_pitch
)

#: types of the arguments of `cell_update.update` and `update_paper`
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
    types.Array(types.int32, 1, "C"),  # indices
    _FLOATS,  # values
    types.int64,  # to
)


def _call(arguments: tuple[types.Type, ...], result: types.Type):
    """An intrinsic call(address, (argument, ...)) of kernels with these types; other types are refused by Numba."""

    @intrinsic
    def call(typingctx, kernel, values):
        def generate(context, builder, signature, args):
            convention = context.call_conv
            kind = convention.get_function_type(result, arguments)
            function = builder.inttoptr(args[0], kind.as_pointer())
            _, value = convention.call_function(
                builder, function, result, arguments, cgutils.unpack_tuple(builder, args[1], len(arguments))
            )
            return context.get_dummy_value() if result == types.none else value

        return result(types.int64, types.BaseTuple.from_types(arguments)), generate

    return call


call_product, call_update = _call(PRODUCT, types.none), _call(UPDATE, types.none)

call_gating = _call(GATING, types.int64)


def address_of(kernel, arguments: tuple[types.Type, ...]) -> int:
    """The address of a kernel for these types of arguments; compiled, or read from disk, at the first call."""
    kernel.compile(arguments)
    made = kernel.overloads[arguments]
    return made.library.get_pointer_to_function(made.fndesc.llvm_func_name)
