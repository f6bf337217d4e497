"""Files of a run that are damaged, lost or moved: what is whole is used, and nothing is overwritten."""

import pytest

from eventrnn.training import CheckpointError, load_checkpoint, read_log, run, split_checkpoint
from eventrnn.training.checkpoint import previous
from support.runs import bits_of, small_trainer


def test_damaged_checkpoint_falls_back_to_the_previous(tmp_path):
    trainer = small_trainer()
    run(trainer, tmp_path, checkpoint_seconds=0)
    path = tmp_path / "checkpoint.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(small_trainer(), path)
    again = small_trainer()
    with pytest.warns(UserWarning, match="kept as damaged-checkpoint.safetensors"):
        run(again, tmp_path, resume=True)
    assert bits_of(again) == bits_of(trainer)
    previous(path).write_bytes(b"nothing")
    path.write_bytes(raw[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        run(small_trainer(), tmp_path, resume=True)


def _stopped_run(folder, step=17):
    """A run that was killed after that update, with checkpoints of the last two."""

    class Kill(BaseException):
        pass

    def stop(progress, seconds):
        if progress.step == step:
            raise Kill

    with pytest.raises(Kill):
        run(small_trainer(), folder, checkpoint_seconds=0, log_every=4, report=stop)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The files of a killed run, the bits of a run that was left alone, and the lines of its log."""
    straight, folder = small_trainer(), tmp_path_factory.mktemp("runs")
    run(straight, folder / "straight", checkpoint_seconds=0, log_every=4)
    files = {path.name: path.read_bytes() for path in _stopped_run(folder / "killed").iterdir()}
    return files, bits_of(straight), _lines(folder / "straight")


def _lines(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder)]


def _written(folder, content):
    folder.mkdir(exist_ok=True)
    for name, raw in content.items():
        (folder / name).write_bytes(raw)
    return folder


def test_a_run_goes_on_from_its_checkpoint_in_parts(tmp_path, stopped):
    content, bits, lines = stopped
    here, there = _written(tmp_path / "here", content), tmp_path / "there"
    raw = content["checkpoint.safetensors"]
    size = len(raw) // 3
    for _ in range(2):
        count = split_checkpoint(here / "checkpoint.safetensors", there, size, beside=["log.jsonl", "no such file"])
    parts = sorted(there.glob("*.part"))
    assert len(parts) == count == -(-len(raw) // size) and b"".join(p.read_bytes() for p in parts) == raw
    with pytest.raises(ValueError, match="holds a run; resume it"):
        run(small_trainer(), there)
    whole, index = parts[1].read_bytes(), (there / "parts.json").read_bytes()
    for part, damaged, words in (
        (parts[1], whole[:-1] + bytes([whole[-1] ^ 1]), "checkpoint-0001.part: damaged"),
        (parts[1], None, "checkpoint-0001.part: cannot be read: No such file"),
        (
            there / "parts.json",
            index.replace(b"checkpoint-0001", b"../heckpoint-01"),
            "parts.json: damaged, or no index",
        ),
        (there / "parts.json", b"[]", "parts.json: damaged, or no index of parts"),
    ):
        before = part.read_bytes()
        part.unlink() if damaged is None else part.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=words):
            run(small_trainer(), there, resume=True)
        assert not (there / "checkpoint.safetensors").exists()
        part.write_bytes(before)
    again = small_trainer()
    run(again, there, resume=True, log_every=4)
    assert bits_of(again) == bits and _lines(there) == lines


def test_a_validation_alone_saves_nothing(tmp_path):
    class Kill(BaseException):
        pass

    def stop(progress, seconds):
        if progress.validation:
            raise Kill

    with pytest.raises(Kill):
        run(small_trainer(), tmp_path, report=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


WORDS = (b'"eventrnn checkpoint"', b'"version"', b'"sha256"', b'"dtype"', b"data_offsets", b"__metadata__", b"F32")


@pytest.mark.parametrize("at", [0, 1, 8, *WORDS, -1])
def test_a_checkpoint_with_a_flipped_bit_falls_back_to_the_one_before(tmp_path, stopped, at):
    content, bits, lines = stopped
    raw = bytearray(content["checkpoint.safetensors"])
    raw[raw.index(at) + 3 if isinstance(at, bytes) else at] ^= 1
    folder, again = _written(tmp_path / "run", content | {"checkpoint.safetensors": bytes(raw)}), small_trainer()
    with pytest.warns(UserWarning, match=r"kept as damaged-checkpoint.safetensors\); .* before it, of step 15"):
        run(again, folder, resume=True, log_every=4)
    assert bits_of(again) == bits and _lines(folder) == lines
    assert (folder / "damaged-checkpoint.safetensors").read_bytes() == raw


def test_a_lost_checkpoint_falls_back_to_the_one_before(tmp_path, stopped):
    content, bits, lines = stopped
    folder, again = _written(tmp_path / "run", content), small_trainer()
    (folder / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="holds a run"):
        run(small_trainer(), folder)
    with pytest.warns(UserWarning, match="no such file; the run goes on from the checkpoint before it, of step 15"):
        run(again, folder, resume=True, log_every=4)
    assert bits_of(again) == bits and _lines(folder) == lines


def test_a_log_without_a_checkpoint_is_kept_when_the_run_starts_anew(tmp_path, stopped):
    content, bits, lines = stopped
    folder, again = _written(tmp_path / "run", {"log.jsonl": content["log.jsonl"]}), small_trainer()
    with pytest.warns(UserWarning, match="starts again at its first step; the log is kept as previous-log.jsonl"):
        run(again, folder, resume=True, log_every=4)
    assert bits_of(again) == bits and _lines(folder) == lines
    assert (folder / "previous-log.jsonl").read_bytes() == content["log.jsonl"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.replace(b"{", b"[", 1),
        lambda raw: b"\xa0" + raw[1:],
        lambda raw: raw.replace(b'"step"', b'"stdp"', 1),
        lambda raw: raw.replace(b'"loss"', bytes(6), 1),
        lambda raw: b"[" * 100_000 + raw,
        lambda raw: raw.replace(b'"step": ', b'"step": "', 1),
        lambda raw: b"\n" + raw,
    ],
)
def test_damaged_lines_of_a_log_are_left_out_and_kept_aside(tmp_path, stopped, spoil):
    content, bits, lines = stopped
    spoiled = spoil(content["log.jsonl"])
    folder, again = _written(tmp_path / "run", content | {"log.jsonl": spoiled}), small_trainer()
    with pytest.warns(UserWarning, match=r"log.jsonl: damaged in line 1, left out"):
        read = read_log(folder)
    assert [line["step"] for line in read] == [line["step"] for line in lines if line["step"] <= 17][-len(read) :]
    with pytest.warns(UserWarning, match="damaged in line 1, left out; the whole file is kept as damaged-log.jsonl"):
        run(again, folder, resume=True, log_every=4)
    assert bits_of(again) == bits and (folder / "damaged-log.jsonl").read_bytes() == spoiled
    assert _lines(folder) == lines[len(lines) - len(read_log(folder)) :]


def test_a_line_that_is_being_written_is_not_read(tmp_path, stopped):
    folder = _written(tmp_path / "run", stopped[0])
    before = read_log(folder)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 18, "lo')
    assert read_log(folder) == before
