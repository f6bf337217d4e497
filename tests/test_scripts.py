"""The scripts in experiments/ as programs: bad options end with exit code 2 and one line, before any work."""

import re
import sys

import pytest

from support.scripts import EXPERIMENTS, script

#: script, its arguments, and what its line says
BAD = [
    ("masks", ["--threads", "0", "--results", "{}/lines"], "masks.py: error: threads: got 0, need a whole number >= 1"),
    ("plots", ["--results", "{}/none"], "plots.py: error: .*No such file or directory"),
    ("words", ["{}", "--model", "lstm"], "words.py: error: model: got 'lstm', need egru or gru"),
    ("sequences", ["parity"], "sequences.py: error: task: got 'parity', need adding or digits"),
    ("events", ["classify", "nothing"], "events.py: error: data: got 'nothing', need bars, chirps, or a folder"),
    ("ptb_latency", [], "ptb_latency.py: error: model: give either a model file, or --random"),
    ("bench", ["--only", "xyz"], r"bench.py: error: Invalid value for --only: got 'xyz'.*\(bench.py --help lists"),
    ("ptb", ["no-command"], "ptb.py: error: No such command 'no-command'"),
]


@pytest.mark.parametrize(("name", "arguments", "said"), BAD, ids=[name for name, *_ in BAD])
def test_bad_options_end_with_exit_code_2_and_one_line(name, arguments, said, monkeypatch, tmp_path, capsys):
    module = script(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(EXPERIMENTS / f"{name}.py"), *(each.format(tmp_path) for each in arguments)])
    program = getattr(module, "app", None) or script("command_line", monkeypatch).command(module.main, module.__doc__)
    with pytest.raises(SystemExit) as ended:
        program.run()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and re.match(said, err) and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_every_script_is_run_that_way():
    for path in EXPERIMENTS.glob("*.py"):
        _, is_program, end = path.read_text().partition('\nif __name__ == "__main__":\n')
        if is_program:
            assert re.fullmatch(r"    (app|command\(\w+, __doc__\))\.run\(\)\n", end), path.name
