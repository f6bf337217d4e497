"""The README is true: its example runs, its commands exist."""

import re
import shlex
from pathlib import Path

from eventrnn.cli import app

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [body for language, body in BLOCKS if not language]


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in (body for language, body in BLOCKS if language == "python"):
        exec(compile(example, "README.md", "exec"), names)
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} >= {"log.jsonl"}
    assert "times fewer multiplications" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


def test_the_commands_exist():
    import typer

    command = typer.main.get_command(app)
    lines = re.findall(r"`eventrnn ([a-z][^`]*)`", TEXT) + re.findall(r"&& eventrnn (.*)", TEXT)
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)
        node = command
        while words and not words[0].startswith("-") and hasattr(node, "commands"):
            if words[0] not in node.commands:
                break
            node = node.commands[words.pop(0)]
        assert node is not command, f"no command: {line}"
        known = {name for parameter in node.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_exactly_two_commands_to_start():
    assert len(COMMANDS) == 2 and all(len(command.strip().splitlines()) == 1 for command in COMMANDS)


def test_the_gate_runs_the_test_command_of_the_readme():
    command = 'pip install -e ".[test,plots]" && pytest'
    assert command in {each.strip() for each in COMMANDS}
    gate = README.parent / ".ci" / "run"
    assert command in gate.read_text()
    # Executable by its owner, by the group and by all others.
    assert gate.stat().st_mode & 0o111
