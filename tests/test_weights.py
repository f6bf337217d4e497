"""Weight formats: round trips, counts, checks, scipy. N:M and narrow storage have files of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import example, given
from hypothesis import strategies as st

from eventrnn.testing import masks, weights
from eventrnn.weights import CSR, FORMATS, STORAGES, BlockCSR, Dense, Weights, check_block, convert

shapes = st.tuples(st.integers(1, 20), st.integers(1, 70))
drawn = shapes.flatmap(weights)
dense_matrices = drawn.map(lambda w: w.to_dense())
blocks = st.tuples(st.integers(1, 20), st.integers(1, 70))


def options(name: str, block=(1, 1), m: int = 2) -> dict:
    """Options of `convert` for a format, with which it can hold every matrix: N:M with n = m."""
    return {"block": {"block": block}, "nm": {"nm": (m, m, "post")}}.get(name, {})


def within(block, shape) -> tuple[int, int]:
    """The block, with no side longer than that of the matrix."""
    return min(block[0], shape[0]), min(block[1], shape[1])


@given(drawn)
def test_drawn_matrices_are_valid_and_counted(matrix):
    matrix.check(full=True)
    dense = matrix.to_dense()
    assert dense.shape == matrix.shape
    assert dense.dtype == np.float32
    assert dense.flags.c_contiguous
    assert np.array_equal(matrix.fan_out(), np.count_nonzero(dense, axis=1))
    assert matrix.nnz == np.count_nonzero(dense)
    assert matrix.stored == matrix.stored_out().sum() >= matrix.nnz
    assert matrix.fan_out().dtype == matrix.stored_out().dtype == np.int64
    assert (matrix.row_bytes() >= matrix.values.itemsize * matrix.stored_out()).all()
    assert matrix.nbytes == sum(array.nbytes for array in matrix.arrays().values()) >= matrix.values.nbytes


@given(drawn, st.sampled_from(sorted(FORMATS)), blocks, st.integers(2, 32))
def test_converting_keeps_every_weight_and_the_storage(matrix, name, block, m):
    other = convert(matrix, name, **options(name, within(block, matrix.shape), m))
    other.check(full=True)
    assert other.name == name
    assert other.storage == matrix.storage
    assert np.array_equal(other.scales, matrix.scales) if matrix.storage == "int8" else other.scales is None
    assert np.array_equal(other.to_dense(), matrix.to_dense())
    assert np.array_equal(other.fan_out(), matrix.fan_out())


@given(dense_matrices, blocks)
@example(np.zeros((3, 5), np.float32), (2, 2))
@example(np.ones((5, 7), np.float32), (5, 7))
@example(np.ones((5, 70), np.float32), (1, 64))
@example(np.ones((5, 7), np.float32), (3, 1))
def test_stored_counts_whole_blocks_and_padding(dense, block):
    r, c = block = within(block, dense.shape)
    matrix = BlockCSR.from_dense(dense, block=block)
    matrix.check(full=True)
    expected = np.zeros(dense.shape[0], np.int64)
    for j in range(dense.shape[0]):
        rows = dense[j // r * r : j // r * r + r]
        expected[j] = c * sum(rows[:, k : k + c].any() for k in range(0, dense.shape[1], c))
    assert np.array_equal(matrix.stored_out(), expected)
    assert np.array_equal(matrix.row_bytes(), expected * 4 + expected // c * 4)
    # Padding is stored as zeros.
    assert len(matrix.values) == len(matrix.indices) * r * c >= matrix.nnz
    assert np.array_equal(np.sort(matrix.values[matrix.values != 0]), np.sort(dense[dense != 0]))


@given(dense_matrices)
def test_layout_of_the_values(dense):
    # Unit k r + s of block row k finds what it sends in one piece.
    r, c = min(2, dense.shape[0]), min(3, dense.shape[1])
    matrix = BlockCSR.from_dense(dense, block=(r, c))
    padded = np.zeros((-(-dense.shape[0] // r) * r, -(-dense.shape[1] // c) * c), np.float32)
    padded[: dense.shape[0], : dense.shape[1]] = dense
    for j in range(dense.shape[0]):
        k, s = divmod(j, r)
        a, b = matrix.indptr[k : k + 2]
        start = (a * r + s * (b - a)) * c
        sent = matrix.values[start : start + (b - a) * c].reshape(b - a, c)
        for row, column in zip(sent, matrix.indices[a:b], strict=True):
            assert np.array_equal(row, padded[j, column * c : (column + 1) * c])


@given(dense_matrices)
def test_csr_in_and_out_of_scipy(dense):
    for fmt in ("csr", "coo", "csc"):
        matrix = CSR.from_scipy(sp.coo_array(dense).asformat(fmt))
        matrix.check(full=True)
        assert np.array_equal(matrix.to_dense(), dense)
    assert np.array_equal(CSR.from_dense(dense).to_scipy().toarray(), dense)


def test_csr_from_scipy_sorts_and_sums():
    loose = sp.csr_array((np.array([1.0, 2, 3]), np.array([2, 0, 2]), np.array([0, 3])), shape=(1, 3))
    matrix = CSR.from_scipy(loose)
    matrix.check(full=True)
    assert matrix.to_dense().tolist() == [[2, 0, 4]]
    assert loose.indices.tolist() == [2, 0, 2]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 20), st.data())
def test_bsr_in_and_out_of_scipy(rows, columns, r, c, data):
    dense = data.draw(weights((rows * r, columns * c))).to_dense()
    matrix = BlockCSR.from_dense(dense, block=(r, c))
    bsr = matrix.to_scipy()
    assert bsr.format == "bsr"
    assert np.array_equal(bsr.toarray(), dense)
    again = BlockCSR.from_scipy(bsr)
    again.check(full=True)
    assert again.block == (r, c)
    assert np.array_equal(again.to_dense(), dense)
    assert np.array_equal(BlockCSR.from_scipy(sp.csr_array(dense).tobsr((r, c))).to_dense(), dense)


def test_scipy_refusals():
    with pytest.raises(TypeError, match=r"got a scipy csr matrix, need bsr; call \.tobsr\(blocksize\)"):
        BlockCSR.from_scipy(sp.csr_array(np.eye(4)))
    with pytest.raises(ValueError, match=r"shape \(3, 4\) is no multiple of block \(2, 2\)"):
        BlockCSR.from_dense(np.ones((3, 4)), block=(2, 2)).to_scipy()


@given(dense_matrices)
def test_conversions_copy(dense):
    before = dense.copy()
    for name in FORMATS:
        matrix = convert(dense, name, **options(name))
        matrix.values[...] = 9
        assert np.array_equal(dense, before)
    matrix = Dense.from_dense(dense)
    matrix.to_dense()[...] = 9
    assert np.array_equal(matrix.values, before)


@given(shapes, blocks, st.data())
def test_masks_are_constant_on_blocks(shape, block, data):
    block = within(block, shape)
    mask = data.draw(masks(shape, block))
    assert mask.shape == shape
    assert mask.dtype == bool
    for j in range(0, shape[0], block[0]):
        for i in range(0, shape[1], block[1]):
            tile = mask[j : j + block[0], i : i + block[1]]
            assert tile.all() or not tile.any()


# --- checks -------------------------------------------------------------------------------------------------


def csr(**changes) -> CSR:
    arrays = {
        "indptr": np.array([0, 2, 3]),
        "indices": np.array([0, 2, 1], np.int32),
        "values": np.array([1, 2, 3], np.float32),
        "shape": (2, 3),
    }
    return CSR(**(arrays | changes))


def block_csr(**changes) -> BlockCSR:
    # 3 x 5 in blocks of 2 x 2: rows 0-1 have block columns 0 and 2, row 2 has column 1.
    dense = np.array([[1, 2, 0, 0, 3], [4, 5, 0, 0, 6], [0, 0, 7, 8, 0]], np.float32)
    return replace(BlockCSR.from_dense(dense, block=(2, 2)), **changes)


def test_records_of_the_refusals_are_valid():
    csr().check(full=True)
    block_csr().check(full=True)
    assert csr().to_dense().tolist() == [[1, 0, 2], [0, 3, 0]]
    assert block_csr().values.tolist() == [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 0, 0]


@pytest.mark.parametrize(
    ("make", "changes", "error", "message"),
    [
        (csr, {"values": np.ones(3)}, TypeError, "weight values: got float64 with 1 dimensions, need float32"),
        (csr, {"values": np.ones((3, 1), np.float32)}, TypeError, "float32 with 2 dimensions, need float32 with 1"),
        (csr, {"indptr": np.array([0, 2, 3], np.int32)}, TypeError, "got indptr int32, indices int32"),
        (csr, {"indices": np.array([0, 2, 1])}, TypeError, "indices int64; need int64 and int32"),
        (csr, {"indptr": np.array([0, 3])}, ValueError, r"weight indptr: got shape \(2,\), need \(3,\)"),
        (csr, {"indptr": np.array([0, 2, 2])}, ValueError, "runs from 0 to 2 over 3 indices and 3 stored"),
        (csr, {"indptr": np.array([1, 2, 3])}, ValueError, "runs from 1 to 3"),
        (csr, {"indices": np.array([0, 2], np.int32)}, ValueError, "over 2 indices and 3 stored"),
        (block_csr, {"values": np.ones(11, np.float32)}, ValueError, "got 11 values, need a multiple of 2 x 2"),
        (block_csr, {"block": (4, 1)}, ValueError, "block: 4x1 is larger than the matrix 3x5; choose a smaller one"),
        (block_csr, {"indptr": np.array([0, 3])}, ValueError, r"weight indptr: got shape \(2,\), need \(3,\)"),
        (block_csr, {"values": np.ones(8, np.float32)}, ValueError, "over 3 indices and 2 stored"),
    ],
)
def test_weights_refused_by_the_cheap_check(make, changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (csr, {"indptr": np.array([0, 4, 3])}, "indptr: decreases"),
        (csr, {"indices": np.array([0, 3, 1], np.int32)}, r"indices: outside 0\.\.2"),
        (csr, {"indices": np.array([0, -1, 1], np.int32)}, r"indices: outside 0\.\.2"),
        (csr, {"indices": np.array([2, 2, 1], np.int32)}, "not strictly ascending within a presynaptic unit"),
        (csr, {"values": np.array([1, np.inf, 1], np.float32)}, r"weight: got inf at position \(1,\)"),
        (block_csr, {"indices": np.array([0, 3, 1], np.int32)}, r"indices: outside 0\.\.2"),
        (block_csr, {"indices": np.array([2, 0, 1], np.int32)}, "not strictly ascending"),
    ],
)
def test_weights_refused_by_the_full_check(make, changes, message):
    matrix = make(**changes)
    matrix.check()
    with pytest.raises(ValueError, match=message):
        matrix.check(full=True)


@pytest.mark.parametrize("at", [3, 7, 10, 11])
def test_padding_must_be_zero(at):
    values = block_csr().values.copy()
    values[at] = 1
    with pytest.raises(ValueError, match=r"non-zero padding beyond the shape \(3, 5\)"):
        block_csr(values=values).check(full=True)
    # The padding is outside the matrix, so that only this check reads it.
    assert np.array_equal(block_csr(values=values).to_dense(), block_csr().to_dense())


def test_dense_refusals():
    with pytest.raises(TypeError, match=r"got float64 with 2 dimensions, need float32, uint16 \(bfloat16\) or int8"):
        Dense(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"not C-contiguous; pass numpy\.ascontiguousarray"):
        Dense(np.ones((2, 3), np.float32).T)
    with pytest.raises(ValueError, match=r"weight: got nan at position \(1, 0\)"):
        Dense(np.array([[1], [np.nan]], np.float32)).check(full=True)
    with pytest.raises(ValueError, match=r"weights: got float64 \(3,\), need numbers \(n_pre, n_post\)"):
        Dense.from_dense(np.ones(3))


@pytest.mark.parametrize("block", [(0, 1), (1, -1), (1,), (1, 2, 3)])
def test_blocks_have_two_positive_sizes(block):
    with pytest.raises(ValueError, match="need two sizes >= 1"):
        check_block(block, (4, 4))


def test_convert_refusals():
    with pytest.raises(ValueError, match="format: got 'coo', need one of dense, csr, block, nm"):
        convert(np.eye(3), "coo")
    with pytest.raises(ValueError, match="block: got None for format 'block'"):
        convert(np.eye(3), "block")
    with pytest.raises(ValueError, match=r"block: got \(1, 2\) for format 'csr'"):
        convert(np.eye(3), "csr", block=(1, 2))
    with pytest.raises(ValueError, match="nm: got None for format 'nm'"):
        convert(np.eye(3), "nm")
    with pytest.raises(ValueError, match=r"nm: got \(1, 2, 'post'\) for format 'dense'; the nm format needs"):
        convert(np.eye(3), "dense", nm=(1, 2, "post"))
    with pytest.raises(ValueError, match="storage: got 'float16', need one of float32, bfloat16, int8"):
        convert(np.eye(3), "csr", storage="float16")
    with pytest.raises(ValueError, match="block: 1x4 is larger than the matrix 3x3"):
        convert(np.eye(3), "block", block=(1, 4))


@pytest.mark.parametrize("name", FORMATS)
def test_records_are_frozen(name):
    with pytest.raises(AttributeError):
        convert(np.eye(4), name, **options(name)).values = np.zeros(1, np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("storage", STORAGES)
def test_arrays_and_options_rebuild_the_record(name, storage):
    matrix = convert(np.eye(5), name, **options(name, m=3), storage=storage)
    again: Weights = type(matrix)(**matrix.arrays(), **matrix.options())
    again.check(full=True)
    assert again.storage == storage
    assert np.array_equal(again.to_dense(), matrix.to_dense())
    assert matrix.nbytes == sum(array.nbytes for array in matrix.arrays().values())
    assert (storage in repr(matrix)) == (storage != "float32")
