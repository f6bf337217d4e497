"""Claims about pruning in blocks (Narang et al. 2017) and N:M masks (Hubara et al. 2021); see `claims.py`.

A pruned network is compared with the best dense one of its size that was trained for as many epochs. Of several such
pairs, those with the most seeds count, then the one whose dense network reads best, and then the best way to prune.
Whether the dense network was trained for long enough shows in one that was trained for `LONGER` times as many epochs or
more: where it reads better by more than `MOST_GAIN`, or where there is none, a pruned network that is no worse than the
shorter one only shows something if it is no worse than the longer one either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

from claim_lines import SAME, WORSE, Finding, last, lines_of, seeds

SIZES = ("1x16", "4x4", "16x16", "32x32")
STORAGES = ("float32", "bfloat16", "int8")
MOST_GAIN, LONGER = SAME - 1, 1.5

TASKS = {"word": "whole vocabulary", "character": "by characters"}


@dataclass(frozen=True)
class Pair:
    """A pruned network and the dense one of the same task, cell and epochs.

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
        """The network, its training and its seeds in words."""
        return f"{self.network}, {seeds(len(self.pruned))}"

    @property
    def network(self) -> str:
        """The network and its training in words."""
        first = self.pruned[0]
        text = f"{self.dense[0]['model.cell'].upper()} of {units(first)} units, {TASKS[task(first)]}"
        text += f", {first['training.epochs']} epochs"
        if self.longer:
            gain, of = perplexity(self.longer) / perplexity(self.dense) - 1, len(self.longer)
            fewer = f", {seeds(of)}" if of < len(self.dense) else ""
            text += f" ({self.longer[0]['training.epochs']}: {gain:+.1%} for dense{fewer})"
        return text

    def doubt(self, most: float) -> str:
        """What is missing for a verdict, in words; empty where nothing is, or where there is a longer training."""
        return ", dense one not trained for longer" if self.verdict(most) is None and not self.longer else ""

    def verdict(self, most: float) -> bool | None:
        """Whether the pruned network is worse by this ratio at most; None where a dense one that was trained too
        little makes it look good."""
        if self.ratio > most:
            return False
        if not self.longer:
            return None
        long = perplexity(self.longer)
        return (
            True if long >= perplexity(self.dense) * (1 - MOST_GAIN) or perplexity(self.pruned) <= most * long else None
        )


def perplexity(lines: list[dict]) -> float:
    """The mean over seeds, of the validation text."""
    return mean(line["perplexity_valid"] for line in lines)


def swept() -> list[dict]:
    """The lines of the sweep."""
    return lines_of("pruning_sweep")


def block_of(line: dict) -> str:
    """The block of a line as tables name it; empty for none."""
    return "x".join(re.findall(r"\d+", str(line["pruning.block"] or "")))


def task(line: dict) -> str:
    """What the symbols of the text are."""
    return line.get("data.kind") or "word"


def text_of(line: dict) -> str:
    """The text, of which perplexities can be compared. That of characters differs between versions of Python, which
    shows in its number of symbols."""
    return f"{task(line)} {line.get('symbols', '')}" if task(line) == "character" else task(line)


def units(line: dict) -> str:
    """The units of the layers in words."""
    return " and ".join(re.findall(r"\d+", str(line["model.hidden"])))


def weights(hidden: list[int]) -> int:
    """The number of weights per gate of layers whose embedding is as wide as the last of them."""
    return sum(own * (own + before) for own, before in zip(hidden, [hidden[-1], *hidden], strict=False))


def of_layers(line: dict) -> float:
    """The number of weights per gate that the layers of a line keep."""
    return weights(json.loads(str(line["model.hidden"]))) * (1 - (line["pruning.sparsity"] or 0.0))


def rule_of(line: dict) -> tuple:
    """What tells the training of a line from others of its task, cell and epochs, beside its seed."""
    apart = ("training.seed", "training.epochs", "training.precision")
    names = [name for name in line if name.startswith(("pruning.", "training.", "model.hidden")) and name not in apart]
    return tuple((name, str(line[name])) for name in sorted(names))


