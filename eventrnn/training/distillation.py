"""Knowledge distillation: a trained network, the teacher, says what to expect at every position of a text.

The teacher reads the text once, by an exact engine: the soft targets have the same bits on every machine, on the CPU
and on a GPU, whatever the number of threads. A run that is resumed may therefore compute them again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eventrnn._checks import need_whole
from eventrnn.cpu.threads import Team
from eventrnn.network import Network
from eventrnn.simulation import Simulator
from eventrnn.training.kernels.most_probable import most_probable
from eventrnn.training.targets import SoftTargets
from eventrnn.training.tasks import check_symbols

# The teacher reads the text as this many streams, or fewer, so that a stream has this many symbols. They do not depend
# on the training, so that the same text has the same soft targets.
STREAMS, FEWEST_SYMBOLS = 64, 512

# Scores of the teacher that are in memory at a time.
SCORES = 1 << 26


def soft_targets(
    teacher: Network,
    symbols: np.ndarray,
    *,
    weight: float = 0.5,
    top_k: int = 32,
    backend: str = "cpu",
    threads: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> SoftTargets:
    """The probabilities that a network gives to the next symbol at every position of a text, (n, top_k).

    Parameters
    ----------
    teacher : a network with an embedding and a read-out over the same symbols
    symbols : (n,) integers; the text of the training
    weight  : share of the soft targets in the loss, in [0, 1]
    top_k   : symbols that are kept per position, the most probable ones, 1 to the number of symbols
    backend : an exact backend, which runs the teacher
    threads : threads of the CPU that run the teacher, unless its backend is "cuda", and rank the symbols
    report  : called with the number of positions done, and of all

    The text is read as up to 64 streams of equal length, each from the zero state, at least 512 symbols long where the
    text is so long; the state is carried through a stream. There is no noise. Symbol n - 1 has soft targets too, of a
    symbol that is not in the text.

    Raises ValueError for symbols that the teacher cannot read and for arguments outside their ranges. Cost: one run of
    the teacher; memory 8 n top_k bytes, and 256 MB of scores.
    """
    symbols = check_symbols(teacher, symbols)
    assert teacher.readout is not None
    size = teacher.readout.weights.shape[1]
    need_whole("top_k", top_k, at_least=1, at_most=size)
    need_whole("threads", threads, at_least=1)
    # The weight is checked before the run.
    SoftTargets(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), weight)
    streams = max(1, min(STREAMS, len(symbols) // FEWEST_SYMBOLS))
    length = -(-len(symbols) // streams)
    # The last stream may be shorter; what it reads after its end is not kept.
    padded = np.concatenate([symbols, np.zeros(length * streams - len(symbols), symbols.dtype)])
    text = np.ascontiguousarray(padded.reshape(streams, length).T)
    # A GPU brings its own threads.
    own = 1 if isinstance(backend, str) and backend == "cuda" else threads
    simulator = Simulator(teacher, batch=streams, backend=backend, threads=own)
    if not simulator.backend.exact:
        raise ValueError(f"backend: got {backend!r}, whose sums are not exact; need an exact one such as 'cpu'")
    team, scratch = Team(threads), np.empty(threads * size, np.float32)
    chosen = np.empty((length, streams, top_k), np.int32)
    probabilities = np.empty((length, streams, top_k), np.float32)
    chunk = max(1, SCORES // (streams * size))
    for begin in range(0, length, chunk):
        part = text[begin : begin + chunk]
        scores = np.ascontiguousarray(simulator.run(part).output, np.float32).reshape(-1)
        places = slice(begin, begin + len(part))
        out = (each[places].reshape(-1) for each in (chosen, probabilities))
        team.run(most_probable, part.size, size, top_k, scores, scratch, *out)
        report(min(len(symbols), (begin + len(part)) * streams), len(symbols))
    chosen, probabilities = (
        each.swapaxes(0, 1).reshape(length * streams, top_k)[: len(symbols)] for each in (chosen, probabilities)
    )
    return SoftTargets(chosen, probabilities, weight)
