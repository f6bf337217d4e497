"""N:M weights: the stream of codes by hand and bit by bit, both axes, refused arguments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.testing import GROUPS, weights
from eventrnn.weights import CSR, NM, STORAGES, check_nm, convert
from support.counting import nm_places

shapes = st.tuples(st.integers(1, 70), st.integers(1, 70))
drawn = shapes.flatmap(lambda shape: weights(shape, formats=["nm"]))
axes = st.sampled_from(["post", "pre"])
groups = st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m), axes))


def n_m_mask(rng, shape, n, m, axis) -> np.ndarray:
    """A mask with any n of each m weights; fewer in a short last group."""
    lines = rng.random(shape if axis == "post" else shape[::-1])
    mask = np.zeros(lines.shape, bool)
    for line, row in enumerate(lines):
        for start in range(0, len(row), m):
            mask[line, start + np.argsort(row[start : start + m])[:n]] = True
    return mask if axis == "post" else mask.T


# --- by hand ------------------------------------------------------------------------------------------------


def test_2_of_4_along_post_by_hand():
    dense = np.array([[0, 1, 0, 2, 3, 0], [0, 0, 0, 4, 0, 0]], np.float32)
    matrix = NM.from_dense(dense, 2, 4)
    # Positions 1 3 | 0 1 (one of them padding) and 0 (padding) 3 | 0 1 (both padding), two bits each, lowest first.
    assert [format(byte, "08b") for byte in matrix.codes] == ["01001101", "01001100"]
    assert matrix.values.tolist() == [1, 2, 3, 0, 0, 4, 0, 0]
    assert matrix.indptr.tolist() == [0, 4, 8]
    assert matrix.stored_out().tolist() == [4, 4] and matrix.fan_out().tolist() == [3, 1]
    assert matrix.row_bytes().tolist() == [4 * 4 + 1, 4 * 4 + 1]
    assert matrix.kept().tolist() == [[False, True, False, True, True, True], [True, False, False, True, True, True]]
    assert "2:4 post" in repr(matrix)


def test_1_of_3_along_pre_by_hand():
    dense = np.array([[0, 5], [0, 0], [6, 0], [7, 0]], np.float32)
    matrix = NM.from_dense(dense, 1, 3, "pre")
    # Units 0-2: output 0 has unit 2, output 1 unit 0; unit 3 alone: both outputs. Two bits each.
    assert matrix.codes.tolist() == [0b00_00_00_10]
    assert matrix.values.tolist() == [5, 6, 7, 0]
    assert matrix.indptr.tolist() == [0, 1, 1, 2, 4]
    # The codes of the first group name the outputs of a unit, even if all of them are padding.
    assert matrix.row_bytes().tolist() == [5, 1, 5, 9]
    assert matrix.stored_as("int8").row_bytes().tolist() == [1 + 1 + 4, 1, 1 + 1 + 4, 2 + 1 + 4]
    assert matrix.to_csr().indices.tolist() == [1, 0, 0, 1]


def test_codes_of_5_bits_cross_bytes():
    # 31, 1, 30, 2 of rows of 32: 11111 10000 01111 01000, lowest bit first.
    dense = np.zeros((4, 32), np.float32)
    dense[range(4), [31, 1, 30, 2]] = 1
    matrix = NM.from_dense(dense, 1, 32)
    assert "".join(format(byte, "08b")[::-1] for byte in matrix.codes) == "111111000001111010000000"
    # Unit 0 lies in byte 0, units 1 and 3 in two bytes each, unit 2 in one.
    assert (matrix.row_bytes() - 4).tolist() == [1, 2, 1, 2]
    assert matrix.nbytes == 4 * 4 + 3


# --- properties ---------------------------------------------------------------------------------------------


@given(drawn)
def test_codes_hold_the_positions_of_the_weights(matrix):
    places = nm_places(matrix)
    assert np.argwhere(matrix.kept()).tolist() == [list(place) for place in places]
    assert np.array_equal(matrix.to_dense()[tuple(np.array(places, int).reshape(-1, 2).T)], matrix.floats())
    assert np.array_equal(matrix.indptr, np.searchsorted([unit for unit, _ in places], range(matrix.shape[0] + 1)))


@given(drawn)
def test_csr_of_the_same_entries(matrix):
    csr = matrix.to_csr()
    csr.check(full=True)
    assert isinstance(csr, CSR) and csr.storage == matrix.storage
    assert np.array_equal(csr.kept(), matrix.kept())
    assert csr.to_dense().tobytes() == matrix.to_dense().tobytes()
    assert np.array_equal(csr.stored_out(), matrix.stored_out())
    csr.values[...] = 1
    csr.indptr[...] = 0
    matrix.check(full=True)


@given(shapes, groups, st.integers(0, 2**32 - 1))
def test_any_mask_makes_the_round_trip(shape, group, seed):
    rng = np.random.default_rng(seed)
    mask = n_m_mask(rng, shape, *group)
    dense = np.where(mask, rng.uniform(1, 2, shape), 0).astype(np.float32)
    matrix = NM.from_dense(dense, *group)
    matrix.check(full=True)
    assert np.array_equal(matrix.kept(), mask)
    assert np.array_equal(matrix.values, dense[mask])
    assert matrix.to_dense().tobytes() == dense.tobytes()


@given(drawn)
def test_the_transpose_keeps_as_many_of_each_group(matrix):
    if matrix.storage == "int8":
        with pytest.raises(ValueError, match=r"int8 scales belong to presynaptic units; take stored_as\('float32'\)"):
            matrix.transposed()
        matrix = matrix.stored_as("float32")
    other = matrix.transposed()
    other.check(full=True)
    assert (other.n, other.m, other.storage) == (matrix.n, matrix.m, matrix.storage)
    assert {other.axis, matrix.axis} == {"post", "pre"}
    assert np.array_equal(other.kept(), matrix.kept().T)
    assert other.to_dense().tobytes() == np.ascontiguousarray(matrix.to_dense().T).tobytes()
    again = other.transposed()
    assert all(np.array_equal(x, matrix.arrays()[name]) for name, x in again.arrays().items())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 8), st.data())
def test_a_transposable_mask_converts_both_ways(rows, columns, m, data):
    # Sums of n shifted diagonals: n in each row and column of every m x m tile.
    n = data.draw(st.integers(1, m))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tiles = np.zeros((rows, columns, m, m), bool)
    for tile in tiles.reshape(-1, m, m):
        first, second, shifts = rng.permutation(m), rng.permutation(m), rng.permutation(m)[:n]
        tile[first[:, None], second[(np.arange(m)[:, None] + shifts) % m]] = True
    mask = tiles.transpose(0, 2, 1, 3).reshape(rows * m, columns * m)
    dense = np.where(mask, rng.uniform(1, 2, mask.shape), 0).astype(np.float32)
    post = NM.from_dense(dense, n, m, "post")
    pre = convert(post, "nm", nm=(n, m, "pre"))
    back = convert(pre, "nm", nm=(n, m, "post"))
    assert np.array_equal(pre.kept(), mask)
    assert all(np.array_equal(x, post.arrays()[name]) for name, x in back.arrays().items())


@given(drawn, st.sampled_from(STORAGES))
def test_bytes_are_values_scales_and_whole_bytes_of_codes(matrix, storage):
    matrix = matrix.stored_as(storage)
    bits = matrix.bits
    bit = {place: k * bits for k, place in enumerate(in_stream_order(matrix))}
    for j, got in enumerate(matrix.row_bytes()):
        needed = [
            at
            for (unit, _), at in bit.items()
            if unit == j or (matrix.axis == "pre" and unit // matrix.m == j // matrix.m)
        ]
        touched = {(at + k) // 8 for at in needed for k in range(bits)}
        stored = sum(unit == j for unit, _ in bit)
        scale = 4 if storage == "int8" and stored else 0
        assert got == matrix.values.itemsize * stored + len(touched) + scale


def in_stream_order(matrix) -> list[tuple[int, int]]:
    places = nm_places(matrix)
    return places if matrix.axis == "post" else sorted(places, key=lambda p: (p[0] // matrix.m, p[1], p[0]))


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_group_with_too_many_is_named():
    dense = np.zeros((5, 7), np.float32)
    dense[3, 4:7] = 1
    with pytest.raises(ValueError, match=r"group 1 \(outputs from 4\) of unit 3 has 3 non-zero weights, 2:4 keeps 2; "):
        NM.from_dense(dense, 2, 4)
    dense = dense[:, ::-1].T
    with pytest.raises(ValueError, match=r"group 0 \(units from 0\) of output 3 has 3 non-zero weights, 1:3 keeps 1"):
        NM.from_dense(dense, 1, 3, "pre")


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 1), (2, 33), (2.0, 4), (-1, 4)])
def test_n_and_m_have_their_range(n, m):
    with pytest.raises(ValueError, match=rf"nm: got {n}:{m}, need n of each m with 1 <= n <= m and 2 <= m <= 32"):
        check_nm(n, m, "post")


def test_the_axis_has_a_name():
    with pytest.raises(ValueError, match="nm axis: got 'both', need one of post, pre"):
        check_nm(2, 4, "both")


def three_of_five(**changes) -> NM:
    # 2 x 8: groups of 5 and 3 outputs, three bits an index, 3 kept of either: 36 bits in 5 bytes.
    dense = np.array([[1, 0, 2, 0, 3, 4, 5, 6], [0, 1, 0, 2, 3, 4, 5, 6]], np.float32)
    return replace(NM.from_dense(dense, 3, 5), **changes)


def with_codes(*codes) -> np.ndarray:
    stream = sum(code << 3 * k for k, code in enumerate(codes))
    return np.frombuffer(stream.to_bytes(5, "little"), np.uint8)


RIGHT = (0, 2, 4, 0, 1, 2, 1, 3, 4, 0, 1, 2)


def test_base_record_of_the_refusals_is_valid():
    three_of_five().check(full=True)
    assert np.array_equal(three_of_five().codes, with_codes(*RIGHT))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": np.zeros(5, np.int8)}, TypeError, "nm codes: got int8 with 1 dimensions, need uint8 with 1"),
        ({"codes": np.zeros((5, 1), np.uint8)}, TypeError, "nm codes: got uint8 with 2 dimensions"),
        ({"codes": np.zeros(4, np.uint8)}, ValueError, "got 12 values and 4 bytes of codes for 3:5 along post of 2x8"),
        ({"values": np.ones(11, np.float32)}, ValueError, "got 11 values and 5 bytes .* need 12 and 5"),
        ({"axis": "pre"}, ValueError, "along pre of 2x8, need 16 and 6"),
        ({"n": 6}, ValueError, "nm: got 6:5"),
        ({"values": np.ones(12, np.float16)}, TypeError, "got float16 with 1 dimensions"),
        ({"scales": np.ones(2, np.float32)}, TypeError, "got float32 for float32 values, need None"),
    ],
)
def test_nm_refused_by_the_cheap_check(changes, error, message):
    with pytest.raises(error, match=message):
        three_of_five(**changes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ((0, 2, 5, *RIGHT[3:]), r"index 5 in group 0 \(outputs from 0\) of unit 0 of 5 members"),
        ((*RIGHT[:-1], 3), r"index 3 in group 1 \(outputs from 5\) of unit 1 of 3 members"),
        ((2, 2, 4, *RIGHT[3:]), r"not strictly ascending in group 0 \(outputs from 0\) of unit 0"),
        ((*RIGHT[:-3], 1, 0, 2), r"not strictly ascending in group 1 \(outputs from 5\) of unit 1"),
        ((*RIGHT, 1), "set bits after the last index; need zeros"),
    ],
)
def test_codes_refused_by_the_full_check(codes, message):
    matrix = three_of_five(codes=with_codes(*codes))
    matrix.check()
    with pytest.raises(ValueError, match=message):
        matrix.check(full=True)


def test_values_refused_by_the_full_check():
    values = np.ones(12, np.float32)
    values[7] = np.nan
    with pytest.raises(ValueError, match=r"weight: got nan at position \(7,\)"):
        three_of_five(values=values).check(full=True)


def test_drawn_groups_span_every_width_of_an_index():
    bits = {NM.from_dense(np.zeros((1, 1)), *group).bits for group in GROUPS}
    assert bits == {1, 2, 3, 4, 5}
