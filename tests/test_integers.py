"""Products of int8 blocks in integers (`exact=False` on a CPU): the bits of their specification, and their error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrnn.backend import INTEGERS, SPECIFICATION
from eventrnn.bench import Case
from eventrnn.cpu.plan import FORMAT, KernelPolicy
from eventrnn.cpu.single_product import Product
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.reference import ReferenceBackend
from eventrnn.reference_products import CodedWeights, propagate, propagate_integers, rounding_step
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.weights import BlockCSR, convert
from support import tolerance
from support.conformance import assert_same, assert_same_state
from support.wide_blocks import in_blocks, wide_block_networks


def coded(weights: BlockCSR) -> CodedWeights:
    assert weights.scales is not None
    return CodedWeights(weights.codes(), weights.scales, weights.integer_bits())


@given(
    network=wide_block_networks(("int8",)),
    batch=st.integers(1, 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 9),
    cut=st.integers(0, 5),
)
def test_networks_have_the_bits_of_the_specification(network, batch, threads, seed, cut):
    """For any number of threads, split of a run and single step."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, batch, network.layers[0].inputs), dtype=np.float32)
    x *= rng.random(x.shape) < 0.4
    wanted = simulate(network, x, backend="reference", exact=False, record=RECORDABLE)
    got = simulate(network, x, exact=False, threads=threads, record=RECORDABLE)
    assert_same(got, wanted)
    assert set(got.paths.values()) == {INTEGERS} and got.paths == wanted.paths and not got.exact and not wanted.exact
    split, steps = (Simulator(network, batch=batch, exact=False, threads=threads) for _ in range(2))
    parts = [split.run(x[:cut]).output, split.run(x[cut:]).output]
    assert np.array_equal(np.concatenate(parts), wanted.output)
    assert np.array_equal(np.stack([steps.step(each) for each in x]), wanted.output)
    assert_same_state(split.state, wanted.state)
    assert_same_state(steps.state, wanted.state)


@example(inputs=65, units=1400, share=0.5, activity=0.3, size=0, seed=0)
@given(
    inputs=st.sampled_from((1, 63, 65, 512, 513, 1100)),
    units=st.integers(22, 60),
    share=st.sampled_from((0.05, 0.5, 1.0)),
    activity=st.sampled_from((0.0, 0.02, 0.3, 1.0)),
    size=st.sampled_from((-140, -120, 0, 100)),
    seed=st.integers(0, 9),
)
def test_products_have_the_bits_and_the_error_that_are_stated(inputs, units, share, activity, size, seed):
    """Also of subnormal values, of several chunks of events, of more than 64 strips, and of more than 1023 terms."""
    rng = np.random.default_rng(seed)
    weights = in_blocks(rng.standard_normal((inputs, 3 * units)) * (rng.random((inputs, 1)) < share))
    x = np.ldexp(rng.standard_normal((3, 1, inputs)), size).astype(np.float32)
    x *= rng.random(x.shape) < activity
    bias = rng.standard_normal(3 * units).astype(np.float32)
    integers = coded(weights)
    assert integers.bits == (13 if inputs == 1100 and share == 1 else 14)
    product = Product(weights, Events.from_dense(x), policy=KernelPolicy(exact=False), bias=bias)
    exact = Product(weights, Events.from_dense(x), bias=bias)
    assert INTEGERS in product.plan.kernel_by_matrix.values()
    for t, values in enumerate(x):
        got = product.result(t)
        assert np.array_equal(got, propagate_integers(integers, values, bias))
        bound = tolerance.integer_bound(integers.codes, integers.scales, values, bias, integers.bits)
        assert (np.abs(got.astype(np.float64) - exact.result(t)) <= bound).all()


def test_every_rounded_value_is_multiplied():
    """-2^14 to 2^14 times codes of both signs, beside a value that keeps the step at 1 and is a term itself."""
    weights = np.concatenate([np.full((1, 66), 127), np.arange(66)[None] * 3 - 98])
    weights[1, 0] = -127
    values = np.arange(-(1 << 14), (1 << 14) + 1)[:, None].clip(-16383.75, 16383.75)
    values = np.concatenate([np.full_like(values, 16383.75), values], axis=1).astype(np.float32)
    product = Product(in_blocks(weights), Events.from_dense(values[None]), policy=KernelPolicy(exact=False))
    whole = np.rint(values).astype(np.int64)
    assert np.array_equal(np.unique(whole[:, 1]), np.arange(-(1 << 14), (1 << 14) + 1))
    assert np.array_equal(product.result(0), (whole @ weights).astype(np.float32))


