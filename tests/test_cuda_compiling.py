"""Every kernel of a GPU compiles with every libNVVM, and none is forgotten.

Kernels of layers, which have many variants, are compiled beside the other tests of their engine (`TESTED_ELSEWHERE`).
"""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace

import pytest

from eventrnn.cells import SURROGATES
from support.ptx import check_ptx, compiler

#: exact kernels: no operation is contracted or approximated
EXACT = {
    "look_up": lambda m: m.batched_products.look_up_kernel(),
    "tile_product": lambda m: m.row_tiles.tile_product_kernel(True),
    "choose_rows": lambda m: m.gated_row_choice.choose_rows_kernel(),
    "cells of baselines": lambda m: m.baselines._cells_kernel(),
}

OTHERS = {
    "log_events": lambda m: m.batched_products.log_events_kernel(),
    "count_events": lambda m: m.batched_products.count_events_kernel(),
    "count_pairs": lambda m: m.batched_products.count_pairs_kernel(),
    "dense_events": lambda m: m.input_checks.dense_events_kernel(),
    "symbols": lambda m: m.input_checks.symbols_kernel(),
    "finite": lambda m: m.input_checks.finite_kernel(),
    "carry_gates": lambda m: m.gated_row_choice.carry_gates_kernel(),
    "spread_rows": lambda m: m.row_tiles.spread_rows_kernel(),
    "densify": lambda m: m.tensor_core_cells.densify_kernel("bfloat16"),
    "round_rows": lambda m: m.tensor_core_cells.round_rows_kernel("bfloat16"),
    "cells, bfloat16": lambda m: m.tensor_core_cells.cells_kernel("bfloat16"),
    "drives": lambda m: m.tensor_core_inputs.drives_kernel("float16", 8, False),
    "tensor grid": lambda m: m.tensor_core_grid.tensor_grid_kernel("bfloat16", 2, 3, 4),
    "drives of rows": lambda m: m.tensor_core_inputs.drives_kernel("bfloat16", 2, True),
    "tensor cluster": lambda m: m.tensor_core_cluster.tensor_cluster_kernel("bfloat16", 3, 4, 2, 6, 2, 2),
    "tensor cluster of one block": lambda m: m.tensor_core_cluster.tensor_cluster_kernel(
        "float16", 1, 1, 1, 0, 0, 1, True
    ),
    "cells, tf32": lambda m: m.tensor_core_cells.cells_kernel("tf32"),
}

