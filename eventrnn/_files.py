"""Atomic, durable file writes, locks of folders, text of files for a terminal, and the cache folder of the package."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import stat
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

# What a file system answers that does not know a system call.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

# What a write answers where the disk, the share of a user, or the file that the system allows is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Longest name of a file in bytes on all common file systems.
LONGEST_NAME = 255

TEMPORARY = ".eventrnn-{}.tmp"

LOCK = ".lock"


def cache_folder() -> Path:
    """Folder for files that can be made again.

    The environment variable `EVENTRNN_CACHE` overrides it. It may not exist. Raises OSError where there is no home.
    """
    if named := os.environ.get("EVENTRNN_CACHE"):
        return Path(named)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "eventrnn"
    try:
        return Path.home() / ".cache" / "eventrnn"
    except RuntimeError:
        raise OSError("there is no home folder; set EVENTRNN_CACHE to a folder that can be written") from None


# --- writing ------------------------------------------------------------------------------------------------


def write_whole(target: Path, raw: bytes, *, overwrite: bool = False, keep: Path | None = None) -> None:
    """Write a file atomically: under a temporary name, flushed to disk, then renamed.

    A reader sees the old file or the new one. The new file has the permissions of the file that it replaces: mode,
    access control list, and owner where the process may set it. A file system without hard links is enough.

    overwrite : replace an existing file; otherwise raise `FileExistsError`, also for a file that appears meanwhile
    keep      : path in the same folder under which the existing file is kept. A file exists under `target` at every
                moment where the file system has hard links, elsewhere under `target` or `keep`

    Raises `OSError` of the disk with the name of the target; the old file is then unchanged. A process that is killed
    meanwhile leaves a hidden `.tmp` file, and on a file system without hard links perhaps an empty new file.
    """
    # The temporary file is in the same folder, because a rename is atomic only within a file system. Its name does not
    # contain that of the target, which may be as long as names can be.
    temporary = target.with_name(TEMPORARY.format(uuid.uuid4().hex))
    replaced = target if overwrite and target.exists() else None
    try:
        # A file that replaces a private one is never readable by others, not even while it is written.
        with open(temporary, "xb", opener=_private if replaced else None) as file:
            if replaced is not None:
                _copy_permissions(replaced, file.fileno())
            file.write(raw)
            file.flush()
            _sync(file.fileno())
        if keep is not None and target.exists():
            _keep(target, keep)
        if overwrite:
            _replace(temporary, target, keep)
        else:
            _move_to_new(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # The error names the temporary file, or none.
            raise OSError(error.errno, error.strerror, os.fspath(target)) from None
        raise
    _sync_folder(target.parent)


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file in the notation of `sha256sum`. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_arrays(path: str | os.PathLike) -> np.ndarray | dict[str, np.ndarray]:
    """The array of a `.npy` file, or the arrays of an `.npz` file by name, without the objects of Python that one can
    hold and that could run code.

    Raises ValueError for what NumPy cannot read or memory cannot hold, and OSError of the file.
    """
    name = printable(Path(path).name)
    with open(path, "rb") as file:
        try:
            found = np.load(file, allow_pickle=False)
            return found if isinstance(found, np.ndarray) else dict(found)
        except MemoryError:
            raise ValueError(f"{name}: holds an array, or says so, that does not fit into memory") from None
        except Exception as error:
            # A damaged archive raises what its decompressor, the reader of its table and that of its headers raise:
            # zlib.error, BadZipFile, struct.error, SyntaxError, RuntimeError and others.
            raise ValueError(f"{name}: NumPy cannot read it ({error or type(error).__name__})") from None


def clean(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    for file in folder.glob(TEMPORARY.format("*")):
        file.unlink(missing_ok=True)


def name_beside(path: Path, prefix: str) -> Path:
    """The path with a prefix before its name, or before a digest of a name that would become too long."""
    name = prefix + path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = prefix + hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(name)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _copy_permissions(source: Path, descriptor: int) -> None:
    """Give an open file the owner, the mode and the access control list of another file."""
    found, mine = source.stat(), os.fstat(descriptor)
    mode = stat.S_IMODE(found.st_mode)
    if (found.st_uid, found.st_gid) != (mine.st_uid, mine.st_gid):
        try:
            os.fchown(descriptor, found.st_uid, found.st_gid)
        except OSError:
            try:
                os.fchown(descriptor, -1, found.st_gid)
            except OSError:
                # Another group than before gets no more rights than everyone has.
                mode &= ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    # Some file systems have no permissions.
    with suppress(OSError):
        os.fchmod(descriptor, mode)
    with suppress(OSError):
        for name in os.listxattr(source):
            if name == "system.posix_acl_access" or name.startswith("user."):
                os.setxattr(descriptor, name, os.getxattr(source, name))


def _keep(target: Path, keep: Path) -> None:
    """Make `keep` the file that `target` is."""
    second = keep.with_name(TEMPORARY.format(uuid.uuid4().hex))
    try:
        try:
            os.link(target, second)
        except OSError:
            # Without hard links, the old file is renamed. A copy would need more room and more time.
            os.replace(target, keep)
            return
        os.replace(second, keep)
    finally:
        # It stays where `keep` is the same file already, after a process that was killed: the system then renames
        # nothing.
        with suppress(OSError):
            second.unlink(missing_ok=True)


def _replace(temporary: Path, target: Path, keep: Path | None) -> None:
    try:
        os.replace(temporary, target)
    except OSError:
        if keep is not None and not target.exists() and keep.exists():
            os.replace(keep, target)
        raise


def _move_to_new(temporary: Path, target: Path) -> None:
    """Rename, unless the target exists. Raises `FileExistsError`."""
    try:
        # Unlike a rename, a link fails if a file with that name has appeared meanwhile.
        os.link(temporary, target)
    except FileExistsError:
        # Over a network the answer to a link that succeeded can be lost, and the second request fails.
        if not target.exists() or not os.path.samefile(temporary, target):
            raise
    except OSError:
        # Without hard links, an empty file reserves the name. Its creation fails if the name is taken.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(temporary, target)
        except OSError:
            target.unlink(missing_ok=True)
            raise
        return
    temporary.unlink()


def _sync(descriptor: int) -> None:
    """Flush a file to the disk, on file systems that can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable. Some file systems refuse it; the file is complete all the same.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_endless(path: str | os.PathLike) -> bool:
    """Whether a path is a device other than a terminal, such as /dev/zero, of which nobody knows where it ends."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    if stat.S_ISBLK(mode):
        return True
    if not stat.S_ISCHR(mode) or os.path.samefile(path, os.devnull):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        return not os.isatty(descriptor)
    finally:
        os.close(descriptor)


# --- locks --------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that no second process or thread works in it.

    The lock ends with the process, however it ends. A file `.lock` is in the folder meanwhile; one that a killed
    process left does not matter. Where the file system has no locks, a warning says so.

    Raises `ValueError` if the folder is locked, and `OSError` if it cannot be written.
    """
    path = folder / LOCK
    descriptor = _lock(path)
    try:
        yield
    finally:
        # The file is removed while the lock is held. A process that opened it meanwhile sees that it is gone.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    # The words for the others. The lock holds without them, on a full disk for example.
                    with suppress(OSError):
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return descriptor
        except BlockingIOError:
            holder = printable(os.pread(descriptor, 200, 0).decode(errors="replace")) or "another process"
            os.close(descriptor)
            raise ValueError(
                f"folder: {printable(path.parent)} is in use by {holder}; wait for it, or give another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{printable(path.parent)}: its file system has no locks ({error.strerror}); let no second process "
                "work in this folder",
                stacklevel=4,
            )
            return descriptor
        # The last holder removed the file between the two calls.
        os.close(descriptor)


def full_disk(error: OSError) -> str:
    """What to say of an error in `FULL`: the file, and what to do."""
    name = "standard output" if error.filename is None else printable(error.filename)
    words = f"{name}: {error.strerror}"
    # A run says how it is continued, too.
    return words if "make room" in words else f"{words}; make room there, or name a place on another disk"


# --- text ---------------------------------------------------------------------------------------------------


def printable(text: object, limit: int = 2000) -> str:
    """Text from a file or a name as a terminal may show it: on one line, control characters escaped, long text cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[:limit])
    return shown if len(str(text)) <= limit else f"{shown}…"
