"""Exceptions of signal handlers in the midst of calls, for `robustness.py interrupts`.

A worker is a process of its own, in which an alarm raises at a random moment of the calls of a `Simulator` or of a
`Trainer`. After each alarm, the state must be that of the whole calls before it, bit for bit. A process in which no
call ends any more is stuck; it ends itself.

    python experiments/interrupts.py CALL THREADS TIMES SEED    # one worker, which prints its figures
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn import Network, Simulator
from eventrnn.cli.terminal import as_line
from eventrnn.training import Settings, Trainer

# Seconds without a call that ends, after which a process counts as stuck.
STUCK_SECONDS = 60

# Numbers of threads of the interrupted calls.
THREADS = (1, 2, 4)

CALLS = ("step", "run", "training")

# The command line. A process that a shell started in the background would ignore SIGINT.
COMMAND = """
import signal
from eventrnn.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


class Interrupted(Exception):
    """What the handler of the alarm raises; no part of the library knows it."""


def campaign(times: int, seed: int) -> dict[str, Any]:
    """Figures of so many interrupts over every call and number of threads, a twentieth of them on the command line."""
    begun, cases = time.perf_counter(), [(call, threads) for call in CALLS for threads in THREADS]
    of_commands = times // 20
    share = -(-(times - of_commands) // len(cases))
    lines = [_in_own_process(call, threads, share, seed) for call, threads in cases]
    lines.append(_interrupted_commands(of_commands, seed))
    names = ("interrupts", "within_calls", "stuck", "wrong_states")
    totals = {name: sum(line[name] for line in lines) for name in names}
    return totals | {"cases": lines, "seconds": round(time.perf_counter() - begun, 1)}


def _in_own_process(call: str, threads: int, times: int, seed: int) -> dict[str, Any]:
    """The figures of `worker`, from a process that ends where it is stuck."""
    command = [sys.executable, __file__, call, str(threads), str(times), str(seed)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        print(finished.stdout, finished.stderr, file=sys.stderr)
        found = {"within_calls": 0, "wrong_states": 0, "stuck": 1}
    else:
        found = json.loads(finished.stdout.splitlines()[-1])
    return {"call": call, "threads": threads, "interrupts": times} | found


def worker(call: str, threads: int, times: int, seed: int) -> None:
    """Interrupt one kind of call; prints a line of figures. A process that is stuck ends with code 3."""
    rng = np.random.default_rng([seed, threads])
    advance, state, reset = {"step": _stepping, "run": _running, "training": _training}[call](threads)
    ended, within, wrong = [0], 0, 0
    for _ in range(3):
        advance()
    # Kernels are compiled by now.
    threading.Thread(target=_watch, args=(ended,), daemon=True).start()
    start = time.perf_counter()
    advance()
    seconds = max(time.perf_counter() - start, 1e-4)

    def late(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGALRM, late)
    for _ in range(times):
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
        within += inside
        found = state()
        reset()
        for _ in range(calls):
            advance()
        expected = [state()]
        # An update of a trainer that was broken off may have been finished, and so may a call that had returned.
        if call == "training" or not inside:
            advance()
            expected.append(state())
        wrong += found not in expected
        ended[0] += 1
    print(as_line({"within_calls": within, "wrong_states": wrong, "stuck": 0}), flush=True)


def _is_inside(error: BaseException) -> bool:
    """Whether an exception came from within the library."""
    names, trace = [], error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return any(f"{os.sep}eventrnn{os.sep}" in name for name in names)


def _watch(ended: list[int]) -> None:
    """End a process in which no try ends any more."""
    while True:
        before = ended[0]
        time.sleep(STUCK_SECONDS)
        if ended[0] == before:
            print("stuck", flush=True)
            os._exit(3)


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


def _interrupted_commands(times: int, seed: int) -> dict[str, Any]:
    """Two SIGINT to `eventrnn train`, the second one at any moment; the command must end."""
    rng, stuck = np.random.default_rng(seed), 0
    for k in range(times):
        with tempfile.TemporaryDirectory() as folder:
            model = str(Path(folder) / "model.safetensors")
            options = ["--hidden", "32", "--steps", "100000", "--threads", str(THREADS[k % len(THREADS)])]
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "train", "--out", model, *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            log = Path(f"{model}.run") / "config.toml"
            while process.poll() is None and not log.exists():
                time.sleep(0.05)
            time.sleep(float(rng.uniform(0, 4)))
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(float(rng.uniform(0, 0.01)))
            try:
                process.wait(STUCK_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                stuck += 1
    return {"call": "command line", "interrupts": times, "within_calls": times, "stuck": stuck, "wrong_states": 0}


if __name__ == "__main__":
    worker(sys.argv[1], *map(int, sys.argv[2:]))
