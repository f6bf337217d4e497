"""Several fake GPUs: one process each, as on a real machine, whose copies to each other go through sockets.

The processes, what they tell each other, and what the kernels do are those of a real run; see `fake_training.py`.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import pytest

from support import fake_training
from support.fake_gpu import enqueued

TESTS = str(Path(__file__).parents[1])

PROGRAM = "from support.fake_devices import main; main()"


class SocketGroup:
    """Stands for `nccl.Nccl`."""

    def __init__(self, device, identifier: bytes, rank: int, ranks: int):
        folder, self.peers = identifier.decode(), dict[int, Connection]()
        with Listener(f"{folder}/{rank}", backlog=ranks) as listener:
            for peer in range(rank):
                self.peers[peer] = _connected(f"{folder}/{peer}")
                self.peers[peer].send(rank)
            for _ in range(rank + 1, ranks):
                connection = listener.accept()
                self.peers[connection.recv()] = connection

    def copy(self, queue, sends, receives) -> None:
        enqueued(self._copy)(list(sends), list(receives))

    def _copy(self, sends, receives) -> None:
        for address, nbytes, peer in sends:
            self.peers[peer].send_bytes(ctypes.string_at(address, nbytes))
        for address, nbytes, peer in receives:
            found = self.peers[peer].recv_bytes()
            assert len(found) == nbytes, "a copy has the size that was sent"
            ctypes.memmove(address, found, nbytes)

    def abort(self) -> None:
        for each in self.peers.values():
            each.close()


def _connected(path: str) -> Connection:
    while True:
        try:
            return Client(path)
        except (FileNotFoundError, ConnectionRefusedError):
            # The other process does not listen yet.
            os.sched_yield()


def install(monkeypatch, devices: int = 2, room: int = 1 << 40) -> fake_training.TrainingDevice:
    """Let `backend="cuda"` train on so many fakes."""
    from eventrnn.training.data_parallel import crew

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices))))
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
    monkeypatch.setenv("EVENTRNN_TEST_ROOM", str(room))
    monkeypatch.setattr(crew, "PROGRAM", PROGRAM)
    return _install(monkeypatch)


def _install(monkeypatch) -> fake_training.TrainingDevice:
    from eventrnn.cuda import nccl

    device = fake_training.install(monkeypatch, room=int(os.environ["EVENTRNN_TEST_ROOM"]))
    device.bus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0]
    monkeypatch.setattr(nccl, "Nccl", SocketGroup)
    monkeypatch.setattr(nccl, "new_identifier", lambda device: tempfile.mkdtemp().encode())
    return device


def main() -> None:
    """A worker process on a fake."""
    from eventrnn.training.data_parallel import worker

    _install(pytest.MonkeyPatch())
    worker.main()
