"""What the pruning experiments share: a symbol model on a text, trained, and its figures."""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import eventrnn as er
from eventrnn.bench import interleaved
from eventrnn.data.text import Corpus, from_path, python_documentation
from eventrnn.pruning import Pruning
from eventrnn.training import Settings, Trainer
from eventrnn.training.evaluation import evaluate_text

# Symbols of a timed run; a step of a small model takes microseconds.
TIMED, REPEATS = 2000, 9
SECONDS = "train_seconds_per_step"


@dataclass(frozen=True)
class Job:
    """A text, a model to read it, and how it is trained."""

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
        """What tells this job's lines and models from others': the text by its symbols, not by where it lies."""
        sizes = "-".join(map(str, (*self.hidden, self.embedding, self.batch, self.window)))
        text = f"{self.kind}-{len(self.corpus.vocabulary)}-{len(self.corpus.train)}"
        rule = f"{self.learning_rate:g}-{self.activity_cost:g}-{self.threshold:g}-{self.seed}"
        return f"{text}-{sizes}-{rule}"

    def untrained(self) -> er.Network:
        """Drawn from the seed."""
        rng, symbols = np.random.default_rng(self.seed), len(self.corpus.vocabulary)
        network = er.Network.random(
            list(self.hidden), rng=rng, symbols=symbols, embedding=self.embedding, readout=symbols,
            threshold=self.threshold, metadata={"vocabulary": self.corpus.vocabulary.to_json()},
        )  # fmt: skip
        return replace(network, embedding=rng.uniform(-1, 1, (symbols, self.embedding)).astype(np.float32))

    def train(
        self, network: er.Network, steps: int, report: Callable, pruning: Pruning | None = None
    ) -> tuple[er.Network, dict[str, np.ndarray], float]:
        """The trained network, its masks, and seconds a step (the median)."""
        settings = Settings(
            steps=steps, batch=self.batch, window=self.window, learning_rate=self.learning_rate,
            activity_cost=self.activity_cost, seed=self.seed,
        )  # fmt: skip
        trainer = Trainer(network, self.corpus.train, settings, pruning=pruning)
        seconds = timed_steps(trainer, steps, report)
        return trainer.model.network(), dict(trainer.model.masks), seconds

    def dense(self, work: Path, steps: int, report: Callable = lambda *stage: None) -> tuple[er.Network, float]:
        """The dense model after so many steps, trained once and kept in a folder; seconds a step."""

        def make() -> tuple[er.Network, float]:
            network, _, seconds = self.train(self.untrained(), steps, report)
            return network, seconds

        return kept(work / f"dense-{steps}-{self.name()}.safetensors", make)


def kept(path: Path, make: Callable[[], tuple[er.Network, float]]) -> tuple[er.Network, float]:
    """The network of a file and the seconds of a training step; made, and kept there, where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        network, seconds = make()
        er.save(replace(network, metadata=dict(network.metadata) | {SECONDS: str(seconds)}), path)
    network = er.load(path)
    return network, float(network.metadata[SECONDS])


def side_by_side(tasks: list[tuple], processes: int, report: Callable) -> None:
    """Call every task, (function, *arguments), so many at a time, each in a process of its own on one thread. What is
    raised as ValueError is left for whoever calls it again; anything else ends everything."""
    with ProcessPoolExecutor(processes, get_context("spawn"), threadpool_limits, (1,)) as pool:
        futures = [pool.submit(*task) for task in tasks]
        for done, future in enumerate(as_completed(futures)):
            report("training side by side", done + 1, len(tasks), "")
            if not isinstance(future.exception(), ValueError):
                future.result()


def timed_steps(trainer: Trainer, steps: int, report: Callable) -> float:
    """Run all steps; the median of their seconds."""
    seconds, last = [], time.perf_counter()
    for progress in trainer:
        seconds.append(time.perf_counter() - last)
        report("training", progress.step, steps, f"{progress.bits:.3f} bits, {progress.sparsity:.0%} pruned")
        last = time.perf_counter()
    return float(np.median(seconds))


def figures(network: er.Network, job: Job, limit: int | None) -> dict:
    """Quality on the test text (its first symbols, where limited), work, sizes, time a step beside the dense twin."""
    symbols = job.corpus.test[:limit]
    found = evaluate_text(network, symbols)
    engines = {"own": er.Simulator(network), "dense": er.Simulator(network.dense())}
    part = symbols[:TIMED, None]
    seconds = interleaved({name: lambda s=s: s.run(part) for name, s in engines.items()}, REPEATS)
    matrices = network.matrices().values()
    return {
        "bits": found["bits_per_symbol"],
        "perplexity": found["perplexity"],
        "activity": found["activity"],
        "effective_ops": found["effective_ops_per_step"],
        "executed_ops": found["executed_ops_per_step"],
        "weights": sum(w.nnz for w in matrices),
        "file_bytes": file_size(network),
        "us_per_step": float(np.median(seconds["own"])) / len(part) * 1e6,
        "dense_us_per_step": float(np.median(seconds["dense"])) / len(part) * 1e6,
    }


def file_size(network: er.Network) -> int:
    """Bytes of the model file, the vocabulary left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        er.save(replace(network, metadata={}), path)
        return path.stat().st_size