TRAINING = {
    "narrow": lambda m: m.threads.narrow_kernel("bfloat16"),
    "choose": lambda m: m.gated_blocks.choose_kernel("bfloat16"),
    "combine": lambda m: m.gated_blocks.combine_kernel(),
    "spread gates": lambda m: m.gated_blocks.spread_kernel("bfloat16"),
    "logit_gradients": lambda m: m.gated_blocks.logit_gradients_kernel("float32"),
    "count_choices": lambda m: m.gated_blocks.count_choices_kernel(),
    "count_products": lambda m: m.gated_blocks.count_products_kernel("tf32", SURROGATES["triangle"], 0.7, 1.0),
    "draw": lambda m: m.noise.draw_kernel(),
    "add_parts": lambda m: m.joined_sums.add_parts_kernel("float32"),
    "add_parts of counts": lambda m: m.joined_sums.add_parts_kernel("int64"),
    "drop_weights": lambda m: m.noise.drop_weights_kernel("bfloat16"),
    "forward": lambda m: m.cell_steps.forward_kernel("bfloat16"),
    "reset_gate": lambda m: m.cell_steps.reset_gate_kernel("tf32"),
    "paper_forward": lambda m: m.cell_steps.paper_forward_kernel("bfloat16"),
    "adjoint": lambda m: m.cell_steps.adjoint_kernel("bfloat16", False, SURROGATES["triangle"], 0.7, 1.0),
    "adjoint of the paper": lambda m: m.cell_steps.adjoint_kernel("float32", True, SURROGATES["gaussian"], 0.7, 1.0),
    "gru": lambda m: m.plain_steps.gru_kernel("bfloat16"),
    "gru_before": lambda m: m.plain_steps.gru_before_kernel("tf32"),
    "lstm": lambda m: m.plain_steps.lstm_kernel("bfloat16"),
    "gru_adjoint": lambda m: m.plain_steps.gru_adjoint_kernel("bfloat16"),
    "gru_before_adjoint": lambda m: m.plain_steps.gru_before_adjoint_kernel("float32"),
    "lstm_adjoint": lambda m: m.plain_steps.lstm_adjoint_kernel("bfloat16"),
    "reset_gate_adjoint": lambda m: m.cell_steps.reset_gate_adjoint_kernel("bfloat16"),
    "thresholds": lambda m: m.cell_steps.threshold_kernel(),
    "carry": lambda m: m.cell_steps.carry_kernel("bfloat16"),
    "inputs": lambda m: m.inputs.input_kernel("bfloat16"),
    "embedding_gradient": lambda m: m.inputs.embedding_gradient_kernel(),
    "outputs": lambda m: m.inputs.outputs_kernel(),
    "spread": lambda m: m.inputs.spread_kernel("bfloat16"),
    "cross_entropy": lambda m: m.loss.cross_entropy_kernel("bfloat16"),
    "column_sums": lambda m: m.sums.column_sums_kernel("bfloat16"),
    "finish_sums": lambda m: m.sums.finish_sums_kernel(),
    "count_units": lambda m: m.sums.count_units_kernel(SURROGATES["boxcar"], 0.7, 1.0),
    "count_inputs": lambda m: m.sums.count_inputs_kernel("bfloat16"),
    "operations": lambda m: m.sums.operations_kernel(),
    "rates": lambda m: m.sums.rate_kernel(),
    "penalties": lambda m: m.sums.penalties_kernel(SURROGATES["multi_gaussian"], 0.7, 1.0),
    "square_gradients": lambda m: m.updates.square_gradients_kernel(),
    "sum_spans": lambda m: m.updates.sum_spans_kernel(),
    "settle": lambda m: m.updates.settle_kernel(),
    "prune": lambda m: m.updates.prune_kernel("bfloat16"),
    "adam": lambda m: m.updates.update_kernel("adam", "bfloat16", False),
    "momentum, averaged": lambda m: m.updates.update_kernel("momentum", "float32", True),
    "rows": lambda m: m.tensors.rows_kernel("bfloat16"),
    "take": lambda m: m.tensors.take_kernel("bfloat16"),
    "give": lambda m: m.tensors.give_kernel(),
    "last_state": lambda m: m.tensors.last_state_kernel(),
}

TESTED_ELSEWHERE = {
    "cluster_kernel",
    "gated_layer_kernel",
    "gated_rows_kernel",
    "layers_kernel",
    "products_kernel",
    "single_kernel",
    "step_kernel",
}

INSTRUCTIONS = {
    "count_events": "red.relaxed.gpu.global.add.u64",
    "count_pairs": "red.relaxed.gpu.global.add.u64",
    "cells, bfloat16": "ex2.approx",
    "cells, tf32": "ex2.approx",
    "drives": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "tensor cluster": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
}


def modules_of(package: str) -> SimpleNamespace:
    """The modules of a package of kernels by name; as `baselines`, the kernel that a benchmark compares with."""
    names = [found.name for found in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    modules = {name: importlib.import_module(f"{package}.{name}") for name in names}
    return SimpleNamespace(**modules, baselines=importlib.import_module("eventrnn.bench.gpu_baselines"))


@pytest.mark.parametrize("name", EXACT | OTHERS)
def test_kernel_compiles(name):
    compiled = compiler()
    ptx = compiled((EXACT | OTHERS)[name](modules_of("eventrnn.cuda.kernels")), threads=256)
    assert ".entry" in ptx and ".local" not in ptx, "arrays in local memory are slow"
    assert INSTRUCTIONS.get(name, "") in ptx
    if name in EXACT:
        check_ptx(ptx)


@pytest.mark.parametrize("name", TRAINING)
def test_kernel_of_training_compiles(name):
    compiled = compiler()
    ptx = compiled(TRAINING[name](modules_of("eventrnn.cuda.training.kernels")), threads=256)
    assert ".entry" in ptx and ".local" not in ptx, "arrays in local memory are slow"


@pytest.mark.parametrize(
    ("package", "tables", "elsewhere"),
    [("eventrnn.cuda.kernels", EXACT | OTHERS, TESTED_ELSEWHERE), ("eventrnn.cuda.training.kernels", TRAINING, set())],
)
def test_every_kernel_is_compiled_by_a_test(package, tables, elsewhere):
    compiler()
    modules = modules_of(package)
    factories = {
        name
        for module in vars(modules).values()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.__module__ == module.__name__ and module.__name__.startswith(package)
    }
    # Making a kernel compiles nothing. Its qualified name begins with that of its factory.
    made = {make(modules)[0].__qualname__.partition(".")[0] for make in tables.values()}
    assert factories - made == elsewhere
