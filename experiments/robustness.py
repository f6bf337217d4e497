"""What must never happen, tried very often: damaged files, killed runs, full disks, interrupts, endless streams.

    python experiments/robustness.py files --times 1000000   # loads damaged model files, as they are and signed again
    python experiments/robustness.py kills --times 300       # kills training by signal 9 and compares the resumed runs
    python experiments/robustness.py disks --times 200       # saves and trains on disks that are full or read-only
    python experiments/robustness.py interrupts --times 2000 # raises in the midst of calls and compares the states
    python experiments/robustness.py stream --steps 1e9      # compares chunks of random length with long runs

Each campaign appends one line to results/robustness.jsonl: what was tried, how often, and every fault. The line is
written however many times the campaign got to before `--minutes` were over. A stream goes on where it stopped.
"""

import hashlib
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command_line import commands
from interrupts import campaign
from records import Records

from eventrnn import CSR, Network, Simulator, State, io, load, save
from eventrnn._files import printable, write_whole
from eventrnn.cli.terminal import as_line
from eventrnn.io.model_file import encoded
from eventrnn.pruning import Blocks, DynamicMasks, GradualPruning, MovementPruning, RegrownMasks
from eventrnn.training import LanguageModelling, Settings, Trainer, load_checkpoint, read_log, run
from eventrnn.weights import convert

RESULTS = Path(__file__).parent / "results" / "robustness.jsonl"

RUNS = Path(__file__).parent.parent / "runs"

# A model file may take so many seconds of processor time, and so many bytes beside what is in memory before.
SECONDS, BYTES = 2.0, 1 << 30

# A process that waits takes no processor time. After so many seconds on the clock it counts as hanging too.
PATIENCE = 60.0

# Faults of a campaign that its line describes; all of them are counted.
DESCRIBED = 10

Times = Annotated[int, typer.Option(help="How often.")]

Seed = Annotated[int, typer.Option(help="Seed of everything random.")]

Minutes = Annotated[float, typer.Option(help="End after so many minutes.")]

app = commands(__doc__)


def record(campaign: str, faults: list[dict[str, Any]], seed: int, **figures: Any) -> None:
    """Append the line of a campaign, and print it."""
    line = {"campaign": campaign, "faults": len(faults), "described": faults[:DESCRIBED], "seed": seed}
    print(as_line(Records(RESULTS, ("campaign",)).add(line | figures)))


# --- damaged model files ------------------------------------------------------------------------------------


def originals() -> list[bytes]:
    """Model files of every format and storage, small."""
    rng = np.random.default_rng(0)
    plain = Network.random([6, 5], inputs=4, readout=4, rng=rng, metadata={"vocabulary": "a\x1b[31m[bold]"})
    tied = Network.random([5], symbols=7, embedding=5, tied=True, rng=rng)
    found = [plain, tied]
    for storage in ("float32", "bfloat16", "int8"):
        for options in ({"block": (2, 4)}, {"block": (1, 1)}, {"nm": (3, 3, "post")}, {"nm": (4, 4, "pre")}, {}):
            to = "block" if "block" in options else "nm" if "nm" in options else "csr"
            changed = {name: convert(w, to, storage=storage, **options) for name, w in plain.matrices().items()}
            found.append(plain.with_matrices(changed))
    return [encoded(network) for network in found]


# Values for descriptions: of wrong types, too large, too deep, and text that steers terminals.
ODD = (
    *(None, True, False, 0, -1, 1, 2, 3, 1.5, float("nan"), float("inf")),
    *(2**29, 2**31 - 1, 2**31, 2**40, 2**63, 10**400),
    *("", "x" * 5000, "\x1b[2J\x07", "[bold red]", "\ud800", "\u202e"),
    *("dense", "csr", "block", "nm", "post", "F64", "BF16", "F32", "I8"),
    *([], {}, [[]], {"a": {}}, ["values"]),
    *([2**29, 15], [4, 2**27], [0, 2**31 - 1], [2**31 - 1, 0], [1, 2, 3]),
)


