"""Claims about pruning in blocks (Narang et al. 2017) and N:M masks (Hubara et al. 2021); see `claims.py`.

A pruned network is compared with the best dense one that was trained for as many epochs; the best of such pairs counts.
Whether that training was long enough shows in the dense network that was trained for longest: where it reads better by
more than `MOST_GAIN`, or where there is none, a pruned network that is no worse than the shorter one shows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from claim_lines import SAME, WORSE, Finding, last, lines_of, seeds

SIZES = ("1x16", "4x4", "16x16", "32x32")
STORAGES = ("float32", "bfloat16", "int8")
MOST_GAIN = 2 * (SAME - 1)


@dataclass(frozen=True)
class Pair:
    """A pruned network and the dense one of the same cell and epochs.

    dense, pruned : a line per seed
    longer        : the dense one that was trained for longest, where there is a longer one
    """

    dense: list[dict]
    pruned: list[dict]
    longer: list[dict]

    @property
    def ratio(self) -> float:
        """Perplexity of the pruned network by that of the dense one."""
        return perplexity(self.pruned) / perplexity(self.dense)

    @property
    def lines(self) -> tuple[dict, ...]:
        return (*self.dense, *self.pruned, *self.longer)

    @property
    def where(self) -> str:
        """The network and its training in words."""
        first = self.dense[0]
        units = " and ".join(re.findall(r"\d+", str(first["model.hidden"])))
        text = f"{first['model.cell'].upper()} of {units} units, whole vocabulary, {first['training.epochs']} epochs"
        if self.longer:
            gain = perplexity(self.longer) / perplexity(self.dense) - 1
            text += f" ({self.longer[0]['training.epochs']}: {gain:+.1%} for dense)"
        return f"{text}, {seeds(len(self.pruned))}"

    def verdict(self, most: float) -> bool | None:
        """Whether the pruned network is worse by this ratio at most; None where a dense one that was trained too
        little makes it look good."""
        gain = 1 - perplexity(self.longer) / perplexity(self.dense) if self.longer else 1.0
        return False if self.ratio > most else (True if gain <= MOST_GAIN else None)


def perplexity(lines: list[dict]) -> float:
    """The mean over seeds, of the validation text."""
    return mean(line["perplexity_valid"] for line in lines)


def swept() -> list[dict]:
    """The lines of the sweep."""
    return lines_of("pruning_sweep")


def block_of(line: dict) -> str:
    """The block of a line as tables name it; empty for none."""
    return "x".join(re.findall(r"\d+", str(line["pruning.block"] or "")))


def rule_of(line: dict) -> tuple:
    """What tells the training of a line from others of its cell, beside its seed."""
    names = [name for name in line if name.startswith(("pruning.", "training.regularisers.", "model.hidden"))]
    return tuple(str(line[name]) for name in names)


def best_dense(dense: list[dict]) -> dict[int, list[dict]]:
    """Number of epochs -> the lines of the noise with which dense networks read best."""
    noises: dict[int, dict[tuple, list[dict]]] = {}
    for line in dense:
        noises.setdefault(line["training.epochs"], {}).setdefault(rule_of(line), []).append(line)
    return {epochs: min(each.values(), key=perplexity) for epochs, each in noises.items()}


def best(fits: Callable[[dict], bool]) -> list[Pair]:
    """The best rule among the lines that fit, for each cell."""
    lines, found = swept(), []
    for cell in dict.fromkeys(line["model.cell"] for line in lines):
        own = [line for line in lines if line["model.cell"] == cell]
        dense = best_dense([line for line in own if line["pruning.method"] is None])
        rules: dict[tuple, list[dict]] = {}
        for line in own:
            if line["pruning.method"] is not None and fits(line):
                rules.setdefault((line["training.epochs"], *rule_of(line)), []).append(line)
        most = max(dense, default=0)
        pairs = [
            Pair(dense[epochs], of_seeds, dense[most] if most > epochs else [])
            for (epochs, *_), of_seeds in rules.items()
            if epochs in dense
        ]
        if pairs:
            found.append(min(pairs, key=lambda pair: pair.ratio))
    return found


def trained(line: dict) -> bool:
    """Whether the network was pruned while it was trained, and is as large as the dense one."""
    sizes = [each["model.hidden"] for each in swept() if each["pruning.method"] is None]
    return not line["converted"] and line["model.hidden"] in sizes


# --- blocks ---


def pruned_blocks(block: str) -> Callable[[], Finding | None]:
    """The best rule on blocks of that size, at 90 %, beside the dense network; of several cells the worst one."""

    def find() -> Finding | None:
        pairs = best(lambda line: trained(line) and block_of(line) == block and line["pruning.sparsity"] == 0.9)
        if not pairs:
            return None
        pair = max(pairs, key=lambda each: each.ratio)
        first = pair.pruned[0]
        rule = first["pruning.scope"] or first["pruning.method"]
        noise = f"DropConnect {first['training.regularisers.dropconnect']:g}"
        text = f"{pair.ratio - 1:+.1%} ({rule}, {noise}); {pair.where}"
        return Finding(text, pair.verdict(WORSE), pair.lines)

    return find


def smaller_files() -> Finding | None:
    """Bytes of the layers of a pruned network beside the dense one's in float32."""
    lines = [line for line in swept() if trained(line)]
    dense = [line for line in lines if line["pruning.method"] is None]
    pruned = [line for line in lines if line["pruning.sparsity"] == 0.9 and block_of(line) in SIZES]
    if not dense or not pruned:
        return None
    whole = dense[0]["file_bytes"]["float32"]
    by = {name: whole / max(line["file_bytes"][name] for line in pruned) for name in STORAGES}
    text = ", ".join(f"{fewer:.1f} times with {name} values" for name, fewer in by.items())
    text = f"layers at 90 % at least {text}, beside dense ones in float32"
    return Finding(text, by["bfloat16"] >= 10, (*last(dense), *last(pruned)))


