"""Writes and locks: a file is whole or absent on every file system, and files of other programs are never replaced."""

import errno
import fcntl
import os
import signal
import stat
import warnings

import pytest

from eventrnn import _files as files


@pytest.fixture(params=["hard links", "no hard links"])
def folder(request, tmp_path, monkeypatch):
    """A folder, also on a file system as memory sticks and network drives have it."""
    if request.param == "no hard links":

        def refuse(*_, **__):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    return tmp_path


def test_write_whole_new_file_is_written(folder):
    files.write_whole(folder / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("a", b"new")]


def test_write_whole_existing_file_is_refused_or_replaced(folder):
    (folder / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="'.*/a'"):
        files.write_whole(folder / "a", b"new")
    assert (folder / "a").read_bytes() == b"old"
    files.write_whole(folder / "a", b"new", overwrite=True, keep=folder / "b")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"new", "b": b"old"}
    files.write_whole(folder / "a", b"newer", overwrite=True, keep=folder / "b")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"newer", "b": b"new"}


def test_write_whole_leaves_nothing_where_the_kept_file_is_the_old_one_already(tmp_path):
    # As after a process that was killed between the two renames.
    (tmp_path / "a").write_bytes(b"old")
    os.link(tmp_path / "a", tmp_path / "b")
    files.write_whole(tmp_path / "a", b"new", overwrite=True, keep=tmp_path / "b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"old"}


def test_write_whole_file_that_appears_meanwhile_is_left(folder, monkeypatch):
    def appear(descriptor):
        (folder / "a").write_bytes(b"of another program")

    monkeypatch.setattr(os, "fsync", appear)
    with pytest.raises(FileExistsError):
        files.write_whole(folder / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("a", b"of another program")]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_whole_failing_disk_leaves_both_old_files(folder, monkeypatch, call):
    for name in "ab":
        (folder / name).write_bytes(b"old " + name.encode())
    replace = os.replace

    def fail(*arguments):
        # The write itself fails, not the renames that put files back.
        if call == "fsync" or str(arguments[1]).endswith("/a"):
            monkeypatch.setattr(os, call, replace if call == "replace" else fail)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="'.*/a'"):
        files.write_whole(folder / "a", b"new", overwrite=True, keep=folder / "b")
    assert (folder / "a").read_bytes() == b"old a" and sorted(os.listdir(folder)) in (["a"], ["a", "b"])


def test_write_whole_longest_legal_name_is_written(folder):
    name = "é" * 127
    for overwrite in (False, True):
        files.write_whole(folder / name, b"x", overwrite=overwrite)
    beside = files.name_beside(folder / name, "previous-")
    files.write_whole(folder / name, b"y", overwrite=True, keep=beside)
    assert beside.read_bytes() == b"x" and len(os.fsencode(beside.name)) <= 255
    assert files.name_beside(folder / "short", "previous-").name == "previous-short"
    assert files.name_beside(folder / ("a" * 250 + "1"), "p-" * 9) != files.name_beside(folder / ("a" * 251), "p-" * 9)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_write_whole_replaced_file_keeps_its_permissions(tmp_path, mode):
    path, umask = tmp_path / "a", os.umask(0o022)
    try:
        files.write_whole(path, b"one")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, "a new file follows the umask"
        path.chmod(mode)
        files.write_whole(path, b"two", overwrite=True)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b"two"


def test_write_whole_group_that_cannot_be_given_loses_its_rights(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    path.chmod(0o660)
    mine = os.fstat

    def of_another_group(descriptor):
        found = list(mine(descriptor))
        found[5] += 1
        return os.stat_result(found)

    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fstat", of_another_group)
    monkeypatch.setattr(os, "fchown", refuse)
    files.write_whole(path, b"two", overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_bytes() == b"two"


def test_write_whole_file_system_without_fsync_is_enough(folder, monkeypatch):
    def unknown(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", unknown)
    files.write_whole(folder / "a", b"x")
    assert (folder / "a").read_bytes() == b"x"


def test_clean_foreign_files_are_left(tmp_path):
    (tmp_path / ".mine.tmp").touch()
    (tmp_path / files.TEMPORARY.format("0123")).touch()
    files.clean(tmp_path)
    assert os.listdir(tmp_path) == [".mine.tmp"]


# --- locks --------------------------------------------------------------------------------------------------


def test_locked_second_holder_is_refused_until_the_first_ends(tmp_path):
    words = f"in use by process {os.getpid()} on "
    with files.locked(tmp_path), pytest.raises(ValueError, match=words), files.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with files.locked(tmp_path):
        pass


def test_locked_killed_process_leaves_no_lock(tmp_path):
    begun, begin = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        with files.locked(tmp_path):
            os.write(begin, b".")
            signal.pause()
    assert os.read(begun, 1) == b"."
    with pytest.raises(ValueError, match=f"in use by process {child} on"), files.locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path) == [files.LOCK]
    with files.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_locked_words_of_a_foreign_lock_cannot_steer_the_terminal(tmp_path):
    descriptor = os.open(tmp_path / files.LOCK, os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"\x1b[2J\xff")
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="in use by") as caught, files.locked(tmp_path):
        pass
    os.close(descriptor)
    assert str(caught.value).isprintable() and r"\x1b[2J" in str(caught.value)


def test_locked_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.warns(UserWarning, match="has no locks .*let no second process"), files.locked(tmp_path):
        pass


def test_printable_control_characters_are_escaped_and_long_text_is_cut():
    assert files.printable("é µ\x1b[31m\n\u202e\ud800") == r"é µ\x1b[31m\n\u202e\ud800"
    assert files.printable("x" * 9, 5) == "xxxxx…"
