"""Downloads into the user's cache folder, held against a checksum. The work is done by pooch, the extra `data`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from eventrnn._files import printable


class DownloadError(ValueError):
    """The file cannot be had: pooch is missing, there is no connection, or the content is not the expected one."""


class _Bytes:
    """What pooch calls while it downloads: `report(done, total)`, in bytes."""

    def __init__(self, report: Callable[[int, int], None], size: int):
        self.report, self.total, self.size, self.done = report, size, size, 0

    def update(self, more: int) -> None:
        # A server need not say how long the file is. The last chunk is counted as a whole one.
        self.done += more
        total = self.total or self.size
        self.report(min(self.done, total), total)

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        pass


def retrieve(
    address: str,
    sha256: str,
    folder: Path,
    *,
    name: str | None = None,
    size: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """The file of an http, https or ftp address in a folder. One that is there already is not downloaded again.

    sha256 : checksum of the content; a file in the folder with another content is replaced
    name   : name of the file; that of the address by default
    size   : bytes, for the report where the server does not say them
    report : called with the bytes done and the bytes in all

    The file appears when it is complete and right. Raises `DownloadError`, whose message says why without the address.
    """
    try:
        import pooch
    except ImportError:
        raise DownloadError("downloads need pooch: pip install 'eventrnn[data]'") from None
    # pooch says on stderr what it does, which would break a progress bar.
    pooch.get_logger().setLevel(logging.WARNING)
    chosen = name or address.partition("?")[0].rpartition("/")[2]
    # The annotations of pooch do not allow its own downloaders.
    through: Any = None if report is None else pooch.HTTPDownloader(progressbar=cast(Any, _Bytes(report, size)))
    try:
        return Path(pooch.retrieve(address, f"sha256:{sha256}", fname=chosen, path=folder, downloader=through))
    except (OSError, ValueError) as error:
        raise DownloadError(printable(" ".join(str(error).split()), 400)) from error