def by_seed(lines: Iterable[dict]) -> list[list[dict]]:
    """The lines of each way of training, one per seed."""
    groups: dict[tuple, dict[int, dict]] = {}
    for line in lines:
        key = (text_of(line), line["model.cell"], line["training.epochs"], str(line["converted"]), *rule_of(line))
        groups.setdefault(key, {})[line["training.seed"]] = line
    return [list(group.values()) for group in groups.values()]


def best_dense(lines: Iterable[dict]) -> dict[tuple, list[dict]]:
    """(text, cell, units, epochs) -> the lines of the noise with which that dense network reads best."""
    found: dict[tuple, list[dict]] = {}
    for group in by_seed(line for line in lines if line["pruning.method"] is None):
        key = size_of(group[0])
        found[key] = min(found.get(key, group), group, key=perplexity)
    return found


def size_of(line: dict) -> tuple:
    """The key of `best_dense`."""
    return text_of(line), line["model.cell"], str(line["model.hidden"]), line["training.epochs"]


def best(fits: Callable[[dict], bool], dense_of: Callable[[dict], tuple] = size_of) -> dict[tuple[str, str], Pair]:
    """(text, cell) -> the pair that counts, among the trained lines that fit.

    dense_of : the key of the dense network that a line is compared with
    """
    dense, found = best_dense(swept()), {}
    pruned = [line for line in swept() if line["pruning.method"] is not None and not line["converted"] and fits(line)]
    for group in by_seed(pruned):
        if (key := dense_of(group[0])) in dense:
            found.setdefault(key[:2], []).append(Pair(dense[key], group, longest(dense, key)))
    return {key: min(pairs, key=worth) for key, pairs in found.items()}


def worth(pair: Pair) -> tuple[float, ...]:
    """What counts first is smallest."""
    return -len(pair.pruned), perplexity(pair.dense), pair.ratio


def longest(dense: dict[tuple, list[dict]], key: tuple) -> list[dict]:
    """Of the dense networks of that size, the one that was trained for longest, if it is for `LONGER` times as long."""
    most = max(epochs for *of, epochs in dense if of == list(key[:-1]))
    return dense[*key[:-1], most] if most >= LONGER * key[-1] else []


def of_cells(ours: str, theirs: str) -> Pair | None:
    """The dense networks of two cells with the whole vocabulary: of the same units, after as many epochs."""
    dense = best_dense(swept())
    both = {key: ("word", theirs, *key[2:]) for key in dense if key[:2] == ("word", ours)}
    both = {key: other for key, other in both.items() if other in dense}
    if not both:
        return None
    key = max(both, key=lambda each: each[-1])
    return Pair(dense[both[key]], dense[key], longest(dense, both[key]))


def joined(verdicts: Iterable[bool | None]) -> bool | None:
    """The verdict on several pairs."""
    each = list(verdicts)
    return False if False in each else (None if None in each else True)


# --- blocks ---


def pruned_blocks(block: str, cell: str) -> Callable[[], Finding | None]:
    """The best rule on blocks of that size, at 90 %, in layers of a cell, beside the dense network, for each text."""

    def find() -> Finding | None:
        same = (cell, block, 0.9)
        pairs = best(lambda line: (line["model.cell"], block_of(line), line["pruning.sparsity"]) == same)
        return None if not pairs else of_pairs([*pairs.values()], WORSE, lambda pair: f" ({way(pair.pruned[0])})")

    return find


def of_pairs(pairs: list[Pair], most: float, say: Callable[[Pair], str]) -> Finding:
    """What pairs show together, each with its figure."""
    text = "; ".join(f"{pair.ratio - 1:+.1%}{say(pair)}; {pair.where}{pair.doubt(most)}" for pair in pairs)
    lines = tuple(line for pair in pairs for line in pair.lines)
    return Finding(text, joined(pair.verdict(most) for pair in pairs), last(lines))


def way(line: dict) -> str:
    """The rule and the noise of a line in words."""
    rule = line["pruning.scope"] or line["pruning.method"]
    return f"{rule}, DropConnect {line['training.regularisers.dropconnect']:g}"


