"""Blocks of 64 columns that are added output by output: their bits, and where the engine chooses them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.cpu.engine import CpuEngine
from eventrnn.cpu.kernels.strips import SELECTS
from eventrnn.cpu.plan import BY_STRIPS, FORMAT, KernelPolicy
from eventrnn.cpu.single_product import Product
from eventrnn.cpu.tables import STRIPS
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.reference_products import propagate
from eventrnn.simulation import RECORDABLE, simulate
from eventrnn.weights import STORAGES
from support.conformance import assert_same, bits, in_format
from support.layouts import STRIP, forced, kinds
from support.wide_blocks import in_blocks


class ByStrips(KernelPolicy):
    def select_kernel(self, weights, rows, activity):
        return BY_STRIPS


@given(
    inputs=st.sampled_from((1, 63, 65, 512, 513, 1100)),
    units=st.integers(22, 60),
    storage=st.sampled_from(STORAGES),
    share=st.sampled_from((0.05, 0.5, 1.0)),
    activity=st.sampled_from((0.0, 0.02, 0.3, 1.0)),
    seed=st.integers(0, 9),
)
def test_products_have_the_bits_of_the_specification(inputs, units, storage, share, activity, seed):
    """Also of ranges and groups of units that are full or not, and of strips without a segment."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((inputs, 3 * units)) * (rng.random((inputs, 1)) < share)
    dense[:, :64] *= rng.random() < 0.5
    weights = in_blocks(dense, storage=storage)
    x = rng.standard_normal((3, 1, inputs), dtype=np.float32)
    x *= rng.random(x.shape) < activity
    bias = rng.standard_normal(3 * units).astype(np.float32)
    product = Product(weights, Events.from_dense(x), policy=ByStrips(), bias=bias)
    assert STRIPS in {int(tile[0]) for tile in product.plan.column_tiles[0]}
    wanted = propagate(weights.to_dense(), x[:, 0], bias)
    for t in range(len(x)):
        assert np.array_equal(bits(product.result(t)[0]), bits(wanted[t]))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_whose_columns_are_whole_blocks_have_strips(threads):
    rng = np.random.default_rng(threads)
    network = in_format(Network.random([128], inputs=70, rng=rng, threshold=0.05), "block", (1, 64))
    x = rng.standard_normal((6, 2, 70), dtype=np.float32)
    with forced(STRIP):
        engine = CpuEngine(network, threads)
        engine.plan(6, 2)
        assert kinds(engine) == {STRIPS}
        got = simulate(network, x, threads=threads, record=RECORDABLE)
    assert set(got.paths.values()) == {BY_STRIPS} and got.exact
    assert_same(simulate(network, x, backend="reference", record=RECORDABLE), got)


@pytest.mark.skipif(not SELECTS, reason="this processor lists segments one by one, which takes longer")
def test_small_matrices_with_enough_terms_are_added_output_by_output():
    def chosen(units, columns, activity, block=(1, 64)):
        return KernelPolicy().select_kernel(in_blocks(np.ones((units, columns)), block, "float32"), 1, activity)

    # An output has `units` * activity terms, and needs 3.5 for each 512 units.
    assert chosen(64, 128, 0.1) == BY_STRIPS and chosen(64, 128, 0.05) == FORMAT
    assert chosen(600, 128, 0.02) == BY_STRIPS and chosen(600, 128, 0.01) == FORMAT
    # 512 KB are few enough.
    assert chosen(1024, 128, 0.1) == BY_STRIPS and chosen(1032, 128, 0.1) == FORMAT
    assert chosen(64, 128, 0.1, (1, 32)) == FORMAT