def test_the_largest_sums_fit():
    """All codes and all values are the largest, for one term fewer than a bit less and for as many."""
    for inputs, bits in ((1023, 14), (1024, 13)):
        weights = in_blocks(np.ones((inputs, 66)))
        values = np.full((1, inputs), np.nextafter(np.float32(2), np.float32(0)))
        assert coded(weights).bits == bits
        got = propagate_integers(coded(weights), values, np.zeros(66, np.float32))
        assert np.array_equal(
            got, Product(weights, Events.from_dense(values[None]), policy=KernelPolicy(False)).result(0)
        )
        exact = propagate(weights.to_dense(), values, np.zeros(66, np.float32))
        assert (np.abs(got / exact - 1) < 2.0**-bits).all()
    assert rounding_step(np.zeros(3, np.float32), 14) == np.float32(2.0**-126)


def test_what_is_not_multiplied_in_integers_stays_exact():
    rng = np.random.default_rng(1)
    network = Network.random([50], inputs=40, rng=rng, threshold=0.1)
    w_in, w_rec = (weights.to_dense() for weights in network.matrices().values())
    mixed = replace(
        network.layers[0], w_in=in_blocks(w_in), w_rec=convert(w_rec, "block", block=(1, 16), storage="int8")
    )
    mixed = replace(network, layers=(mixed,))
    x = rng.standard_normal((9, 2, 40), dtype=np.float32)
    got = simulate(mixed, x, exact=False, record=RECORDABLE)
    assert got.paths == {"layers.0.w_in": INTEGERS, "layers.0.w_rec": FORMAT}
    wanted = simulate(mixed, x, backend="reference", exact=False, record=RECORDABLE)
    assert_same(got, wanted)
    assert wanted.paths == {"layers.0.w_in": INTEGERS, "layers.0.w_rec": SPECIFICATION} and not wanted.exact
    assert simulate(mixed, x).exact
    # Operations are those of the stored blocks, whatever computes them.
    assert np.array_equal(got.input_fired.total, simulate(mixed, x).input_fired.total)


def test_a_single_symbol_is_not_rounded():
    rng = np.random.default_rng(2)
    network = replace(Network.random([50], inputs=30, readout=64, rng=rng, threshold=0.1), one_hot=True)
    network = network.with_matrices({k: in_blocks(3 * w.to_dense()) for k, w in network.matrices().items()})
    symbols = rng.integers(0, 30, (12, 2))
    got = simulate(network, symbols, exact=False, record=RECORDABLE)
    assert got.paths["layers.0.w_in"] == FORMAT and got.paths["layers.0.w_rec"] == got.paths["readout"] == INTEGERS
    assert_same(got, simulate(network, symbols, backend="reference", exact=False, record=RECORDABLE))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_network_without_such_blocks_is_refused(backend):
    network = Network.random([50], inputs=40, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"exact: got False, but only int8 weights in blocks of 64 columns"):
        Simulator(network, backend=backend, exact=False)
    with pytest.raises(ValueError, match=r"exact: got False for float64"):
        ReferenceBackend(np.float64, exact=False)
    with pytest.raises(ValueError, match=r"exact: got False, but a CPU multiplies only int8 .* got int8 .* of 4x8"):
        Case(exact=False, dtype="int8", block=(4, 8))
    assert Case(exact=False, dtype="int8").record()["exact"] is False


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_overflow_is_reported(backend):
    network = Network.random([50], inputs=40, rng=np.random.default_rng(0))
    network = network.with_matrices({k: in_blocks(w.to_dense() * 1e30) for k, w in network.matrices().items()})
    with pytest.raises(FloatingPointError, match="not finite"):
        simulate(network, np.full((2, 1, 40), 1e30, np.float32), backend=backend, exact=False)