def damaged(original: bytes, rng: np.random.Generator) -> bytes:
    """The file with changed, missing, doubled or foreign bytes."""
    raw, way = bytearray(original), rng.integers(6)
    at = [int(k) for k in rng.integers(0, len(raw), 2)]
    start, stop = min(at), max(at)
    if way == 0:
        for bit in rng.integers(0, 8 * len(raw), rng.integers(1, 9)):
            raw[bit // 8] ^= 1 << int(bit % 8)
    elif way == 1:
        raw[start:stop] = rng.bytes(stop - start)
    elif way == 2:
        del raw[start:stop]
    elif way == 3:
        raw[start:start] = rng.bytes(int(rng.integers(1, 64)))
    elif way == 4:
        raw[start:stop] = bytes(stop - start)
    else:
        raw[:8] = int(rng.choice([0, 1, 9, len(raw), 2**20, 2**31, 2**63 - 1])).to_bytes(8, "little")
    return bytes(raw)


def changed(value: Any, rng: np.random.Generator) -> Any:
    """A description with one odd value, one part left out, doubled or exchanged, at a random place."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return ODD[rng.integers(len(ODD))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, other = (keys[k] for k in rng.integers(0, len(keys), 2))
    copy, way = (dict(value) if isinstance(value, dict) else list(value)), rng.random()
    if way < 0.1:
        del copy[key]
    elif way < 0.2:
        copy[key], copy[other] = value[other], value[key]
    elif way < 0.25 and isinstance(copy, dict):
        copy[str(ODD[rng.integers(len(ODD))])] = value[key]
    else:
        copy[key] = changed(value[key], rng)
    return copy


def signed_again(original: bytes, rng: np.random.Generator) -> bytes:
    """The file with another description, header or tensors, and a signature that fits."""
    end = 8 + int.from_bytes(original[:8], "little")
    header, body = json.loads(original[8:end]), bytearray(original[end:])
    metadata, way = header["__metadata__"], rng.integers(4)
    for _ in range(rng.integers(1, 4)):
        if way == 0:
            metadata["network"] = json.dumps(changed(json.loads(metadata["network"]), rng))
        elif way == 1:
            name = list(header)[rng.integers(len(header))]
            header[name] = changed(header[name], rng)
        elif way == 2 and body:
            start = int(rng.integers(0, len(body)))
            body[start : start + 4] = rng.choice([b"\0\0\xc0\x7f", b"\xff" * 4, b"\0" * 4, rng.bytes(4)])[
                : len(body) - start
            ]
        else:
            metadata["network"] = str(rng.choice(["[" * 50_000, "{}", "3", metadata["network"][: rng.integers(200)]]))
            break
    if not isinstance(header.get("__metadata__"), dict):
        return len(head := json.dumps(header).encode()).to_bytes(8, "little") + head + body
    unsigned = "0" * 64
    header["__metadata__"] |= {"sha256": unsigned}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    raw = len(head).to_bytes(8, "little") + head + body
    return raw.replace(io._signature(unsigned), io._signature(hashlib.sha256(raw).hexdigest()), 1)


def tried(number: int, seed: int, files: list[bytes], path: str) -> tuple[str, str]:
    """What loading damaged file `number` came to, and the fault, empty if there is none."""
    rng = np.random.default_rng([seed, number])
    original, again = files[rng.integers(len(files))], number % 2
    raw = signed_again(original, rng) if again else damaged(original, rng)
    with open(path, "wb") as file:
        file.write(raw)
    kind = "signed" if again else "raw"
    try:
        network = load(path)
    except io.ModelFileError as error:
        return f"{kind}, refused", "" if str(error).isprintable() else "the message is not printable"
    except Exception as error:
        return f"{kind}, failed", f"{type(error).__name__}: {printable(error, 200)}"
    if not again and raw != original:
        return "raw, loaded", "the damage was not noticed"
    try:
        first = encoded(network)
        with open(path, "wb") as file:
            file.write(first)
        return f"{kind}, loaded", "" if encoded(load(path)) == first else "saved, it is another network"
    except Exception as error:
        return f"{kind}, loaded", f"it cannot be saved: {type(error).__name__}: {printable(error, 200)}"


def try_files(files: list[bytes], first: int, times: int, seed: int, folder: str, shared: mmap.mmap) -> None:
    """Load damaged files in this process. The parent reads their number and the figures so far."""
    path, done, faults = f"{folder}/model", Counter(), []
    tried(0, seed, files, path)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES, in_use + BYTES))
    report = Path(folder) / "report"
    for number in range(first, times):
        shared[:16] = np.array([number, time.process_time_ns()]).tobytes()
        outcome, fault = tried(number, seed, files, path)
        done[outcome] += 1
        if fault:
            faults.append({"number": number, "fault": fault})
        if number % 1000 == 999 or number == times - 1 or fault:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            write_whole(report, json.dumps([number + 1, done, faults, peak]).encode(), overwrite=True)


def watched(child: int, shared: mmap.mmap, until: float) -> str:
    """Wait for the process. Returns how it ended: "" at its own end, else the fault; "time" when the time was over."""
    seen, since = None, time.monotonic()
    ticks = os.sysconf("SC_CLK_TCK")
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "" if status == 0 else f"the process died: {os.waitstatus_to_exitcode(status)}"
        number, started = np.frombuffer(shared[:16], np.int64)
        if number != seen:
            seen, since = number, time.monotonic()
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / ticks - started / 1e9
        late = used > SECONDS or time.monotonic() - since > PATIENCE
        if late or time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "more than 2 s" if late else "time"
        time.sleep(0.05)


@app.command()
def files(times: Times = 1_000_000, minutes: Minutes = 1e9, seed: Seed = 0) -> None:
    """Load damaged model files: each must be refused with a `ModelFileError`, or hold a network that can be saved."""
    done, faults, peak, first, until = Counter(), [], 0, 0, time.monotonic() + 60 * minutes
    damaging = originals()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, mmap.mmap(-1, 16) as shared:
        report = Path(folder) / "report"
        while first < times:
            shared[:16] = np.array([first, 2**62]).tobytes()
            report.unlink(missing_ok=True)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    try_files(damaging, first, times, seed, folder, shared)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            end = watched(child, shared, until)
            if report.exists():
                first, counted, found, most = json.loads(report.read_text())
                done, faults, peak = done + Counter(counted), faults + found, max(peak, most)
            if end == "time":
                break
            if end:
                number = int(np.frombuffer(shared[:8], np.int64)[0])
                faults.append({"number": number, "fault": end})
                first = number + 1
    record(
        "files",
        faults,
        seed,
        tried=sum(done.values()),
        outcomes=dict(done),
        peak_mb=peak,
        seconds_allowed=SECONDS,
        bytes_allowed=BYTES,
    )


# --- killed runs and full disks -----------------------------------------------------------------------------

TEXT = np.random.default_rng(5).integers(0, 6, 2000) // 2 * 2 + np.arange(2000) % 2

STEPS = 60

PRUNINGS = {
    "no pruning": lambda: None,
    "gradual": lambda: GradualPruning(0.6, (1, 1), 0, 40, every=3),
    "movement": lambda: MovementPruning(0.6, (1, 1), 2, 40, every=3),
    "dynamic": lambda: DynamicMasks(Blocks(0.5, (1, 1)), 0, 40, every=4),
    "regrown": lambda: RegrownMasks(0.5, (1, 1), 0, 40, every=4),
}


def trainer(pruning: str = "no pruning", threads: int = 1) -> Trainer:
    """A small run in its initial state."""
    network = Network.random([24, 16], symbols=8, embedding=5, readout=8, threshold=0.1, rng=np.random.default_rng(1))
    settings = Settings(steps=STEPS, batch=4, window=8, validate_every=20, threads=threads)
    return Trainer(network, LanguageModelling(TEXT[:1600], TEXT[1600:]), settings, pruning=PRUNINGS[pruning]())


def train_in(folder: Path, pruning: str = "no pruning", threads: int = 1) -> None:
    """Start or continue the run in the folder, with a checkpoint after every update."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(trainer(pruning, threads), folder, resume=True, checkpoint_seconds=0, log_every=4)


def outcome(folder: Path, pruning: str = "no pruning") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The state of a run, every bit of it, and its log without times."""
    ended = trainer(pruning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a run on two threads
        load_checkpoint(ended, folder / "checkpoint.safetensors")
    bits = {name: array.tobytes() for name, array in ended.arrays().items()} | {"rest": ended.numbers()}
    return bits, [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder)]


def child_of(function: Any, *arguments: Any) -> int:
    """The process that calls the function: exit code 0 at its end, 3 for an error of the disk, 1 for another."""
    with warnings.catch_warnings():
        # The child uses none of the threads of its parent.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*arguments)
        code = 0
    except OSError:
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@app.command()
def kills(times: Times = 300, minutes: Minutes = 1e9, seed: Seed = 0) -> None:
    """Kill training at random moments by signal 9 until it has ended: its bits and its log must be those of a run that
    was left alone. Every other five runs are on two threads."""
    rng, until, done, faults = np.random.default_rng(seed), time.monotonic() + 60 * minutes, Counter(), []
    with tempfile.TemporaryDirectory() as base:
        straight, seconds = {}, {}
        for kind in [(pruning, threads) for pruning in PRUNINGS for threads in (1, 2)]:
            for _ in range(2):  # the first run compiles
                folder = Path(base) / f"{kind[0]} {kind[1]}"
                shutil.rmtree(folder, ignore_errors=True)
                started = time.monotonic()
                os.waitpid(child_of(train_in, folder, *kind), 0)
                seconds[kind] = time.monotonic() - started
            straight[kind] = outcome(folder, kind[0])
        killed, runs = 0, 0
        while killed < times and time.monotonic() < until:
            pruning = list(PRUNINGS)[runs % len(PRUNINGS)]
            threads = 1 + runs // len(PRUNINGS) % 2
            kind = pruning, threads
            folder, tries, ended = Path(base) / f"killed-{runs}", 0, False
            while not ended and time.monotonic() < until:
                child = child_of(train_in, folder, pruning, threads)
                tries += 1
                # A run must be able to get on: from some tries on it is left more and more time.
                time.sleep(rng.random() * seconds[kind] * max(0.6, tries / 20))
                if killed < times:
                    os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                ended = os.WIFEXITED(status)
                killed += not ended
                done[f"{pruning}, threads {threads}"] += not ended
                if ended and os.WEXITSTATUS(status):
                    faults.append({"run": runs, "pruning": pruning, "fault": "it failed by itself"})
            if ended and outcome(folder, pruning) != straight[kind]:
                faults.append({"run": runs, "pruning": pruning, "fault": "other bits or another log"})
            runs += ended
            shutil.rmtree(folder, ignore_errors=True)
    record("kills", faults, seed, killed=killed, runs=runs, by_kind=dict(done))


class Disk:
    """A folder with little room: a file system in memory if this process may mount one, else a bound on every file.

    how : "tmpfs", or "RLIMIT_FSIZE" with the reason
    """

    def __init__(self, base: str, room: int):
        self.folder, self.room = Path(base) / "disk", room
        self.folder.mkdir()
        options = f"size={room},mode=700"
        command = ["mount", "-t", "tmpfs", "-o", options, "eventrnn-robustness", str(self.folder)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        self.how = "tmpfs" if mounted.returncode == 0 else f"RLIMIT_FSIZE ({printable(mounted.stderr.strip(), 100)})"

    def limit(self, free: int) -> None:
        """Leave so many bytes: for all files on a file system, else for each file that this process writes."""
        if self.how != "tmpfs":
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))
            return
        ballast = self.folder / "ballast"
        used = shutil.disk_usage(self.folder).free - free
        if used > 0:
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, used)

    def free(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def read_only(self, on: bool) -> bool:
        """Whether the folder was made read-only, or writable again. A folder is never read-only to root."""
        if self.how != "tmpfs":
            self.folder.chmod(0o500 if on else 0o700)
            return os.geteuid() != 0
        command = ["mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def close(self) -> None:
        if self.how == "tmpfs":
            subprocess.run(["umount", str(self.folder)], check=True)


def attempt(disk: Disk, job: str, network: Network, free: int | None) -> None:
    """In a child: limit the disk, then write a model, a picture or a run. Without `free`, the disk is read-only."""
    if free is not None and disk.how != "tmpfs":
        disk.limit(free)
    if job == "model":
        save(network, disk.folder / "model", overwrite=True)
    elif job == "new model":
        save(network, disk.folder / "new")
    elif job == "picture":
        from eventrnn import plots

        plots.mask_map(network.matrices(), path=disk.folder / "picture.png")
    else:
        train_in(disk.folder / "run")


@app.command()
def disks(times: Times = 200, minutes: Minutes = 1e9, seed: Seed = 0) -> None:
    """Write models, pictures and runs on a disk that is full or read-only: what was there must stay or be replaced as a
    whole, nothing half written may be left, and a run must go on to the bits of a run on an empty disk."""
    rng, until, done, faults = np.random.default_rng(seed), time.monotonic() + 60 * minutes, Counter(), []
    networks = [Network.random([64], inputs=40, rng=np.random.default_rng(k)) for k in range(2)]
    with tempfile.TemporaryDirectory() as base:
        os.waitpid(child_of(train_in, Path(base) / "straight"), 0)
        straight, disk = outcome(Path(base) / "straight"), Disk(base, 4 << 20)
        jobs = ["model", "new model", "run", "run"] + ["picture"] * bool(_can_draw())
        try:
            for number in range(times):
                if time.monotonic() > until:
                    break
                job, writable = jobs[number % len(jobs)], bool(rng.random() < 0.8)
                save(networks[0], disk.folder / "model", overwrite=True)
                (disk.folder / "picture.png").write_bytes(b"an old picture")
                before = _content(disk)
                free = int(rng.integers(0, 250_000)) if writable else None
                if free is None and not disk.read_only(True):
                    done["read-only not possible"] += 1
                    continue
                if free is not None and disk.how == "tmpfs":
                    disk.limit(free)
                status = os.waitpid(child_of(attempt, disk, job, networks[1], free), 0)[1]
                if free is None:
                    disk.read_only(False)
                disk.free()
                code = os.waitstatus_to_exitcode(status)
                done[f"{job}, {'full' if writable else 'read-only'}, {'refused' if code == 3 else 'done'}"] += 1
                fault = "" if code in (0, 3) else f"exit code {code}"
                fault = fault or _lost(before, _content(disk), job, code == 3, encoded(networks[1]))
                if job == "run" and not fault:
                    again = os.waitpid(child_of(train_in, disk.folder / "run"), 0)[1]
                    fault = "" if again == 0 and outcome(disk.folder / "run") == straight else "the run has other bits"
                if fault:
                    faults.append({"number": number, "job": job, "free": free, "fault": fault})
                for path in disk.folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            disk.close()
    record("disks", faults, seed, tried=sum(done.values()), outcomes=dict(done), disk=disk.how)


def _can_draw() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _content(disk: Disk) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in disk.folder.iterdir() if path.is_file() and path.name != "ballast"}


def _lost(before: dict[str, bytes], after: dict[str, bytes], job: str, refused: bool, model: bytes) -> str:
    """What was lost or left half written, empty if nothing was."""
    changed_file = {"model": "model", "new model": "new", "picture": "picture.png"}.get(job)
    for name in before.keys() | after.keys():
        if before.get(name) == after.get(name):
            continue
        if refused or name != changed_file:
            return f"{name} was changed, lost or left by a refused {job}"
        if job != "picture" and after.get(name) != model:
            return f"{name} is not the model"
    return (
        "" if refused or job == "run" or after.get(changed_file) != before.get(changed_file) else "nothing was written"
    )


# --- interrupts ---------------------------------------------------------------------------------------------


@app.command()
def interrupts(
    times: Times = 2000,
    minutes: Minutes = 1e9,
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(help="Processes side by side; the calls of each have up to 4 threads.")] = 2,
) -> None:
    """Raise in the midst of calls and of commands; then compare the state or the files, bit for bit, with those of the
    whole calls before it."""
    figures = campaign(times, seed, workers, 60 * minutes)
    faults = [case for case in figures["cases"] if case["stuck"] or case["wrong_states"]]
    record("interrupts", faults, seed, **figures)


# --- endless streams ----------------------------------------------------------------------------------------

# Steps of a long run; the outputs of one are in memory.
LONG = 1 << 20


@app.command()
def stream(
    steps: Annotated[float, typer.Option(help="Time steps.")] = 1e9, minutes: Minutes = 1e9, seed: Seed = 0
) -> None:
    """Read symbols in chunks of random length, and the same symbols in long runs: outputs and states must be the same
    bits, and memory must not grow."""
    network = Network.random([16], symbols=16, embedding=8, rng=np.random.default_rng(seed), threshold=0.1)
    assert network.embedding is not None
    # Larger weights and symbols than those of an untrained network: units fire, and states never settle.
    network = replace(network, embedding=10 * network.embedding)
    network = network.with_matrices({name: CSR.from_dense(3 * w.to_dense()) for name, w in network.matrices().items()})
    chunked, long = Simulator(network), Simulator(network)
    kept, until = RUNS / f"stream-{seed}.npz", time.monotonic() + 60 * minutes
    done = {"block": 0, "chunks": 0, "events": 0, "seconds": 0.0, "mb_first": 0.0, "mb_last": 0.0}
    if kept.exists():
        with np.load(kept) as file:
            done |= {name: file[name].item() for name in done}
            chunked.state, long.state = (State((file[f"{s}_c"],), (file[f"{s}_y"],)) for s in ("chunked", "long"))
    faults = []
    while done["block"] * LONG < steps and time.monotonic() < until and not faults:
        started, rng = time.monotonic(), np.random.default_rng([seed, done["block"]])
        symbols = rng.integers(0, 16, (LONG, 1))
        whole, at = long.run(symbols), 0
        while at < LONG:
            size = int(np.exp(rng.uniform(0, np.log(200_000))))
            part = chunked.run(symbols[at : at + size])
            if not np.array_equal(part.output.view(np.int32), whole.output[at : at + size].view(np.int32)):
                faults.append({"step": done["block"] * LONG + at, "fault": "other outputs"})
            at, done["chunks"] = at + size, done["chunks"] + 1
        ends = [[each.tobytes() for each in (s.state.cells[0], s.state.outputs[0])] for s in (chunked, long)]
        if ends[0] != ends[1]:
            faults.append({"step": (done["block"] + 1) * LONG, "fault": "other states"})
        done["block"] += 1
        done["events"] += int(whole.fired[0].total.sum())
        done["seconds"] += time.monotonic() - started
        done["mb_last"] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        if done["block"] == 20:
            done["mb_first"] = done["mb_last"]
        if done["block"] % 20 == 0:
            _keep(kept, done, chunked.state, long.state)
    _keep(kept, done, chunked.state, long.state)
    taken, events = done.pop("block") * LONG, done.pop("events")
    activity = events / (taken * network.layers[0].units)
    record("stream", faults, seed, steps=taken, activity=activity, longest_run=LONG, **done)


def _keep(path: Path, done: dict[str, Any], chunked: State, long: State) -> None:
    from io import BytesIO

    states = {"chunked_c": chunked.cells[0], "chunked_y": chunked.outputs[0]}
    states |= {"long_c": long.cells[0], "long_y": long.outputs[0]}
    path.parent.mkdir(exist_ok=True)
    raw = BytesIO()
    np.savez(raw, **done, **states)
    write_whole(path, raw.getvalue(), overwrite=True)


if __name__ == "__main__":
    app.run()
