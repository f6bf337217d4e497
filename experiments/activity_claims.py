"""Claims about activity and pruned LSTMs (Subramoney et al. 2023, Mukherji et al. 2023); see `claims.py`.

Their lines are those of `short_trainings.py`, whose trainings are far from converged: they show a direction only.
"""

from __future__ import annotations

import json
from itertools import pairwise
from statistics import mean

from claim_lines import Finding, lines_of, seeds

# Networks whose perplexities differ by more than this ratio have not learnt alike.
MOST_APART = 1.5

# An LSTM with so many times the products needs more of them; below, interpolation and a single seed cannot tell.
CLEARLY_MORE = 1.2


def studied(study: str) -> list[list[dict]]:
    """The points of a study in the order of their first lines, each with the last line of every seed."""
    points: dict[str, dict[int, dict]] = {}
    for line in lines_of("short_trainings"):
        if line["what"] == "training" and line["study"] == study:
            rest = {key: value for key, value in line["settings"].items() if key != "training.seed"}
            points.setdefault(json.dumps(rest), {})[line["settings"]["training.seed"]] = line
    return [list(each.values()) for each in points.values()]


def read(lines: list[dict], name: str) -> float:
    """The mean over seeds of a figure of the validation text."""
    return mean(line["valid"][name] for line in lines)


def trained_for(points: list[list[dict]]) -> str:
    """The epochs and the seeds of a study in words."""
    return f"{points[0][0]['settings']['training.epochs']} epochs, {seeds(min(map(len, points)))}"


def quiet_backward() -> Finding | None:
    """The share of units and steps through whose output no gradient passes."""
    found = [line for line in lines_of("short_trainings") if line["what"] == "backward"]
    if not found:
        return None
    counts = found[-1]["backward"]
    text = f"{counts['no_gradient']:.0%} of units and steps pass no gradient in {found[-1]['name']}"
    text += f", with {counts['effective'] / counts['dense']:.0%} of a dense engine's products"
    return Finding(text, counts["no_gradient"] >= 0.42, (found[-1],))


def larger_is_quieter() -> Finding | None:
    """The share of outputs that are zero, by the units of the first layers. It shows nothing where one of the networks
    has learnt far less than another one."""
    points = sorted(studied("sizes"), key=lambda lines: lines[0]["units"][0])
    if len(points) < 2:
        return None
    silent, perplexities = (
        [1 - read(lines, "activity") for lines in points],
        [read(lines, "perplexity") for lines in points],
    )
    parts = [
        f"{share:.1%} with {lines[0]['units'][0]} (perplexity {each:.0f})"
        for share, each, lines in zip(silent, perplexities, points, strict=True)
    ]
    learnt = max(perplexities) <= MOST_APART * min(perplexities)
    text = f"{', '.join(parts)}; {trained_for(points)}{'' if learnt else ', too few for the larger ones'}"
    holds = silent == sorted(silent) if learnt else None
    return Finding(text, holds, tuple(line for lines in points for line in lines))


def decay_steers() -> Finding | None:
    """The activity by weight decay."""
    points = sorted(studied("decay"), key=lambda lines: lines[0]["settings"]["training.weight_decay"])
    if len(points) < 2:
        return None
    active = [read(lines, "activity") for lines in points]
    parts = [
        f"{share:.1%} at {lines[0]['settings']['training.weight_decay']:g}"
        for share, lines in zip(active, points, strict=True)
    ]
    perplexities = ", ".join(f"{read(lines, 'perplexity'):.0f}" for lines in points)
    text = f"activity {', '.join(parts)} (perplexity {perplexities}); 1024 and 512 units, {trained_for(points)}"
    return Finding(text, active == sorted(active, reverse=True), tuple(line for lines in points for line in lines))


def lstm_alone() -> Finding | None:
    """The products of a pruned LSTM that reads as well as each EGRU, beside that one's."""
    points = studied("connectivity")
    lstm, egru = ([each for each in points if each[0]["model"] == name] for name in ("lstm", "egru"))
    curve = sorted((read(lines, "perplexity"), read(lines, "effective")) for lines in lstm)
    parts, ratios = [], []
    for lines in sorted(egru, key=lambda lines: read(lines, "perplexity")):
        own, at = read(lines, "effective"), read(lines, "perplexity")
        if (other := products_at(curve, at)) is not None:
            pruned = lines[0]["settings"].get("pruning.sparsity", 0.0)
            name = f"an EGRU pruned by {pruned:.0%}" if pruned else "a dense EGRU"
            ratios.append(other / own)
            parts.append(f"{other / own:.1f} times the products of {name} at perplexity {at:.0f}")
    if not ratios:
        return None
    sparsest = max(lines[0]["settings"].get("pruning.sparsity", 0.0) for lines in lstm)
    where = f"1024 and 512 units, LSTM pruned by up to {sparsest:.0%}, {trained_for(points)}"
    holds = all(ratio >= CLEARLY_MORE for ratio in ratios)
    return Finding(f"LSTM {', '.join(parts)}; {where}", holds, tuple(line for lines in points for line in lines))


def products_at(curve: list[tuple[float, float]], perplexity: float) -> float | None:
    """Products at a perplexity, on straight lines through the logarithms of products; None beyond both ends.

    curve : (perplexity, products) of each network, by rising perplexity
    """
    for (before, most), (after, least) in pairwise(curve):
        if before <= perplexity <= after:
            share = (perplexity - before) / (after - before)
            return most ** (1 - share) * least**share
    return None


def sparse_tensor_cores() -> Finding | None:
    """Products with 2:4 sparse weights beside the dense ones, each size at its smallest and at its best batch."""
    lines = {(line["inputs"], line["outputs"], line["batch"]): line for line in lines_of("sparse_tensor_cores")}
    sizes: dict[tuple[int, int], dict[int, float]] = {}
    for (*size, batch), line in lines.items():
        sizes.setdefault(tuple(size), {})[batch] = max(line["speedup"].values())
    if not sizes:
        return None
    parts = []
    for (inputs, outputs), gain in sizes.items():
        best, least = max(gain, key=lambda batch: gain[batch]), min(gain)
        parts.append(
            f"{inputs}x{outputs} {gain[least]:.2f} at batch {least}, at most {gain[best]:.2f}, at batch {best}"
        )
    holds = max(max(gain.values()) for gain in sizes.values()) >= 2
    return Finding(f"times as fast as dense: {'; '.join(parts)}; 2:4, float16", holds, tuple(lines.values()))
