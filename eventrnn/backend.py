"""What a backend must answer, and the names by which backends are found. Imports none of them.

A backend turns a network into an `Engine` once; the engine runs whole sequences, state in and state out.
All backends of the exact tier give the same bits: events, states, outputs and fire counts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from eventrnn.network import Network
from eventrnn.state import Feed, State, Trace, on_gpu

#: how ways begin, in `Trace.paths`, that sum in an order of their own
INEXACT = ("blas", "tensor")


class BackendUnavailable(RuntimeError):
    """The backend exists but cannot run here; the message says why and what to install."""


def need_on_host(inputs: Any) -> None:
    """Refuse an array on a GPU. Raises TypeError."""
    if on_gpu(inputs):
        kind = _kind(inputs)
        raise TypeError(
            f"inputs: got a {kind} on a GPU, which only backend='cuda' takes; copy it to the host: x.get() of CuPy, "
            "x.cpu().numpy() of torch"
        )


def as_array(inputs: Any) -> np.ndarray:
    """As NumPy has it. Raises TypeError for what it cannot read."""
    try:
        return np.asarray(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"inputs: NumPy cannot read this {_kind(inputs)} ({error}); give a NumPy array") from None


def _kind(inputs: Any) -> str:
    return f"{type(inputs).__module__.partition('.')[0]}.{type(inputs).__name__}"


class Stepper(Protocol):
    """One time step after the other from a state on, with as little between calls and kernel as can be.

    Raises as `Network.feed` does for bad input, and FloatingPointError for a cell that is not finite; the state then
    stays what it was.
    """

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """(batch, I) numbers or (batch,) symbols in, (batch, V or N) out, an array of its own."""
        ...

    def state(self) -> State:
        """A copy of the state."""
        ...


class Engine(Protocol):
    """A network made ready to run. The inputs are never modified.

    `dense` says that it multiplies every weight, whatever fired: its operations are then counted so. (The reference
    does too, but stands for the event-driven run that it specifies.)

    An engine that takes inputs as they are, those on its GPU for one, has `feed(inputs) -> Feed` in the place of
    `Network.feed`; it then checks them in the run. Outputs and records of arrays on a GPU are such arrays too.
    """

    dense: bool

    def run(self, feed: Feed, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """All steps of the feed from `state` on. `feed.batch` must equal `state.batch`."""
        ...

    def stepper(self, state: State) -> Stepper | None:
        """For single steps, from that state on; None where they are runs of one step."""
        ...


class Backend(Protocol):
    """Makes engines. `exact` backends all give the same bits; the others are close, and say so."""

    name: str
    exact: bool

    def engine(self, network: Network, *, threads: int = 1) -> Engine:
        """Pack the weights for this backend. Cost: one pass over them."""
        ...


#: name -> where it lives; imported on first use
BACKENDS = {
    "reference": "eventrnn.reference:ReferenceBackend",
    "cpu": "eventrnn.cpu.engine:CpuBackend",
    "auto": "eventrnn.cpu.crossover:AutoBackend",
    "blas": "eventrnn.cpu.blas:BlasBackend",
    "cuda": "eventrnn.cuda:CudaBackend",
}


def get_backend(backend: str | Backend, exact: bool = True) -> Backend:
    """The backend of that name, or the object itself.

    `exact=False` lets "auto" use BLAS, and "cuda" tensor cores.
    """
    if not isinstance(backend, str):
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, need one of {', '.join(BACKENDS)}")
    module, _, name = BACKENDS[backend].partition(":")
    kind = getattr(importlib.import_module(module), name)
    if backend in ("auto", "cuda"):
        return kind(exact=exact)
    if not exact and kind.exact:
        raise ValueError(
            f"exact: got False, but backend {backend!r} has exact paths only; use 'auto' or 'cuda', or leave it out"
        )
    return kind()
