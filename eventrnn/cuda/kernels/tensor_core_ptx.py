"""PTX instructions of tensor cores: products of fragments, and what loads and rounds their operands.

A fragment is a small matrix that lies in the registers of one warp. With g = lane // 4 and q = lane % 4, a lane holds

a (16 x 16) : in four words two neighbouring numbers of rows g, g + 8, g, g + 8 from columns 2q, 2q, 2q + 8, 2q + 8 on
b (16 x 8)  : in two words two numbers of column g, from rows 2q and 2q + 8 on
c (16 x 8)  : four float32, of row g the columns 2q and 2q + 1, then the same of row g + 8

(NVIDIA, Parallel Thread Execution ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"). All lanes of a
warp take part in products and in loads of fragments.
"""

from __future__ import annotations

from numba import types

from eventrnn.cuda.kernels.ptx import INT, MEMORY, NOTHING, instruction

#: the types of the instructions by precision
_KINDS = {"float16": "f16", "bfloat16": "bf16"}

_FLOATS = types.UniTuple(types.float32, 4)

#: per precision: a (4 words), b (2 words), c (4 float32) -> a @ b + c, with sums in float32
MULTIPLY = {
    precision: instruction(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        _FLOATS,
        *[INT] * 6,
        *[types.float32] * 4,
    )
    for precision, kind in _KINDS.items()
}

#: shared address of a row of 8 numbers, a multiple of 16 -> b of rows 0 to 15 and b of rows 16 to 31. Lane l has the
#: address of row l, so that the rows may lie anywhere
load_two_columns = instruction(
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
    f"=r,=r,=r,=r,r,{MEMORY}",
    types.UniTuple(types.int32, 4),
    INT,
)

#: the same for one b; lanes from 16 on have an address that is not used
load_one_column = instruction(
    "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {$0, $1}, [$2];",
    f"=r,=r,r,{MEMORY}",
    types.UniTuple(types.int32, 2),
    INT,
)

#: per precision: two float32 -> both rounded, the first one in the lower half of the word
PACK = {
    precision: instruction(f"cvt.rn.{kind}x2.f32 $0, $2, $1;", "=r,f,f", INT, types.float32, types.float32, pure=True)
    for precision, kind in _KINDS.items()
}

#: per precision: a word in whose lower half a number lies -> the number as float32
WIDEN = {
    "float16": instruction(
        "{ .reg .b16 low; .reg .b16 high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low; }",
        "=f,r",
        types.float32,
        INT,
        pure=True,
    ),
    "bfloat16": instruction(
        "{ .reg .b32 word; shl.b32 word, $1, 16; mov.b32 $0, word; }", "=f,r", types.float32, INT, pure=True
    ),
}

#: shared address, a multiple of 8, and two float32
store_shared_float2 = instruction(
    "st.shared.v2.f32 [$0], {$1, $2};", f"r,f,f,{MEMORY}", NOTHING, INT, types.float32, types.float32
)

#: shared address, a multiple of 8 -> two words
load_shared2 = instruction("ld.shared.v2.b32 {$0, $1}, [$2];", f"=r,=r,r,{MEMORY}", types.UniTuple(types.int32, 2), INT)

#: shared address and a word
store_shared_word = instruction("st.shared.b32 [$0], $1;", f"r,r,{MEMORY}", NOTHING, INT, INT)

#: address, a multiple of 16: four words of global memory that are read-only during the kernel
load_readonly_words = instruction(
    "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", types.UniTuple(types.int32, 4), types.int64
)

#: the same for one word
load_readonly_word = instruction("ld.global.nc.b32 $0, [$1];", "=r,l", INT, types.int64)

#: address, a multiple of 8: two words of global memory that other blocks may be writing, each of which is read whole
load_relaxed2 = instruction(
    "ld.relaxed.gpu.global.v2.b32 {$0, $1}, [$2];", f"=r,=r,l,{MEMORY}", types.UniTuple(types.int32, 2), types.int64
)

#: address and a word: stores it visibly to other blocks; other memory operations are not ordered by it
store_relaxed_word = instruction("st.relaxed.gpu.global.b32 [$0], $1;", f"l,r,{MEMORY}", NOTHING, types.int64, INT)

#: shared address in a block of the cluster, own shared address, bytes, barrier of that block, which counts them: starts
#: a copy; all are multiples of 16
copy_to_block = instruction(
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    f"r,r,r,r,{MEMORY}",
    NOTHING,
    INT,
    INT,
    INT,
    INT,
)

#: orders earlier stores to shared memory of this thread before copies that are started later
fence_copies = instruction("fence.proxy.async.shared::cta;", MEMORY, NOTHING)

#: tanh within a relative error of 2^-11, in one instruction
tanh_approx = instruction("tanh.approx.f32 $0, $1;", "=f,f", types.float32, types.float32, pure=True)
