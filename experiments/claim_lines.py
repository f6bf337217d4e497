"""What the committed lines show of a claim; see `claims.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from result_lines import HERE, read

# Perplexities within the first ratio count as the same, and a pruned model within the second one has a small loss.
SAME, WORSE = 1.01, 1.05


@dataclass(frozen=True)
class Finding:
    """What the lines show of a claim.

    figure : in words, with the size and the number of seeds
    holds  : whether the claim holds; None where the figure cannot tell
    lines  : the lines that it was read from
    """

    figure: str
    holds: bool | None
    lines: tuple[dict, ...] = ()


def lines_of(name: str) -> list[dict]:
    """All lines of results/NAME.jsonl, oldest first; none where the file is not there."""
    return read(name, timed=False) if (HERE / "results" / f"{name}.jsonl").exists() else []


def last(lines: Iterable[dict]) -> tuple[dict, ...]:
    """The last line of each commit."""
    return tuple({line["commit"]: line for line in lines}.values())


def seeds(count: int) -> str:
    """A number of trainings in words."""
    return {1: "one seed", 2: "two seeds", 3: "three seeds"}.get(count, f"{count} seeds")
