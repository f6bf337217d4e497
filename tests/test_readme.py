"""The README: its example runs, it stays short, and it names two commands to start with.

`test_docs.py` checks its links, names and commands together with those of `docs/`.
"""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [body for language, body in BLOCKS if not language]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = (body for language, body in BLOCKS if language == "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "times fewer multiplications" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


def test_the_readme_stays_short():
    assert len(TEXT.splitlines()) <= 130


def test_exactly_two_commands_to_start():
    assert len(COMMANDS) == 2 and all(len(command.strip().splitlines()) == 1 for command in COMMANDS)


def test_the_gate_runs_the_test_command_of_the_readme():
    command = 'pip install -e ".[test,plots]" && pytest'
    assert command in {each.strip() for each in COMMANDS}
    gate = README.parent / ".ci" / "run"
    assert command in gate.read_text()
    # Executable by its owner, by the group and by all others.
    assert gate.stat().st_mode & 0o111
