"""Files of results: one JSON object per line, appended as soon as it is measured."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from eventrnn.bench import device, versions
from eventrnn.cli.terminal import as_line

ROOT = Path(__file__).parent.parent


class Records:
    """The lines of a file.

    key    : names of the fields that, together with the device, identify the case of a line
    device : the machine whose lines count
    lines  : every line of the file, oldest first
    """

    def __init__(self, path: Path, key: tuple[str, ...]):
        self.path, self.key, self.device = path, key, device()
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, asked: dict) -> dict | None:
        """The latest line of the device that agrees with `asked` in every key field that `asked` has, or None."""
        same = [line for line in self.lines if line["device"] == self.device and self._same(line, asked)]
        return same[-1] if same else None

    def as_last(self) -> None:
        """Make the lines of the device of the last line count, whatever machine this is."""
        if self.lines:
            self.device = self.lines[-1]["device"]

    def add(self, line: dict) -> dict:
        """Append a line together with the commit, the time, the machine and the package versions. Returns all of it."""
        stamp = {"commit": commit(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        whole = json.loads(as_line(stamp | line | {"device": self.device, "versions": versions()}))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(as_line(whole) + "\n")
        self.lines.append(whole)
        return whole

    def _same(self, line: dict, asked: dict) -> bool:
        return all(line.get(name) == asked[name] for name in self.key if name in asked)


def commit() -> str:
    """The last commit that changed the package, followed by "-changed" if its files differ from that commit; "unknown"
    outside a clone. A measurement of an hour is not lost for it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    try:
        changed = "-changed" if git("status", "--porcelain", "eventrnn") else ""
        return git("log", "-1", "--format=%h", "--", "eventrnn") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