def smaller_files() -> Finding | None:
    """Bytes of the layers of a pruned network beside the dense one's in float32."""
    words = [line for line in swept() if task(line) == "word"]
    dense = {str(line["model.hidden"]): line for line in words if line["pruning.method"] is None}
    pruned = [
        line
        for line in words
        if line["pruning.sparsity"] == 0.9 and block_of(line) in SIZES and str(line["model.hidden"]) in dense
    ]
    if not pruned:
        return None
    whole = [dense[str(line["model.hidden"])]["file_bytes"]["float32"] for line in pruned]
    by = {
        name: min(bytes_ / line["file_bytes"][name] for bytes_, line in zip(whole, pruned, strict=True))
        for name in STORAGES
    }
    text = ", ".join(f"{fewer:.1f} times with {name} values" for name, fewer in by.items())
    text = f"layers at 90 % at least {text}, beside dense ones in float32"
    return Finding(text, by["bfloat16"] >= 10, last([*dense.values(), *pruned]))


def larger_pruned(kind: str) -> Callable[[], Finding | None]:
    """Larger networks, pruned to as many weights as a smaller dense one has: those that were trained for longest on the
    texts of a kind, in TASKS."""
    return lambda: _larger_pruned([line for line in swept() if task(line) == kind])


def _larger_pruned(lines: list[dict]) -> Finding | None:
    dense = best_dense(lines)

    def smaller(line: dict) -> tuple | None:
        """The dense network with the weights of a pruned larger one."""
        apart = (text_of(line), line["model.cell"], line["training.epochs"])
        for key, (first, *_) in dense.items():
            same = (*key[:2], key[3]) == apart and first["model.hidden"] != line["model.hidden"]
            if same and abs(of_layers(line) / of_layers(first) - 1) < 0.01:
                return key
        return None

    pruned = [line for line in lines if block_of(line) in SIZES and not line["converted"] and smaller(line)]
    longest = max((line["training.epochs"] for line in pruned), default=0)
    text, verdicts, used, beside = [], [], [], ""
    for block in SIZES:
        pairs = best(
            lambda line, block=block: line in pruned and (block_of(line), line["training.epochs"]) == (block, longest),
            lambda line: smaller(line) or (),
        )
        for pair in pairs.values():
            text.append(f"{block} {pair.ratio - 1:+.1%}")
            verdicts.append(pair.verdict(1.0))
            used += pair.lines
            beside = f"beside {units(pair.dense[0])} units with as many weights; {pair.where}{pair.doubt(1.0)}"
    if not text:
        return None
    return Finding(f"{', '.join(text)} {beside}", joined(verdicts), last(used))


def lasso_helps() -> Finding | None:
    """The group lasso beside the thresholds alone, at 90 %."""
    text, ratios, used, where = [], [], [], ""
    for block in SIZES:
        lasso, alone = (
            best(
                lambda line, method=method, block=block: (
                    line["pruning.method"] == method and block_of(line) == block and line["pruning.sparsity"] == 0.9
                )
            )
            for method in ("lasso", "threshold")
        )
        for key, pair in alone.items():
            if key in lasso and size_of(lasso[key].pruned[0]) == size_of(pair.pruned[0]):
                both = lasso[key].pruned, pair.pruned
                ratios.append(perplexity(both[0]) / perplexity(both[1]))
                text.append(f"{block} {ratios[-1] - 1:+.1%} ({seeds(min(map(len, both)))})")
                used += [*both[0], *both[1]]
                where = pair.network
    return Finding(f"{', '.join(text)}; {where}", max(ratios) < 1, last(used)) if ratios else None


def faster_blocks() -> Finding | None:
    """The step of a GRU with 90 % of its blocks pruned beside the dense one, on one CPU thread and on a GPU."""
    lines = {(line["backend"], line["batch"]): line for line in lines_of("block_steps") if line["cell"] == "gru"}
    parts, ratios, used = [], [], []
    for backend, name in (("cpu", "one thread"), ("cuda", "GPU")):
        found = {batch: line for (own, batch), line in lines.items() if own == backend}
        for batch in dict.fromkeys((min(found), max(found))) if found else ():
            us = found[batch]["us_per_step"]
            ratios += [us["dense"] / us[block] for block in SIZES]
            each = ", ".join(f"{block} {us['dense'] / us[block]:.1f}" for block in SIZES)
            parts.append(f"{name}, batch {batch}: {each}")
            used.append(found[batch])
    if not used:
        return None
    text = f"times as fast as dense, {'; '.join(parts)}; GRU, {used[0]['hidden']} units"
    return Finding(text, min(ratios) > 1, last(used))