def larger_pruned() -> Finding | None:
    """Larger networks, pruned to as many weights as the dense one has."""
    found = {
        block: best(lambda line, block=block: not line["converted"] and not trained(line) and block_of(line) == block)
        for block in SIZES
    }
    pairs = {block: max(pairs, key=lambda each: each.ratio) for block, pairs in found.items() if pairs}
    if not pairs:
        return None
    text = ", ".join(f"{block} {pair.ratio - 1:+.1%}" for block, pair in pairs.items())
    verdicts = [pair.verdict(1.0) for pair in pairs.values()]
    holds = False if False in verdicts else (None if None in verdicts else True)
    one = next(iter(pairs.values()))
    units = " and ".join(re.findall(r"\d+", str(one.pruned[0]["model.hidden"])))
    return Finding(f"{units} units: {text}; {one.where}", holds, tuple(last(one.lines)))


def lasso_helps() -> Finding | None:
    """The group lasso beside the thresholds alone, at 90 %."""
    text, ratios, used = [], [], []
    for block in SIZES:
        both = [
            best(
                lambda line, method=method, block=block: (
                    trained(line)
                    and line["pruning.method"] == method
                    and block_of(line) == block
                    and line["pruning.sparsity"] == 0.9
                )
            )
            for method in ("lasso", "threshold")
        ]
        if all(both):
            lasso, alone = (pairs[0] for pairs in both)
            ratios.append(perplexity(lasso.pruned) / perplexity(alone.pruned))
            text.append(f"{block} {ratios[-1] - 1:+.1%}")
            used += [*lasso.pruned, *alone.pruned]
    if not ratios:
        return None
    where = f"whole vocabulary, {seeds(len(lasso.pruned))}"
    return Finding(f"{', '.join(text)}; {where}", all(ratio < 1 for ratio in ratios), last(used))


