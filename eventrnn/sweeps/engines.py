"""The engines that run points: each makes a `concurrent.futures.Executor`, and nothing of it is imported before.

An engine is a name, or an executor of the caller. A name is checked before any work: that its library is there, that an
address answers, that the options are its own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eventrnn import __version__
from eventrnn._checks import need_choice, need_kind, need_text, need_whole
from eventrnn._files import printable
from eventrnn._gpus import visible_gpus
from eventrnn.sweeps.worker import Job, begin_process, run_point, run_point_in_pool

# Seconds within which the scheduler of an address must answer.
PATIENCE = 10.0


@dataclass(frozen=True)
class Known:
    """An engine that is known by name.

    Attributes
    ----------
    package : the package that must be installed, or "" for none
    install : what installs it
    options : the options that it takes
    summary : a few words for a help text
    """

    package: str
    install: str
    options: tuple[str, ...]
    summary: str


#: name -> engine
ENGINES: dict[str, Known] = {
    "processes": Known("", "", ("workers",), "processes of this machine"),
    "loky": Known("joblib", "eventrnn[sweep]", ("workers",), "processes of this machine, by joblib"),
    "dask": Known("distributed", "eventrnn[sweep]", ("address",), "the workers of a dask scheduler"),
    "executorlib": Known("executorlib", "executorlib", ("workers",), "processes of this machine, by executorlib"),
    "slurm": Known("executorlib", "executorlib", ("workers",), "srun within an allocation of Slurm, by executorlib"),
    "mpi": Known("mpi4py", "mpi4py", ("workers",), "ranks of MPI, by mpi4py.futures"),
}


@dataclass(frozen=True)
class Needs:
    """What the points of a sweep need of their workers.

    Attributes
    ----------
    points  : number of points
    threads : most threads of a point
    gpu     : whether a point trains on a GPU
    folder  : of the sweep, which every worker must see
    """

    points: int
    threads: int
    gpu: bool
    folder: Path


class Engine:
    """What runs points.

    Attributes
    ----------
    task     : the function that is submitted
    capacity : points that are submitted at a time; None for all
    renews   : whether the executor is the engine's own, which can make another one after the death of a worker
    """

    def __init__(
        self,
        make: Callable[[], Executor],
        *,
        task: Callable[[Job], dict[str, Any]] = run_point,
        capacity: int | None = None,
        renews: bool = False,
        end: Callable[[Any], None] = lambda executor: executor.shutdown(wait=True, cancel_futures=True),
        lost: Callable[[], str] = lambda: "",
        close: Callable[[], object] = lambda: None,
    ):
        self.make, self.task, self.capacity, self.renews = make, task, capacity, renews
        self.lost, self._end, self._close = lost, end, close
        self.executor: Executor | None = None

    def submit(self, job: Job) -> Any:
        """The future of a point. The executor is made by the first call."""
        if self.executor is None:
            self.executor = self.make()
        return self.executor.submit(self.task, job)

    def renew(self) -> None:
        """Give up an executor that is broken."""
        if self.executor is not None:
            self._end(self.executor)
            self.executor = None

    def close(self) -> None:
        """End the executor, unless it is one of the caller."""
        if self.executor is not None and self.renews:
            self.renew()
        self._close()


def engine_of(executor: str | Executor, needs: Needs, workers: int | None, address: str | None) -> Engine:
    """The engine that is asked for.

    executor : a name in `ENGINES`, or an executor, which is used as it is and not shut down
    workers  : number of processes; as many as the cores allow by default, or one per GPU
    address  : of a dask scheduler, such as "tcp://10.0.0.1:8786"

    Raises ValueError for an unknown name, for an option that the engine does not take, and for an address that does not
    answer; ImportError for a library that is not installed.
    """
    if not isinstance(executor, str):
        need_kind("executor", executor, Executor, "a concurrent.futures.Executor, or a name")
        for name, value in (("workers", workers), ("address", address)):
            if value is not None:
                raise ValueError(f"{name}: got {value!r}, but an executor that is given has its own; leave it out")
        return Engine(lambda: executor)
    need_choice("executor", executor, ENGINES)
    known = ENGINES[executor]
    for name, value in (("workers", workers), ("address", address)):
        if value is not None and name not in known.options:
            raise ValueError(f"{name}: got {value!r}, but the executor {executor} does not take it; leave it out")
    if workers is not None:
        need_whole("workers", workers, at_least=1)
    if known.package and find_spec(known.package) is None:
        raise ImportError(f"executor: {executor} needs {known.package}: pip install '{known.install}'")
    if executor == "dask":
        if address is None:
            raise ValueError("address: got none; dask needs the address of its scheduler, such as tcp://10.0.0.1:8786")
        return _dask(need_text("address", address), needs)
    count = workers or default_workers(needs)
    if executor in ("processes", "loky"):
        _warn_of_too_many(count, needs)
    return {"processes": _processes, "loky": _loky, "executorlib": _executorlib, "slurm": _slurm, "mpi": _mpi}[
        executor
    ](count, needs)


def default_workers(needs: Needs) -> int:
    """As many processes as the cores of this process allow, or one per GPU; no more than there are points."""
    possible = len(visible_gpus()) or 1 if needs.gpu else max(1, cores() // needs.threads)
    return max(1, min(possible, needs.points))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _warn_of_too_many(workers: int, needs: Needs) -> None:
    if workers * needs.threads > cores():
        warnings.warn(
            f"workers: {workers} processes of {needs.threads} threads share the {cores()} cores of this process",
            stacklevel=4,
        )


def _processes(workers: int, needs: Needs) -> Engine:
    # A forked process would have the locks of threads that it has not.
    context = multiprocessing.get_context("spawn")

    def make() -> Executor:
        return ProcessPoolExecutor(workers, context, initializer=begin_process, initargs=(os.getpid(),))

    return Engine(make, task=run_point_in_pool, capacity=workers, renews=True)


def _loky(workers: int, needs: Needs) -> Engine:
    def make() -> Executor:
        from joblib.externals.loky import ProcessPoolExecutor as LokyExecutor

        return LokyExecutor(workers, initializer=begin_process, initargs=(os.getpid(),))

    # Its shutdown cannot cancel, and nothing waits: no more points are submitted than there are workers.
    return Engine(make, capacity=workers, renews=True, end=lambda executor: executor.shutdown(wait=True))


def _executorlib(workers: int, needs: Needs) -> Engine:
    import executorlib

    resources = {"cores": 1, "threads_per_core": needs.threads, "cwd": os.getcwd()}
    return Engine(
        lambda: executorlib.SingleNodeExecutor(
            max_workers=workers, resource_dict=resources, block_allocation=True, hostname_localhost=True
        ),
        capacity=workers,
        renews=True,
    )


def _slurm(workers: int, needs: Needs) -> Engine:
    import executorlib

    resources = {"cores": 1, "threads_per_core": needs.threads, "cwd": os.getcwd()}
    if needs.gpu:
        resources["gpus_per_core"] = 1
    return Engine(
        lambda: executorlib.SlurmJobExecutor(max_workers=workers, resource_dict=resources, block_allocation=True),
        capacity=workers,
        renews=True,
    )


def _mpi(workers: int, needs: Needs) -> Engine:
    try:
        from mpi4py.futures import MPIPoolExecutor
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"executor: mpi4py finds no MPI library ({error}); install one, such as openmpi") from None
    return Engine(lambda: MPIPoolExecutor(workers), capacity=workers, renews=True)


def _dask(address: str, needs: Needs) -> Engine:
    from distributed import Client
    from distributed.comm.addressing import get_address_host_port, parse_address

    try:
        # A client that gets no answer takes much longer to say so, and to end.
        host_and_port = get_address_host_port(address)
        if parse_address(address)[0] in ("tcp", "tls"):
            socket.create_connection(host_and_port, PATIENCE).close()
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"address: no scheduler answers at {printable(address)} ({error or type(error).__name__}); start one with "
            "`dask scheduler`, and workers with `dask worker ADDRESS --nthreads 1`"
        ) from None
    try:
        _check_workers(client, needs.folder)
    except BaseException:
        client.close()
        raise

    def lost() -> str:
        return "" if client.status == "running" else f"the scheduler at {address} is gone"

    return Engine(lambda: client.get_executor(pure=False), lost=lost, close=client.close)


def _check_workers(client: Any, folder: Path) -> None:
    """Refuse workers that would not train alone, that have another version, or that do not see the folder."""
    threads = client.nthreads()
    many = [name for name, number in threads.items() if number > 1]
    if many:
        raise ValueError(
            f"address: the dask worker {many[0]} has {threads[many[0]]} threads, but a process trains one point at a "
            "time; start workers with `dask worker ADDRESS --nworkers N --nthreads 1`"
        )
    try:
        found = client.run(_looked, str(folder.absolute().parent))
    except ImportError as error:
        raise ValueError(f"address: a dask worker cannot import eventrnn ({error}); install it there") from None
    for name, (version, there) in found.items():
        if version != __version__:
            raise ValueError(
                f"address: the dask worker {name} has eventrnn {version}, not {__version__}; install the same version"
            )
        if not there:
            raise ValueError(
                f"address: the dask worker {name} does not see {printable(folder.absolute().parent)}; give a folder "
                "that all machines share"
            )
    if not found:
        warnings.warn("the dask scheduler has no workers yet; the points wait for them", stacklevel=5)


def _looked(folder: str) -> tuple[str, bool]:
    return __version__, Path(folder).is_dir()
