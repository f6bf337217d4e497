"""Tables of docs/results.md about pruning while training, step times of blocks, and masks; see `tables.py`."""

from statistics import mean, stdev

from pruning_claims import SIZES, best_dense, block_of, swept
from result_lines import last, number, read, table, times

CELLS = {"gru": "GRU, all units send", "egru": "EGRU, 10 % send"}


def swept_models() -> str:
    """Networks of two layers on the Penn Treebank with its whole vocabulary, from random weights, pruned while they are
    trained (`python experiments/pruning_sweep.py`). Perplexity of the validation text, and how much worse it is than
    that of the best dense network after as many epochs. `threshold`: block pruning of Narang et al.; `lasso`: with
    group lasso; `column`: the blocks of largest norm, as many in each column of blocks. `converted`: pruned after the
    training, without further training. Weights and files are those of the layers, without the embedding of 5.1 million
    values, which is the read-out too and is not pruned; files are compared with the dense one in float32.
    """
    groups: dict[tuple, list[dict]] = {}
    for line in swept():
        names = [
            name for name in line if name.startswith(("pruning.", "training.regularisers.", "model.", "converted"))
        ]
        groups.setdefault((line["training.epochs"], *(str(line[name]) for name in names)), []).append(line)
    dense = {}
    for cell in {line["model.cell"] for line in swept()}:
        own = [line for line in swept() if line["model.cell"] == cell and line["pruning.method"] is None]
        dense |= {(cell, epochs): lines for epochs, lines in best_dense(own).items()}
    rows = []
    for lines in sorted(groups.values(), key=lambda lines: (lines[0]["model.cell"], lines[0]["training.epochs"])):
        first, read_at = lines[0], [line["perplexity_valid"] for line in lines]
        beside = dense.get((first["model.cell"], first["training.epochs"]))
        whole = next(iter(dense.values()))[0]["file_bytes"]["float32"]
        sizes = [times(whole / first["file_bytes"][storage]) for storage in ("float32", "bfloat16", "int8")]
        spread = f" ± {stdev(read_at):.2f}" if len(read_at) > 1 else ""
        cells = [
            f"{first['model.cell'].upper()} {first['model.hidden'].strip('[]')}",
            method(first),
            first["pruning.nm"] or block_of(first),
            f"{first['density_of_layers']:.1%}",
            f"{first['training.epochs']}",
            f"{first['training.regularisers.dropconnect']:g}",
            f"{mean(read_at):.2f}{spread}",
            f"{mean(read_at) / mean(line['perplexity_valid'] for line in beside) - 1:+.1%}" if beside else "",
            " / ".join(sizes),
        ]
        rows.append((cells, lines))
    columns = ("network", "method", "blocks or masks", "weights left", "epochs", "DropConnect", "perplexity")
    return table((*columns, "beside dense", "file smaller, times: float32 / bfloat16 / int8"), rows) if rows else ""


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
    rows = []
    lines = read("block_steps")
    for cell in CELLS:
        for batch in (1, 4, 16, 64):
            line = last(lines, cell=cell, batch=batch)
            if line is not None:
                us = line["us_per_step"]
                cells = [number(us[name]) for name in ("dense", "1x1", *SIZES, "torch")]
                fastest = max(us["dense"] / us[block] for block in SIZES)
                rows.append(((CELLS[cell], str(batch), *cells, times(fastest)), [line]))
    columns = ("cell", "batch", "dense", "1x1", *SIZES, "PyTorch")
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
