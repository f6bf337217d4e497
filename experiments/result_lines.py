"""The lines of results/, and Markdown tables of them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent


def read(name: str, *, timed: bool = True) -> list[dict]:
    """The lines of results/NAME.jsonl, oldest first.

    timed : only those that were measured on the machine of the last one; without, of figures that no machine changes
    """
    lines = [json.loads(line) for line in (HERE / "results" / f"{name}.jsonl").read_text().splitlines()]
    return [line for line in lines if not timed or line["device"] == lines[-1]["device"]]


def last(lines: Iterable[dict], **asked) -> dict | None:
    """The last line with these values, or None. Lines written before `exact` was recorded are exact."""
    defaults = {"exact": True}
    found = [line for line in lines if all(line.get(k, defaults.get(k)) == v for k, v in asked.items())]
    return found[-1] if found else None


def number(value: float) -> str:
    """A time or a perplexity with three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def times(value: float) -> str:
    """A ratio with two significant digits, and two decimals near one."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 1.995 else f"{value:.2f}"


def table(columns: Sequence[str], rows: Sequence[tuple[Sequence[str], Sequence[dict]]]) -> str:
    """A Markdown table, with a column for the commits, and the provenance of its lines below.

    rows : the cells of a row and the lines that they come from
    """
    out = [*columns, "commit"]
    text = [f"| {' | '.join(out)} |", f"| {' | '.join('---' for _ in out)} |"]
    used: dict[str, None] = {}
    for cells, lines in rows:
        commits = dict.fromkeys(line["commit"] for line in lines)
        text.append(f"| {' | '.join([*cells, ', '.join(commits)])} |")
        used |= dict.fromkeys(provenance(line) for line in lines)
    return "\n".join([*text, "", *(f"Measured on {each}." for each in used)])


def provenance(line: dict) -> str:
    """The machine and the versions of a line."""
    versions = ", ".join(f"{name} {version}" for name, version in line.get("versions", {}).items())
    return f"{line['device']}{f'; {versions}' if versions else ''}"
