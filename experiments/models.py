"""The common parts of the pruning experiments: a symbol model trained on a text, its figures, and the options."""

import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from records import Records
from threadpoolctl import threadpool_limits

import eventrnn as er
from eventrnn.bench import interleaved
from eventrnn.cli.terminal import progress
from eventrnn.data.text import Corpus, from_path, python_documentation
from eventrnn.pruning import Pruning
from eventrnn.training import Settings, Trainer
from eventrnn.training.evaluation import evaluate_text

# Symbols of a timed run, and interleaved repeats of it. A step of a small model takes microseconds.
TIMED, REPEATS = 2000, 9

# Name of the seconds per training step, in a line of results and in the metadata of a model file.
SECONDS = "train_seconds_per_step"


@dataclass(frozen=True)
class Job:
    """A text, the model that reads it, and the settings of its training."""

    text: str = "builtin"
    kind: str = "character"
    vocabulary: int | None = None
    hidden: tuple[int, ...] = (256, 256)
    embedding: int = 32
    threshold: float = 0.3
    batch: int = 32
    window: int = 32
    learning_rate: float = 6e-3
    activity_cost: float = 0.0
    seed: int = 0
    corpus: Corpus = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        builtin = self.text == "builtin"
        if builtin and (self.kind != "character" or self.vocabulary is not None):
            raise ValueError("text: the built-in text is read by characters; give --text a file or folder for words")
        corpus = python_documentation() if builtin else from_path(self.text, kind=self.kind, size=self.vocabulary)
        object.__setattr__(self, "corpus", corpus)

    def name(self) -> str:
        """A name that differs between jobs. It holds the size of the text but not its folder, so the text may move."""
        sizes = "-".join(map(str, (*self.hidden, self.embedding, self.batch, self.window)))
        text = f"{self.kind}-{len(self.corpus.vocabulary)}-{len(self.corpus.train)}"
        rule = f"{self.learning_rate:g}-{self.activity_cost:g}-{self.threshold:g}-{self.seed}"
        return f"{text}-{sizes}-{rule}"

    def untrained(self) -> er.Network:
        """The network before training, drawn from the seed."""
        rng, symbols = np.random.default_rng(self.seed), len(self.corpus.vocabulary)
        network = er.Network.random(
            list(self.hidden),
            rng=rng,
            symbols=symbols,
            embedding=self.embedding,
            readout=symbols,
            threshold=self.threshold,
            metadata={"vocabulary": self.corpus.vocabulary.to_json()},
        )
        return replace(network, embedding=rng.uniform(-1, 1, (symbols, self.embedding)).astype(np.float32))

    def train(
        self, network: er.Network, steps: int, report: Callable, pruning: Pruning | None = None
    ) -> tuple[er.Network, dict[str, np.ndarray], float]:
        """The trained network, its masks by matrix, and the median time of a training step in seconds."""
        settings = Settings(
            steps=steps,
            batch=self.batch,
            window=self.window,
            learning_rate=self.learning_rate,
            activity_cost=self.activity_cost,
            seed=self.seed,
        )
        trainer = Trainer(network, self.corpus.train, settings, pruning=pruning)
        seconds = timed_steps(trainer, steps, report)
        return trainer.model.network(), dict(trainer.model.masks), seconds

    def dense(self, work: Path, steps: int, report: Callable = lambda *stage: None) -> tuple[er.Network, float]:
        """The dense network after `steps` updates, and the seconds per training step. Its file in `work` is reused."""

        def train() -> tuple[er.Network, float]:
            network, _, seconds = self.train(self.untrained(), steps, report)
            return network, seconds

        return load_or_train(work / f"dense-{steps}-{self.name()}.safetensors", train)


@dataclass(frozen=True)
class PruningOptions:
    """Command-line options that block_sparse.py and nm_masks.py share; see `eventrnn.cli.options.takes`."""

    text: Annotated[str, typer.Option(help="'builtin', a text file, or a folder of text files.")] = "builtin"
    kind: Annotated[str, typer.Option(help="Symbols of the text: character or word.")] = "character"
    vocabulary: Annotated[int | None, typer.Option(help="Number of words to keep.")] = None
    hidden: Annotated[list[int] | None, typer.Option(help="Units of a layer; repeat for a stack. [256 256]")] = None
    embedding: Annotated[int, typer.Option(help="Width of the embedding, which is not pruned.")] = 32
    steps: Annotated[int, typer.Option(help="Updates of the dense model.")] = 1000
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0
    limit: Annotated[int | None, typer.Option(help="Symbols of the test text to read, at most.")] = 20_000
    processes: Annotated[int, typer.Option(min=1, help="Processes that train models, before any is measured.")] = 1
    work: Annotated[Path, typer.Option(help="Folder in which models are kept.")] = Path("eventrnn-pruning")
    table_only: Annotated[
        bool, typer.Option("--table", help="Measure nothing; show the lines of the device of the last line.")
    ] = False
    results: Annotated[Path, typer.Option(help="File to which a line per point is appended.")] = Path("lines.jsonl")

    def job(self) -> Job:
        """The text and the model that the options name."""
        hidden = tuple(self.hidden or (256, 256))
        return Job(self.text, self.kind, self.vocabulary, hidden, self.embedding, seed=self.seed)


