"""Time the cases of the README and append a line each to results/cpu_inference.jsonl.

    python experiments/bench.py

A line holds everything that `eventrnn bench inference --json` prints, with the commit and the time. Needs torch.
"""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from eventrnn import bench

RESULTS = Path(__file__).parent / "results" / "cpu_inference.jsonl"

CASES = [
    {},
    {"against": "torch-step"},
    {"threads": 2},
    {"block": (1, 16)},
    {"sparsity": 0.95, "activity": 0.05},
    {"format": "csr", "block": None},
    {"format": "dense", "block": None, "sparsity": 0.0},
    {"format": "dense", "block": None, "sparsity": 0.0, "threads": 2},
    {"format": "dense", "block": None, "sparsity": 0.0, "activity": 0.5},
    {"batch": 20},
    {"format": "dense", "block": None, "sparsity": 0.0, "batch": 20},
    {"variant": "paper"},
]


def commit() -> str:
    """The commit of the working tree, with a mark where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-changed" if git("status", "--porcelain", "eventrnn") else "")


def main() -> None:
    """Run every case; a case that fails stops the rest, so that no table is half old."""
    RESULTS.parent.mkdir(exist_ok=True)
    at, lines = commit(), []
    for case in CASES:
        line = {"commit": at, "time": datetime.now(UTC).isoformat(timespec="seconds")} | bench.inference(**case)
        lines.append(json.dumps(line))
        ratio = f"{line['speedup']:.1f} x {line['against']}"
        print(f"{case}: {line['us_per_step']:.1f} us, {line['against_us_per_step']:.1f} us, {ratio}", flush=True)
    with RESULTS.open("a") as file:
        file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