# --- N:M masks ---


def trained_masks(nm: str, most: float, cell: str) -> Callable[[], Finding | None]:
    """A network of a cell that is trained with masks of a pattern beside the dense one, which it may exceed by this
    ratio, for each text."""

    def find() -> Finding | None:
        pairs = best(lambda line: (line["pruning.nm"], line["model.cell"]) == (nm, cell))
        return None if not pairs else of_pairs([*pairs.values()], most, lambda pair: ", masks drawn once")

    return find


def adaprune(begun: str) -> Callable[[], Finding | None]:
    """AdaPrune beside the network that it began with, and beside the largest weights kept without it: the pattern that
    loses most, of the longest training.

    begun : "dense", or "half" for the network with half of its single weights
    """

    def find() -> Finding | None:
        own = ("model.cell", "model.hidden", "training.epochs", "training.seed", "training.regularisers.dropconnect")
        found: dict[str, list[tuple[dict, dict, dict]]] = {}
        lines = [line for line in swept() if line["converted"] == begun]
        longest = max((line["training.epochs"] for line in lines), default=0)
        for line in lines:
            if line["pruning.method"] != "adaprune" or line["training.epochs"] != longest:
                continue
            same = [each for each in swept() if all(each.get(name) == line.get(name) for name in own)]
            before = [each for each in same if not each["converted"] and started(each) == begun]
            plain = [
                each
                for each in same
                if each["converted"] == begun
                and (each["pruning.method"], each["pruning.nm"]) == ("magnitude", line["pruning.nm"])
            ]
            if before and plain:
                found.setdefault(line["pruning.nm"], []).append((line, before[0], plain[0]))
        if not found:
            return None
        # Of each pattern: the networks of all seeds, what they began with, and those without AdaPrune.
        kinds = {nm: [list(kind) for kind in zip(*each, strict=True)] for nm, each in found.items()}
        nm = max(kinds, key=lambda nm: perplexity(kinds[nm][0]) / perplexity(kinds[nm][1]))
        made, before, plain = kinds[nm]
        ratio = perplexity(made) / perplexity(before)
        read_at = f"{perplexity(made):.1f} beside {perplexity(before):.1f} ({ratio - 1:+.1%})"
        text = f"{nm}: {read_at}, without AdaPrune {perplexity(plain):.1f}"
        where = f"{made[0]['model.cell'].upper()} of {units(made[0])} units, whole vocabulary, {longest} epochs"
        return Finding(f"{text}; {where}, {seeds(len(made))}", ratio <= 1.03, last([*before, *made, *plain]))

    return find


def started(line: dict) -> str:
    """What `pruning_sweep.py convert` calls a trained network; empty for those that it does not convert."""
    if line["pruning.method"] is None:
        return "dense"
    return "half" if line["pruning.sparsity"] == 0.5 and not block_of(line) else ""


def masked_step() -> Finding | None:
    """A training step with one mask for both passes beside this engine with the same weights stored dense."""
    lines = {(line["nm"], line["batch"]): line for line in lines_of("cpu_training_other") if line.get("nm")}
    if not lines:
        return None
    each = {
        f"{nm.removesuffix(':post')} at batch {batch}": line["against_each"]["dense"]["speedup"]
        for (nm, batch), line in lines.items()
    }
    text = ", ".join(f"{name} {faster:.2f}" for name, faster in each.items())
    text = f"a training step {text} times as fast as with the weights stored dense, one CPU thread"
    where = "layer of 1350 units; training on a GPU multiplies pruned weights, too"
    return Finding(f"{text}; {where}", min(each.values()) > 1, last([*lines.values()]))


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
