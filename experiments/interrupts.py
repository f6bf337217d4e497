"""Exceptions of signal handlers in the midst of calls, for `robustness.py interrupts`.

A worker is a process of its own that is interrupted many times. In the workers of calls an alarm raises at a random
moment of the calls of a `Simulator` or of a `Trainer`; the state must then be that of the whole calls before it, bit
for bit. The workers of commands send Ctrl-C to commands, once or twice, see `interrupted_commands.py`. A worker in
which nothing ends any more is stuck; it ends itself.

    python experiments/interrupts.py CALL THREADS TIMES SEED SECONDS    # one worker, which prints its figures
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import typer
from command_line import command
from interrupted_commands import COMMANDS, Commands

from eventrnn import Network, Simulator
from eventrnn.cli.terminal import as_line
from eventrnn.training import Settings, Trainer

# Seconds without a call that ends, after which a process counts as stuck.
STUCK_SECONDS = 60

# Numbers of threads of the interrupted calls.
THREADS = (1, 2, 4)

CALLS = ("step", "run", "training")

# Interrupts of one worker, at most. More workers than cases keep all cores at work until the end.
SHARE = 60

# Faults that a worker describes; all of them are counted.
DESCRIBED = 5


class Interrupted(Exception):
    """What the handler of the alarm raises; no part of the library knows it."""


def campaign(times: int, seed: int, workers: int, seconds: float) -> dict[str, Any]:
    """Figures of so many interrupts over every call and number of threads, a quarter of them on the command line.

    workers : processes that run side by side
    seconds : no interrupt is begun after so many seconds
    """
    begun = time.perf_counter()
    cases = [(call, threads) for call in CALLS for threads in THREADS]
    commands = [(command, threads) for command in COMMANDS for threads in THREADS]
    asked = dict.fromkeys(cases, -(-3 * times // (4 * len(cases))))
    asked |= dict.fromkeys(commands, -(-times // (4 * len(commands))))

    def figures_of(call: str, threads: int, times: int, seed: int) -> dict[str, Any]:
        return _in_own_process(call, threads, times, seed, seconds - (time.perf_counter() - begun))

    with ThreadPoolExecutor(workers) as pool:
        # One worker per call compiles its kernels; the others find them in the cache.
        list(pool.map(lambda call: figures_of(call, 1, 0, seed), (*CALLS, *COMMANDS)))
        shares = [
            (*case, min(SHARE, total - first), seed + first)
            for case, total in asked.items()
            for first in range(0, total, SHARE)
        ]
        found = list(pool.map(lambda share: figures_of(*share), shares))
    names = ("interrupts", "within_calls", "stuck", "wrong_states")
    lines = []
    for call, threads in asked:
        own = [line for line in found if (line["call"], line["threads"]) == (call, threads)]
        described = [words for line in own for words in line["described"]][:DESCRIBED]
        lines.append(
            {"call": call, "threads": threads}
            | {name: sum(line[name] for line in own) for name in names}
            | ({"described": described} if described else {})
        )
    totals = {name: sum(line[name] for line in lines) for name in names}
    return totals | {"cases": lines, "workers": workers, "seconds": round(time.perf_counter() - begun, 1)}


def _in_own_process(call: str, threads: int, times: int, seed: int, seconds: float) -> dict[str, Any]:
    """The figures of a worker, which ends where it is stuck. What it did before it failed counts."""
    command = [sys.executable, __file__, call, *map(str, (threads, times, seed, seconds))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    written = finished.stdout.splitlines()
    if written and written[-1].startswith("{"):
        return json.loads(written[-1])
    # It did not even print its figures.
    last = (finished.stderr.splitlines() or ["no message"])[-1]
    described = [f"the worker ended with code {finished.returncode}: {last}"]
    return Figures(call, threads).line() | {"wrong_states": 1, "described": described}


class Figures:
    """What a worker has done so far. A thread watches that it goes on, and ends a process that is stuck."""

    def __init__(self, call: str, threads: int):
        self.case = {"call": call, "threads": threads}
        self.interrupts = self.within = self.stuck = self.wrong = 0
        self.described: list[str] = []

    def add(self, *, within: bool, fault: str = "") -> None:
        """Count one interrupt. `within` says whether it met a call; `fault` is empty if there was none."""
        self.interrupts, self.within, self.wrong = self.interrupts + 1, self.within + within, self.wrong + bool(fault)
        if fault and len(self.described) < DESCRIBED:
            self.described.append(fault)

    def line(self) -> dict[str, Any]:
        """The figures as fields of a result."""
        counted = {"interrupts": self.interrupts, "within_calls": self.within}
        return self.case | counted | {"stuck": self.stuck, "wrong_states": self.wrong, "described": self.described}

    def watch(self) -> None:
        """From now on, end this process where no interrupt is counted for `STUCK_SECONDS`."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            before = self.interrupts
            time.sleep(STUCK_SECONDS)
            if self.interrupts == before:
                self.stuck += 1
                print(as_line(self.line()), flush=True)
                os._exit(3)


