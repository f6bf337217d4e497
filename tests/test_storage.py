"""Narrow storage: rounding by definition and against torch, extreme scales, and equal weights in every format."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrnn.network import Network
from eventrnn.simulation import simulate
from eventrnn.testing import weights
from eventrnn.training.evaluation import compare_storage, evaluate_text, with_storage
from eventrnn.weights import FORMATS, NM, STORAGES, BlockCSR, Dense, convert
from support import tolerance

shapes = st.tuples(st.integers(1, 12), st.integers(1, 40))
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = st.lists(floats, min_size=1, max_size=9).map(lambda row: np.array([row], np.float32))
LARGEST, SMALLEST = np.finfo(np.float32).max, np.float32(1e-45)
# The largest finite bfloat16, and the smallest float32 that would round to a larger one.
LARGEST_BFLOAT16 = np.uint32(0x7F7F0000).view(np.float32)
FIRST_TOO_LARGE = np.uint32(0x7F7F8000).view(np.float32)


def from_bits(*bits: int) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


def bfloat16(code: int) -> Fraction:
    """The value of a bfloat16 by definition: sign, 8 bits of exponent, 7 of fraction. Infinities count as finite."""
    sign, exponent, fraction = code >> 15, code >> 7 & 0xFF, code & 0x7F
    significand = fraction + (0x80 if exponent else 0)
    return (-1) ** sign * significand * Fraction(2) ** (max(exponent, 1) - 127 - 7)


# --- bfloat16 -----------------------------------------------------------------------------------------------


def test_bfloat16_by_hand():
    # Exact, just below a tie, ties to even down and up, just above, negative, zeros, subnormals, a carry into the
    # exponent, the largest.
    given_bits = (0x3F80_0000, 0x3F80_7FFF, 0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0xBF81_8000, 0, 0x8000_0000)
    given_bits += (0x0000_8000, 0x0001_8000, 0x0000_8001, 0x3FFF_FFFF, 0x7F7F_7FFF)
    expected = [0x3F80, 0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xBF82, 0, 0x8000, 0, 2, 1, 0x4000, 0x7F7F]
    stored = Dense(from_bits(*given_bits)[None]).stored_as("bfloat16")
    assert stored.values.dtype == np.uint16
    assert stored.values[0].tolist() == expected
    assert np.array_equal(stored.floats()[0].view(np.uint32), np.array(expected, np.uint32) << 16)


@given(rows)
@example(np.array([[SMALLEST, -SMALLEST, 1.1754944e-38, LARGEST_BFLOAT16]], np.float32))
def test_bfloat16_is_the_nearest_and_even_in_a_tie(row):
    row = row[:, np.abs(row[0]) < FIRST_TOO_LARGE]
    bits = Dense(row).stored_as("bfloat16").values[0]
    for value, code in zip(row[0], bits, strict=True):
        # Of the two neighbouring bfloat16, one has the upper bits of the number; the other is further from zero.
        below = int(value.view(np.uint32)) >> 16
        to_below, to_above = (abs(Fraction(float(value)) - bfloat16(near)) for near in (below, below + 1))
        if to_below == to_above:
            assert code == below + below % 2
        else:
            assert code == (below if to_below < to_above else below + 1)


@pytest.mark.parametrize("value", [FIRST_TOO_LARGE, -LARGEST])
def test_bfloat16_refuses_what_would_be_infinite(value):
    matrix = Dense(np.array([[1, 2], [LARGEST_BFLOAT16, value]], np.float32))
    with pytest.raises(
        ValueError, match=r"weight: got -?3\.\d+e\+38 at position \(1, 1\), which bfloat16 rounds to inf"
    ):
        matrix.stored_as("bfloat16")


@pytest.mark.torch
def test_bfloat16_against_torch():
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[:70_000] &= 0xFFFF_8000  # ties and exact values
    values = bits.view(np.float32)
    values = values[np.abs(values) < FIRST_TOO_LARGE]
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    ours = Dense(values[None]).stored_as("bfloat16")
    assert np.array_equal(ours.values[0].view(np.int16), theirs.view(torch.int16).numpy())
    assert ours.floats()[0].tobytes() == theirs.to(torch.float32).numpy().tobytes()


# --- int8 ---------------------------------------------------------------------------------------------------


def test_int8_by_hand():
    dense = np.array([[127, -127, 63.5, 0.5, 1.5, -0.4], [0, 0, 0, 0, 0, 0], [0, 0, -2.54, 1.27, 0.02, 0]], np.float32)
    stored = Dense(dense).stored_as("int8")
    # The scale of the first unit is 1; a half goes to the even code.
    assert stored.values.tolist() == [[127, -127, 64, 0, 2, 0], [0] * 6, [0, 0, -127, 64, 1, 0]]
    assert stored.scales.tolist() == [1, 1, np.float32(2.54) / np.float32(127)]
    assert stored.floats()[2, 3] == np.float32(64) * stored.scales[2]
    assert stored.fan_out().tolist() == [4, 0, 3]


@given(rows)
@example(np.array([[SMALLEST, 0]], np.float32))
@example(np.array([[190 * SMALLEST, 95 * SMALLEST, -SMALLEST]], np.float32))
@example(np.array([[127.5 * 1e-38, 1e-38, 1e-40]], np.float32))
@example(np.array([[LARGEST, -LARGEST, LARGEST / 2, 1]], np.float32))
@example(np.array([[np.nextafter(LARGEST, np.float32(0))]], np.float32))
def test_int8_is_within_half_a_scale_of_every_float32(row):
    stored = Dense(row).stored_as("int8")
    stored.check(full=True)
    assert (stored.scales > 0).all()
    assert np.abs(stored.values.astype(int)).max() <= 127
    assert (stored.values != 0).any() == (row != 0).any()
    error = np.abs(stored.floats().astype(np.float64) - row)
    assert (error <= tolerance.int8_error(stored.scales)[:, None]).all()
    # The code is the nearest, by the definition.
    for value, code in zip(row[0], stored.values[0], strict=True):
        exact = Fraction(float(value)) / Fraction(float(stored.scales[0]))
        assert abs(exact - int(code)) <= Fraction(1, 2) + abs(exact) * Fraction(tolerance.U64)


@given(shapes.flatmap(lambda shape: weights(shape, storages=["float32"])))
def test_scales_are_those_of_the_largest_weight(matrix):
    stored = matrix.stored_as("int8")
    most = np.abs(matrix.to_dense()).max(axis=1)
    assert np.array_equal(stored.scales, np.where(most == 0, np.float32(1), most / np.float32(127)))
    bound = tolerance.int8_error(stored.scales)[:, None]
    assert (np.abs(stored.to_dense().astype(np.float64) - matrix.to_dense()) <= bound).all()


@given(shapes.flatmap(lambda shape: weights(shape, storages=["float32", "int8"])), st.integers(2, 8))
def test_fewer_bits_use_fewer_codes_and_a_larger_scale(matrix, bits):
    stored, largest = matrix.stored_as("int8", bits=bits), {2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127}[bits]
    stored.check(full=True)
    assert np.array_equal(stored.kept(), matrix.kept())
    if bits == 8 and matrix.storage == "int8":
        assert stored is matrix
        return
    most = np.abs(matrix.to_dense()).max(axis=1)
    assert np.array_equal(stored.scales, np.where(most == 0, np.float32(1), most / np.float32(largest)))
    assert np.abs(stored.values.astype(int)).max(initial=0) == (largest if most.any() else 0)
    bound = tolerance.int8_error(stored.scales)[:, None]
    assert (np.abs(stored.to_dense().astype(np.float64) - matrix.to_dense()) <= bound).all()


@pytest.mark.parametrize(
    ("storage", "bits", "words"),
    [
        ("int8", 1, "bits: got 1, need a whole number 2 to 8"),
        ("int8", 9, "bits: got 9, need a whole number 2 to 8"),
        ("int8", 6.0, "bits: got 6.0, need a whole number 2 to 8"),
        ("bfloat16", 7, "bits: got 7 for bfloat16, but only int8 has codes"),
        ("float32", 7, "bits: got 7 for float32, but only int8 has codes"),
    ],
)
def test_bits_that_a_storage_does_not_have_are_refused(storage, bits, words):
    with pytest.raises(ValueError, match=words):
        Dense(np.ones((1, 1), np.float32)).stored_as(storage, bits=bits)
    network = Network.random([2], rng=np.random.default_rng(0), symbols=3, embedding=2, readout=3)
    with pytest.raises(ValueError, match=words):
        network.with_rounded_embedding(storage, bits=bits)


# --- every format -------------------------------------------------------------------------------------------


@given(shapes.flatmap(weights), st.sampled_from(STORAGES))
def test_storing_keeps_the_pattern(matrix, storage):
    before = {name: array.copy() for name, array in matrix.arrays().items()}
    stored = matrix.stored_as(storage)
    stored.check(full=True)
    assert stored.storage == storage
    assert type(stored) is type(matrix) and stored.options() == matrix.options()
    assert np.array_equal(stored.kept(), matrix.kept())
    assert np.array_equal(stored.stored_out(), matrix.stored_out())
    assert stored.floats().dtype == np.float32 and stored.floats().shape == stored.values.shape
    assert (stored.scales is not None) == (storage == "int8")
    assert all(np.array_equal(array, before[name]) for name, array in matrix.arrays().items())
    assert (stored is matrix) == (storage == matrix.storage)
    # Widening is exact, and narrowing the result again is too.
    wide = stored.stored_as("float32")
    assert wide.to_dense().tobytes() == stored.to_dense().tobytes()
    if storage == "bfloat16":
        assert np.array_equal(wide.stored_as(storage).values, stored.values)


@given(shapes, st.sampled_from(STORAGES[1:]), st.integers(0, 2**32 - 1), st.data())
def test_one_matrix_narrows_to_the_same_weights_in_every_format(shape, storage, seed, data):
    rng = np.random.default_rng(seed)
    dense = (rng.standard_normal(shape) * (rng.random(shape) < 0.5)).astype(np.float32)
    block = (data.draw(st.integers(1, shape[0])), data.draw(st.integers(1, shape[1])))
    m, axis = data.draw(st.integers(2, 32)), data.draw(st.sampled_from(["post", "pre"]))
    expected = Dense(dense).stored_as(storage).to_dense()
    for name, options in {"csr": {}, "block": {"block": block}, "nm": {"nm": (m, m, axis)}}.items():
        narrow = convert(dense, name, storage=storage, **options)
        assert np.array_equal(narrow.to_dense(), expected)
        assert np.array_equal(narrow.fan_out(), np.count_nonzero(expected, axis=1))
        # Converting to another format with the same storage keeps codes and scales.
        odd = (
            narrow
            if narrow.scales is None
            else replace(narrow, scales=rng.uniform(0.1, 9, shape[0]).astype(np.float32))
        )
        for other, its in {"dense": {}, "csr": {}, "block": {"block": block}}.items():
            again = convert(odd, other, **its)
            assert again.storage == storage
            assert np.array_equal(again.to_dense(), odd.to_dense())
            assert np.array_equal(convert(odd, other, storage="float32", **its).to_dense(), odd.to_dense())


def test_row_bytes_of_narrow_storage():
    dense = np.array([[1, 0, 2, 3], [0, 0, 0, 0], [0, 4, 0, 0]], np.float32)
    expected = {
        "dense": {"float32": [16, 16, 16], "bfloat16": [8, 8, 8], "int8": [8, 8, 8]},
        "csr": {"float32": [24, 0, 8], "bfloat16": [18, 0, 6], "int8": [19, 0, 9]},
        "block": {"float32": [24, 0, 12], "bfloat16": [16, 0, 8], "int8": [16, 0, 10]},
        "nm": {"float32": [17, 17, 17], "bfloat16": [9, 9, 9], "int8": [9, 9, 9]},
    }
    options = {"block": {"block": (1, 2)}, "nm": {"nm": (4, 4, "post")}}
    for name in FORMATS:
        for storage in STORAGES:
            matrix = convert(dense, name, storage=storage, **options.get(name, {}))
            assert matrix.row_bytes().tolist() == expected[name][storage], (name, storage)


def test_scales_of_blocks_belong_to_units():
    # 3 units in blocks of 2 x 2: the padding of the second row of blocks has no scale of its own.
    dense = np.array([[127, 1, 0], [254, 2, 0], [0, 0, 508]], np.float32)
    matrix = BlockCSR.from_dense(dense, block=(2, 2)).stored_as("int8")
    assert matrix.scales.tolist() == [1, 2, 4]
    assert matrix.values.tolist() == [127, 1, 127, 1, 127, 0, 0, 0]
    assert np.array_equal(matrix.to_dense(), dense)


# --- refusals -----------------------------------------------------------------------------------------------

ONES = np.ones((2, 3), np.int8)


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (ONES, None, "weight scales: got None for int8 values, need one float32 per presynaptic unit"),
        (ONES.astype(np.float32), np.ones(2, np.float32), "got float32 for float32 values, need None"),
        (ONES.astype(np.uint16), np.ones(2, np.float32), "got float32 for bfloat16 values, need None"),
        (ONES, np.ones(3, np.float32), r"got float32 of shape \(3,\), need float32 of shape \(2,\)"),
        (ONES, np.ones(2), r"got float64 of shape \(2,\), need float32"),
        (ONES.astype(np.uint8), None, r"got uint8 with 2 dimensions, need float32, uint16 \(bfloat16\) or int8"),
        (ONES[0], np.ones(1, np.float32), "got int8 with 1 dimensions, need int8 with 2"),
    ],
)
def test_storage_refused_by_the_cheap_check(values, scales, message):
    with pytest.raises(TypeError, match=message):
        Dense(values, scales)


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (ONES, [1, 0], r"weight scale: got 0\.0 for unit 1, need > 0"),
        (ONES, [-2, 1], r"weight scale: got -2\.0 for unit 0"),
        (ONES, [1, np.nan], r"weight scale: got nan at position \(1,\)"),
        (ONES * 100, [1, LARGEST], r"weight: got inf at position \(1, 0\)"),
        (ONES * -128, [1, 1], r"weight: got code -128 at position \(0, 0\), need -127 to 127"),
        (ONES.astype(np.uint16) * 0x7F80, None, r"weight: got inf at position \(0, 0\)"),
        (ONES.astype(np.uint16) * 0x7FC0, None, r"weight: got nan at position \(0, 0\)"),
    ],
)
def test_storage_refused_by_the_full_check(values, scales, message):
    matrix = Dense(values, None if scales is None else np.array(scales, np.float32))
    matrix.check()
    with pytest.raises(ValueError, match=message):
        matrix.check(full=True)


def test_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="storage: got 'float16', need one of float32, bfloat16, int8"):
        Dense(np.ones((1, 1), np.float32)).stored_as("float16")
    with pytest.raises(ValueError, match=r"weight: got inf at position \(0, 1\)"):
        Dense(np.array([[1, np.inf]], np.float32)).stored_as("int8")


# --- networks -----------------------------------------------------------------------------------------------


def _text_network(**options) -> Network:
    return Network.random([9, 7], symbols=6, embedding=5, rng=np.random.default_rng(0), threshold=0.1, **options)


def test_reading_with_narrow_weights():
    network = _text_network(readout=6)
    symbols = np.random.default_rng(1).integers(0, 6, 300)
    stages = []
    told = compare_storage(
        network, symbols, "int8", report=lambda stage, done, total: stages.append((stage, done, total))
    )
    assert stages == [("reading with int8", 299, 299), ("reading with float32", 299, 299)]
    assert told["bits_per_symbol"] == evaluate_text(with_storage(network, "int8"), symbols)["bits_per_symbol"]
    assert told["bits_per_symbol_float32"] == evaluate_text(network, symbols)["bits_per_symbol"]
    assert told["bits_per_symbol_added"] == told["bits_per_symbol"] - told["bits_per_symbol_float32"] != 0
    assert told["weight_bytes"] < told["weight_bytes_float32"] == sum(4 * w.stored for w in network.matrices().values())


def test_a_tied_readout_stays_the_embedding():
    network = Network.random([5], symbols=6, embedding=5, tied=True, rng=np.random.default_rng(0))
    narrow = with_storage(network, "bfloat16").matrices()
    assert {name: w.storage for name, w in narrow.items()} == {
        "layers.0.w_in": "bfloat16",
        "layers.0.w_rec": "bfloat16",
        "readout": "float32",
    }


def test_narrow_weights_are_not_narrowed_again():
    network = _text_network(readout=6)
    for storage in ("float32", "int4"):
        with pytest.raises(ValueError, match=f"storage: got '{storage}', need one of bfloat16, int8"):
            with_storage(network, storage)
    with pytest.raises(ValueError, match="storage: the weights are stored as int8 already; read them as they are"):
        with_storage(with_storage(network, "int8"), "bfloat16")


def test_network_reports_decoded_weights():
    network = with_storage(_text_network(readout=6), "int8")
    symbols = np.random.default_rng(1).integers(0, 6, (40, 2))
    twin = network.dense()
    assert all(w.storage == "float32" for w in twin.matrices().values())
    for backend in ("cpu", "reference"):
        assert np.array_equal(simulate(network, symbols, backend=backend).output, simulate(twin, symbols).output)
    readout = replace(network.readout, weights=Dense(np.full((7, 6), 0x7F80, np.uint16)))
    with pytest.raises(ValueError, match=r"readout: got inf at position \(0, 0\)"):
        replace(network, readout=readout)
    groups = NM.from_dense(network.layers[1].w_rec.to_dense(), 4, 4, "pre")
    again = network.with_matrices({"layers.1.w_rec": groups})
    assert np.array_equal(simulate(again, symbols).output, simulate(twin, symbols).output)