def measure_missing(
    records: Records,
    points: list[dict],
    measure: Callable[[dict, Callable], dict],
    train_tasks: Callable[[list[dict]], list[list[tuple]]],
    processes: int,
) -> None:
    """Append a line for every point that has none for its key and this device.

    measure     : returns the line of a point; takes the point and a function that reports progress
    train_tasks : returns the trainings that some points need, as lists of tasks for `in_processes`, which run one list
                  after the other

    A point for which a ValueError is raised is named on stderr, and the others are measured. Raises SystemExit with
    code 1 afterwards if there was one.
    """
    missing, failed = [point for point in points if records.of(point) is None], 0
    with progress() as report:
        for tasks in train_tasks(missing) if processes > 1 else ():
            in_processes(tasks, processes, report)
        for done, point in enumerate(missing):
            label = ", ".join(str(point[key]) for key in records.key if key != "job")
            report("points", done, len(missing), label)
            try:
                records.add(measure(point, report))
            except ValueError as error:
                failed += 1
                print(f"{label}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def load_or_train(path: Path, train: Callable[[], tuple[er.Network, float]]) -> tuple[er.Network, float]:
    """The network of a file, and the seconds per training step. A file that does not exist is trained and written."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        network, seconds = train()
        er.save(replace(network, metadata=dict(network.metadata) | {SECONDS: str(seconds)}), path)
    network = er.load(path)
    return network, float(network.metadata[SECONDS])


def in_processes(tasks: list[tuple], processes: int, report: Callable) -> None:
    """Call every task (function, *arguments) in one of `processes` processes, each with one thread for BLAS.

    A ValueError is ignored here, because the task is repeated where its result is needed. Other exceptions are raised.
    """
    with ProcessPoolExecutor(processes, get_context("spawn"), threadpool_limits, (1,)) as pool:
        futures = [pool.submit(*task) for task in tasks]
        for done, future in enumerate(as_completed(futures)):
            report("training in processes", done + 1, len(tasks), "")
            if not isinstance(future.exception(), ValueError):
                future.result()


def timed_steps(trainer: Trainer, steps: int, report: Callable) -> float:
    """Train all steps. Returns the median time of a step in seconds."""
    seconds, last = [], time.perf_counter()
    for state in trainer:
        seconds.append(time.perf_counter() - last)
        report("training", state.step, steps, f"{state.bits:.3f} bits, {state.sparsity:.0%} pruned")
        last = time.perf_counter()
    return float(np.median(seconds))


def figures(network: er.Network, job: Job, limit: int | None) -> dict:
    """Quality on the test text, operations, sizes, and the time per step beside the dense network's.

    limit : symbols of the test text to read, at most; None for all
    """
    symbols = job.corpus.test[:limit]
    quality = evaluate_text(network, symbols)
    engines = {"sparse": er.Simulator(network), "dense": er.Simulator(network.dense())}
    stream = symbols[:TIMED, None]
    seconds = interleaved({name: lambda s=s: s.run(stream) for name, s in engines.items()}, REPEATS)
    matrices = network.matrices().values()
    return {
        "bits": quality["bits_per_symbol"],
        "perplexity": quality["perplexity"],
        "activity": quality["activity"],
        "effective_ops": quality["effective_ops_per_step"],
        "executed_ops": quality["executed_ops_per_step"],
        "weights": sum(w.nnz for w in matrices),
        "file_bytes": file_size(network),
        "us_per_step": float(np.median(seconds["sparse"])) / len(stream) * 1e6,
        "dense_us_per_step": float(np.median(seconds["dense"])) / len(stream) * 1e6,
    }


def file_size(network: er.Network) -> int:
    """Bytes of the model file without the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        er.save(replace(network, metadata={}), path)
        return path.stat().st_size