def faster_blocks() -> Finding | None:
    """The step of a GRU with 90 % of its blocks pruned beside the dense one, on one CPU thread."""
    lines = {(line["cell"], line["batch"]): line for line in lines_of("block_steps") if line["backend"] == "cpu"}
    found = {batch: lines[cell, batch] for cell, batch in lines if cell == "gru"}
    if not found:
        return None
    parts, ratios = [], []
    for batch in (min(found), max(found)):
        us = found[batch]["us_per_step"]
        ratios += [us["dense"] / us[block] for block in SIZES]
        each = ", ".join(f"{block} {us['dense'] / us[block]:.1f}" for block in SIZES)
        parts.append(f"batch {batch}: {each} (PyTorch's dense GRU {us['dense'] / us['torch']:.1f})")
    units = found[min(found)]["hidden"]
    text = f"times as fast as dense, {'; '.join(parts)}; GRU, {units} units, one thread"
    return Finding(text, min(ratios) > 1, last(found.values()))


# --- N:M masks ---


def trained_masks(nm: str, most: float) -> Callable[[], Finding | None]:
    """A network that is trained with masks of a pattern beside the dense one, which it may exceed by this ratio."""

    def find() -> Finding | None:
        pairs = best(lambda line: trained(line) and line["pruning.nm"] == nm)
        if not pairs:
            return None
        pair = max(pairs, key=lambda each: each.ratio)
        return Finding(f"{pair.ratio - 1:+.1%}, masks drawn once; {pair.where}", pair.verdict(most), pair.lines)

    return find


def adaprune(begun: str) -> Callable[[], Finding | None]:
    """AdaPrune beside the network that it began with, and beside the largest weights kept without it: the pattern that
    loses most.

    begun : "dense", or "half" for the network with half of its single weights
    """

    def find() -> Finding | None:
        lines = [line for line in swept() if line["converted"] == begun]
        own = ("model.cell", "training.epochs", "training.seed", "training.regularisers.dropconnect")
        found = []
        for line in lines:
            if line["pruning.method"] == "adaprune":
                same = [each for each in swept() if all(each.get(name) == line.get(name) for name in own)]
                before = [each for each in same if not each["converted"] and started(each) == begun]
                plain = [
                    each
                    for each in same
                    if each["converted"] == begun
                    and (each["pruning.method"], each["pruning.nm"]) == ("magnitude", line["pruning.nm"])
                ]
                if before and plain:
                    found.append((perplexity([line]) / perplexity(before), line, before[0], plain[0]))
        if not found:
            return None
        most = max(line["training.epochs"] for _, line, _, _ in found)
        of_most = [each for each in found if each[1]["training.epochs"] == most]
        ratio, line, before, plain = max(of_most, key=lambda each: each[0])
        read_at = f"{perplexity([line]):.1f} beside {perplexity([before]):.1f} ({ratio - 1:+.1%})"
        text = f"{line['pruning.nm']}: {read_at}, without AdaPrune {perplexity([plain]):.1f}"
        where = f"{line['model.cell'].upper()}, whole vocabulary, {most} epochs, one seed"
        return Finding(f"{text}; {where}", ratio <= 1.03, (before, line, plain))

    return find


def started(line: dict) -> str:
    """What `pruning_sweep.py convert` calls a trained network; empty for those that it does not convert."""
    if line["pruning.method"] is None:
        return "dense"
    return "half" if line["pruning.sparsity"] == 0.5 and not block_of(line) else ""


def refresh_cost() -> Finding | None:
    """Masks that are drawn anew every 40 updates, as a share of a training step."""
    lines = {line["method"]: line for line in lines_of("mask_refresh")}
    if lines.keys() < {"exact", "greedy"}:
        return None
    text = ", ".join(f"{method} {line['masks_share']['40']:+.0%}" for method, line in lines.items())
    kept = max(line["kept_share"] for line in lines.values())
    one = lines["exact"]
    where = f"EGRU, 2 layers of {one['hidden']} units, batch {one['batch']}, one CPU thread"
    text = f"{text} per training step, and {kept:+.0%} for the dense weights behind the masks; {where}"
    return Finding(text, lines["exact"]["masks_share"]["40"] <= 0.14, tuple(lines.values()))
