"""Claims about activity and pruned LSTMs (Subramoney et al. 2023, Mukherji et al. 2023); see `claims.py`.

Their lines are those of `short_trainings.py`, whose trainings are far from converged: they show a direction only.
"""

from __future__ import annotations

import json
from statistics import mean

from claim_lines import Finding, lines_of, seeds


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
    """The share of outputs that are zero, by the units of the first layers."""
    points = sorted(studied("sizes"), key=lambda lines: lines[0]["units"][0])
    if len(points) < 2:
        return None
    silent = [1 - read(lines, "activity") for lines in points]
    parts = [f"{share:.1%} with {lines[0]['units'][0]}" for share, lines in zip(silent, points, strict=True)]
    perplexities = ", ".join(f"{read(lines, 'perplexity'):.0f}" for lines in points)
    text = f"{', '.join(parts)} units (perplexity {perplexities}); {trained_for(points)}"
    return Finding(text, silent == sorted(silent), tuple(line for lines in points for line in lines))


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
    """Pruned LSTMs beside pruned EGRUs: does any LSTM read as well as the cheapest EGRU with as few operations?"""
    points = studied("connectivity")
    named = [(name.upper(), [each for each in points if each[0]["model"] == name]) for name in ("lstm", "egru")]
    lstm, egru = (own for _, own in named)
    if not lstm or not egru:
        return None

    def described(lines: list[dict]) -> str:
        pruned = lines[0]["settings"].get("pruning.sparsity", 0.0)
        return f"{pruned:.0%} {read(lines, 'effective') / 1e6:.2f} M, {read(lines, 'perplexity'):.0f}"

    cheapest = min(egru, key=lambda lines: read(lines, "effective"))
    rivals = [lines for lines in lstm if read(lines, "perplexity") <= read(cheapest, "perplexity")]
    holds = all(read(lines, "effective") > read(cheapest, "effective") for lines in rivals)
    by = [f"{name} {', '.join(f'({described(lines)})' for lines in own)}" for name, own in named]
    text = f"pruned share, products per word, perplexity: {'; '.join(by)}; 1024 and 512 units, {trained_for(points)}"
    return Finding(text, holds, tuple(line for lines in points for line in lines))


def sparse_tensor_cores() -> Finding | None:
    """Products with 2:4 sparse weights beside the dense ones: the size that gains most."""
    lines = {(line["inputs"], line["outputs"], line["batch"]): line for line in lines_of("sparse_tensor_cores")}
    if not lines:
        return None
    sizes: dict[tuple[int, int], list[dict]] = {}
    for line in lines.values():
        sizes.setdefault((line["inputs"], line["outputs"]), []).append(line)
    parts, best = [], 0.0
    for (inputs, outputs), own in sizes.items():
        gain = {line["batch"]: max(line["speedup"].values()) for line in own}
        best = max(best, *gain.values())
        of_batch = ", ".join(f"{batch} {each:.2f}" for batch, each in sorted(gain.items()))
        parts.append(f"{inputs}x{outputs}, by batch: {of_batch}")
    return Finding(f"times as fast as dense, 2:4, float16, {'; '.join(parts)}", best >= 2, tuple(lines.values()))