def worker(
    call: Annotated[str, typer.Argument(help=f"One of {', '.join((*CALLS, *COMMANDS))}.")],
    threads: Annotated[int, typer.Argument(min=1, help="Threads of the calls.")],
    times: Annotated[int, typer.Argument(min=0, help="Interrupts after which the worker ends.")],
    seed: Annotated[int, typer.Argument(min=0, help="Seed of the moments.")],
    seconds: Annotated[float, typer.Argument(min=0, help="Time after which the worker ends.")],
) -> None:
    """Interrupt one kind of call or command; prints a line of figures. Kernels are compiled before the first time."""
    figures, rng, until = Figures(call, threads), np.random.default_rng([seed, threads]), time.monotonic() + seconds
    if call in COMMANDS:
        with Commands(call, threads) as commands:
            figures.watch()
            while figures.interrupts < times and time.monotonic() < until:
                figures.add(**commands.interrupted(rng, STUCK_SECONDS / 2))
    else:
        _interrupt_calls(call, threads, times, rng, until, figures)
    print(as_line(figures.line()), flush=True)


def _interrupt_calls(
    call: str, threads: int, times: int, rng: np.random.Generator, until: float, figures: Figures
) -> None:
    advance, state, reset = {"step": _stepping, "run": _running, "training": _training}[call](threads)
    for _ in range(3):
        advance()
    start = time.perf_counter()
    advance()
    seconds = max(time.perf_counter() - start, 1e-4)
    figures.watch()

    def late(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGALRM, late)
    while figures.interrupts < times and time.monotonic() < until:
        # The wait is drawn so that the alarm comes within one of the next calls, at any place of it.
        calls, inside = 0, False
        reset()
        try:
            signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-5, 4 * seconds)))
            while True:
                advance()
                calls += 1
        except Interrupted as raised:
            inside = _is_inside(raised)
        found = state()
        reset()
        for _ in range(calls):
            advance()
        expected = [state()]
        # An update of a trainer that was broken off may have been finished, and so may a call that had returned.
        if call == "training" or not inside:
            advance()
            expected.append(state())
        figures.add(within=inside, fault="" if found in expected else f"another state after {calls} calls")


def _is_inside(error: BaseException) -> bool:
    """Whether an exception came from within the library."""
    names, trace = [], error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return any(f"{os.sep}eventrnn{os.sep}" in name for name in names)


Way = tuple[Callable[[], object], Callable[[], bytes], Callable[[], object]]


def _network() -> Network:
    return Network.random([128, 64], inputs=32, readout=8, rng=np.random.default_rng(0), threshold=0.1)


def _stepping(threads: int) -> Way:
    simulator, x = Simulator(_network(), batch=4, threads=threads), _inputs(1)[0]
    # Two layers of 128 and 64 units are little work; without a stepper, a step is a run on all threads.
    if threads == 4:
        simulator.engine.stepper = lambda state: None
    return lambda: simulator.step(x), lambda: _bytes(simulator), simulator.reset


def _running(threads: int) -> Way:
    simulator, x = Simulator(_network(), batch=4, threads=threads), _inputs(150)
    return lambda: simulator.run(x, record="events"), lambda: _bytes(simulator), simulator.reset


def _training(threads: int) -> Way:
    text = np.random.default_rng(3).integers(0, 7, 3000)
    network = Network.random([32], symbols=7, embedding=8, readout=7, rng=np.random.default_rng(0), threshold=0.1)
    trainer = Trainer(network, text, Settings(steps=10**6, batch=4, window=10, threads=threads, backward="sparse"))
    arrays, numbers = {name: array.copy() for name, array in trainer.arrays().items()}, trainer.numbers()

    def state() -> bytes:
        named = trainer.arrays()
        return b"".join(named[name].tobytes() for name in sorted(named)) + json.dumps(trainer.numbers()).encode()

    return trainer.step, state, lambda: trainer.restore(arrays, numbers)


def _inputs(steps: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(steps, 4, 32)).astype(np.float32)


def _bytes(simulator: Simulator) -> bytes:
    state = simulator.state
    return b"".join(array.tobytes() for array in (*state.cells, *state.outputs))


if __name__ == "__main__":
    command(worker, __doc__).run()
