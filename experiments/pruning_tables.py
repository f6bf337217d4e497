"""Tables of docs/results.md about pruning while training, step times of blocks, and masks; see `tables.py`."""

from itertools import product
from statistics import mean, stdev

from pruning_claims import SIZES, STORAGES, best_dense, block_of, by_seed, perplexity, size_of, swept, task, units
from result_lines import last, number, read, table, times

from eventrnn.pruning.methods import LAST_CHANGE

CUDNN = ("cudnn float32", "cudnn tf32", "cudnn tf32 padded", "cudnn float16 padded")
CELLS = {"gru": "GRU, all units send", "egru": "EGRU, 10 % send"}


def swept_models() -> str:
    """Networks of two layers on the Penn Treebank with its whole vocabulary, from random weights, pruned while they are
    trained (`python experiments/pruning_sweep.py`). Perplexity of the validation text, and how much worse it is than
    that of the best dense network after as many epochs. `threshold`: block pruning of Narang et al.; `lasso`: with
    group lasso; `column`: the blocks of largest norm, as many in each column of blocks. `converted`: pruned after the
    training, without further training. Weights and files are those of the layers, without the embedding of 5.1 million
    values, which is the read-out too and is not pruned; files are compared with the dense one in float32.
    """
    dense = best_dense(swept())
    whole = {size[:-1]: lines[0]["file_bytes"]["float32"] for size, lines in dense.items()}
    rows = []
    for lines in sorted(by_seed(swept()), key=lambda lines: (*size_of(lines[0])[:2], lines[0]["training.epochs"])):
        first, read_at = lines[0], [line["perplexity_valid"] for line in lines]
        size = size_of(first)
        beside, whole_bytes = dense.get(size), whole.get(size[:-1])
        sizes = [times(whole_bytes / first["file_bytes"][storage]) for storage in STORAGES] if whole_bytes else []
        spread = f" ± {stdev(read_at):.2f}" if len(read_at) > 1 else ""
        cells = [
            f"{first['model.cell'].upper()} of {units(first)}{', characters' * (task(first) == 'character')}",
            method(first),
            first["pruning.nm"] or block_of(first),
            f"{first['density_of_layers']:.1%}",
            f"{first['training.epochs']}",
            f"{first['training.regularisers.dropconnect']:g}",
            otherwise(first),
            f"{mean(read_at):.2f}{spread}",
            f"{mean(read_at) / perplexity(beside) - 1:+.1%}" if beside else "",
            " / ".join(sizes),
        ]
        rows.append((cells, lines))
    columns = ("network", "method", "blocks or masks", "weights left", "epochs", "DropConnect")
    columns = (*columns, "otherwise", "perplexity")
    return table((*columns, "beside dense", "file smaller, times: float32 / bfloat16 / int8"), rows) if rows else ""


def otherwise(line: dict) -> str:
    """The settings in which the training of a line differs from the usual one, in words."""
    usual = {
        "training.learning_rate": 0.0015,
        "training.schedule.constant": 0.5,
        "training.weight_decay": 0.1,
        "training.regularisers.dropout_input": 0.4,
        "training.regularisers.dropout_words": 0.1,
        "training.regularisers.dropout_between": 0.25,
    }
    if task(line) == "character":
        usual = {}
    found = [
        f"{name.split('.')[-1].replace('_', ' ')} {line[name]:g}"
        for name, value in usual.items()
        if line.get(name) not in (None, value)
    ]
    since, until = line["pruning.since"], line.get("pruning.until") or LAST_CHANGE
    if line["pruning.sparsity"] and (since, until) != (0.3, 0.7):
        found.append(f"masks change from {since:g} to {until:g}")
    if line["pruning.nm"] and line["pruning.since"] not in (None, 0.5):
        found.append(f"masks drawn at {line['pruning.since']:g}")
    return ", ".join(found)


def method(line: dict) -> str:
    """The method of a line in words."""
    if line["converted"]:
        begun = {"half": "network with half of its weights"}.get(line["converted"], f"{line['converted']} network")
        way = {"adaprune": "AdaPrune", "magnitude": "the largest kept"}[line["pruning.method"]]
        return f"{begun}, converted: {way}"
    named = line["pruning.scope"] or {"magnitude": "magnitude"}.get(line["pruning.method"], line["pruning.method"])
    return named or "dense"


def block_steps() -> str:
    """Microseconds per step of one layer of 1024 units and inputs, for the whole batch, with 90 % of the weights pruned
    (`python experiments/block_steps.py`), all variants in turn in one run; on a CPU one thread. PyTorch: its GRU with
    the weights of the dense layer. Where all units of many samples send, single weights lose to the dense layer and
    blocks gain little: at batch 64 a tenth of the products takes two thirds of the time or more. The cause was not
    examined. The machine did other work as well.
    """
    return steps_of("cpu", {"PyTorch": ("torch",)})


def block_steps_gpu() -> str:
    """The same on a GPU that did nothing else (`python experiments/block_steps.py --backend cuda`), exact float32, in
    runs of 20 steps. Beside them cuDNN's GRU of the dense weights, in float32 and in its fastest type; in so short a
    run the start of a call is a large part of its time. With one stream the dense layer is as fast as blocks.
    """
    return steps_of("cuda", {"cuDNN, float32": ("cudnn float32",), "cuDNN, fastest": CUDNN})


def steps_of(backend: str, others: dict[str, tuple[str, ...]]) -> str:
    """The table of a backend. others : name of a further column -> the variants of which it has the fastest"""
    lines = [line for line in read("block_steps", timed=False) if line["backend"] == backend]
    lines = [line for line in lines if line["device"] == lines[-1]["device"]]
    rows = []
    for cell, batch in product(CELLS, (1, 4, 16, 64)):
        line = last(lines, cell=cell, batch=batch)
        if line is not None:
            us = line["us_per_step"]
            cells = [number(us[name]) for name in ("dense", "1x1", *SIZES)]
            cells += [number(min(us[name] for name in names)) for names in others.values()]
            fastest = max(us["dense"] / us[block] for block in SIZES)
            rows.append(((CELLS[cell], str(batch), *cells, times(fastest)), [line]))
    columns = ("cell", "batch", "dense", "1x1", *SIZES, *others)
    return table((*columns, "best block, times faster than dense"), rows) if rows else ""


def mask_refresh() -> str:
    """What it costs to draw transposable 4:8 masks anew every few updates, as a share of a dense training step of two
    EGRU layers, one CPU thread (`python experiments/mask_refresh.py`). The last column is apart from the masks: the
    dense weights behind them that every update moves (straight-through).
    """
    rows, lines = [], read("mask_refresh")
    for way in ("exact", "greedy"):
        line = last(lines, method=way)
        if line is not None:
            shares = [f"{share:.0%}" for share in line["masks_share"].values()]
            sizes = f"{line['hidden']} units, batch {line['batch']}, {line['window']} steps"
            rows.append(((way, sizes, *shares, f"{line['kept_share']:.0%}"), [line]))
    intervals = [f"every {k}" for k in lines[-1]["masks_share"]] if lines else []
    return table(("masks", "training", *intervals, "weights behind the masks"), rows) if rows else ""
