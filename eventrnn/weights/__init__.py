"""Weight formats, stored by presynaptic unit: the weights that leave unit `j` lie together.

A format is a frozen record of named arrays over a matrix of shape `(n_pre, n_post)`, where `n_post` counts gate rows
(3N for a layer of EGRUs or GRUs, 4N of LSTMs). Entry `[j, i]` is the weight from unit j to gate row i: the transpose of
W in the equations. Backends build on the formats; no format imports a backend.

Each format offers `check(full)`, `to_dense`, `from_dense`, `fan_out`, `stored_out`, `nnz`, `stored`, `nbytes`, and
can store its values as bfloat16 or int8 (`storage`, `floats`, `stored_as`). `nnz` counts the non-zero weights;
`stored` counts the stored entries, zeros inside blocks and groups and padding columns at the edge included.

`docs/architecture.md` lists the places that a new format touches.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eventrnn._checks import need_choice, need_pair
from eventrnn.weights.base import Weights as Weights
from eventrnn.weights.base import finite_matrix
from eventrnn.weights.block import INTEGER_COLUMNS as INTEGER_COLUMNS
from eventrnn.weights.block import BlockCSR as BlockCSR
from eventrnn.weights.block import check_block as check_block
from eventrnn.weights.block import takes_integers as takes_integers
from eventrnn.weights.csr import CSR as CSR
from eventrnn.weights.dense import Dense as Dense
from eventrnn.weights.gated import GATE_RULES as GATE_RULES
from eventrnn.weights.gated import GateCost as GateCost
from eventrnn.weights.gated import GatedBlocks as GatedBlocks
from eventrnn.weights.gated import NotAMatrix as NotAMatrix
from eventrnn.weights.gated import gate_cost as gate_cost
from eventrnn.weights.matrix_id import MatrixId as MatrixId
from eventrnn.weights.nm import NM as NM
from eventrnn.weights.nm import check_nm as check_nm
from eventrnn.weights.storage import STORAGES as STORAGES
from eventrnn.weights.storage import check_storage as check_storage

#: name of a format -> class of its records, of the formats that hold a matrix, which `convert` converts to each other
FORMATS: dict[str, type[Weights]] = {"dense": Dense, "csr": CSR, "block": BlockCSR, "nm": NM}

#: the same of all formats: also of blocks that are chosen per input, which are no matrix
RECORDS: dict[str, type[Weights]] = FORMATS | {"gated": GatedBlocks}


def convert(
    weights: Weights | np.ndarray,
    to: str,
    *,
    block: tuple[int, int] | None = None,
    nm: tuple[int, int, str] | None = None,
    storage: str | None = None,
) -> Weights:
    """The same matrix in another format.

    Cost: O(stored) from a sparse format to "csr" or "block"; otherwise O(size of the matrix), in time and memory.

    Parameters
    ----------
    weights : any format, or a (n_pre, n_post) array
    to      : one of `FORMATS`
    block   : (r, c), for "block" only
    nm      : (n, m, axis), for "nm" only; without an axis it is "post"
    storage : one of `STORAGES`; None keeps that of `weights` exactly, int8 with its scales, and is float32 for an array

    Gated blocks are no matrix; see `GatedBlocks.from_weights` and `GatedBlocks.blocks`.

    Raises ValueError for an unknown format or storage and for options of another format, and as `from_dense` of the
    format and `stored_as` do; TypeError for gated blocks.
    """
    if isinstance(to, str) and to == GatedBlocks.name:
        raise ValueError("format: got 'gated', which needs a gate: GatedBlocks.from_weights(weights, ...)")
    if isinstance(weights, GatedBlocks):
        raise NotAMatrix(
            f"weights: got {weights!r}, which is no matrix; convert its `blocks`, the matrix without gates"
        )
    need_choice("format", to, FORMATS)
    if (block is None) == (to == "block"):
        raise ValueError(f"block: got {block} for format {to!r}; the block format needs one, the others take none")
    if (nm is None) == (to == "nm"):
        raise ValueError(f"nm: got {nm} for format {to!r}; the nm format needs (n, m, axis), the others take none")
    if storage is not None:
        check_storage(storage)
    if block is not None:
        block = need_pair("block", block, "two sizes >= 1 (presynaptic x postsynaptic)")
    if nm is not None and (not isinstance(nm, tuple | list) or len(nm) not in (2, 3)):
        raise ValueError(f"nm: got {nm!r}, need (n, m, axis) such as (2, 4, 'post'), or (n, m)")
    source = weights if isinstance(weights, Weights) else None
    sparse = None if isinstance(source, Dense) else source

    def dense() -> np.ndarray:
        return weights.to_dense() if isinstance(weights, Weights) else finite_matrix(weights)

    size = block if block is not None else (1, 1)
    makers: dict[str, Callable[[], Weights]] = {
        "dense": lambda: Dense.from_dense(dense()),
        "csr": lambda: CSR.from_dense(dense()) if sparse is None else CSR.from_weights(sparse),
        "block": lambda: (
            BlockCSR.from_dense(dense(), block=size) if sparse is None else BlockCSR.from_weights(sparse, block=size)
        ),
        "nm": lambda: NM.from_dense(dense(), *(nm or (1, 2, "post"))),
    }
    made, before = makers[to](), "float32" if source is None else source.storage
    if source is None or storage not in (None, before):
        return made.stored_as(storage or before)
    # Encoding the decoded weights with their old scales gives the same codes.
    return made if before == "float32" else made._encoded(before, source.scales)
