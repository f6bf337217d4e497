"""Arrays that stay on the GPU: inputs that come from there, and the state between runs.

Nothing is copied where the type fits: CuPy's arrays are used as they are, torch's tensors and others through the
interfaces that they share their memory by.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from eventrnn.cuda.tables import LAST, STATUS_CELLS, STATUS_FAULT, STATUS_INPUT, STATUS_LARGE
from eventrnn.events import Events
from eventrnn.state import Feed, State

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.network import Network


def is_torch(array: Any) -> bool:
    """Whether it is a torch tensor. Imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def borrowed(device: Device, array: Any) -> Any:
    """Somebody's array on this GPU as CuPy's, the same memory, ordered after what its owner still does with it.

    Raises ValueError or TypeError for what cannot be read here.
    """
    cupy = device.arrays
    if is_torch(array):
        if array.requires_grad:
            raise ValueError("inputs: got a tensor that requires a gradient, which a run has not; give x.detach()")
        if str(array.dtype) == "torch.bfloat16":
            raise TypeError("inputs: got torch.bfloat16, which CuPy does not know; give x.float(), the same numbers")
    device.follow(array)
    try:
        shared = hasattr(array, "__cuda_array_interface__")
        found = cupy.asarray(array) if shared else cupy.from_dlpack(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        kind = type(array).__name__
        raise TypeError(
            f"inputs: CuPy cannot take this {kind} ({error}); give a CuPy array or a torch tensor"
        ) from None
    if found.device.id != device.core.device_id:
        raise ValueError(
            f"inputs: got an array on GPU {found.device.id}, but the network is on GPU {device.core.device_id}; "
            "copy it there"
        )
    return found


@dataclass(frozen=True)
class WholeFeed(Feed):
    """Input as it came, whose events are found and whose numbers are checked on the GPU. The table is an embedding's.

    x     : (steps, batch, I) float32 or (steps, batch) int64, contiguous, NumPy's or on the GPU
    first : rows before this part
    """

    x: Any = None
    first: int = 0

    @classmethod
    def on_host(cls, table: Feed, inputs: np.ndarray) -> WholeFeed:
        """Of (steps, batch, I) float32."""
        steps, batch, size = inputs.shape
        nothing = (table.indptr, table.indices, table.values, table.row_of)
        return cls(*nothing, steps, batch, size, np.ascontiguousarray(inputs))

    @property
    def symbols(self) -> bool:
        """Whether the input is symbols."""
        return self.x.ndim == 2

    def part(self, start: int, stop: int) -> Self:
        """Steps `start` to `stop`, in the same memory."""
        return replace(self, steps=stop - start, x=self.x[start:stop], first=self.first + start * self.batch)

    def events(self) -> Any:
        """The input as events over all rows."""
        return Events.from_dense(self.x)

    def put(self, device: Device, target: Any) -> None:
        """Copy it to memory on the device of the same size, on its stream."""
        device.send(self.x, target)

    def give(self, device: Device, result: Any) -> Any:
        """A result on the device as the caller gets it."""
        target = np.empty(result.shape, result.dtype)
        device.fetch(result, target)
        return target

    def refuse(self, place: int) -> None:
        """Raise for the first number that the run found wrong, counted from the first of this feed."""
        row, column = (place, 0) if self.symbols else divmod(place, self.size)
        (step, sample), column = divmod(row, self.batch), () if self.symbols else (column,)
        at, where = (step, sample, *column), (step + self.first // self.batch, sample, *column)
        bad = self._came()[at].item()
        if self.symbols:
            raise ValueError(f"inputs: got symbol {bad} at {where}; need 0..{len(self.indptr) - 2}")
        name = "inputs"
        if np.isfinite(bad):
            name, bad = "inputs as float32", self.x[at].item()
        raise ValueError(f"{name}: got {bad} at position {where}; need finite numbers")

    def _came(self) -> Any:
        """`x` before it was converted."""
        return self.x


@dataclass(frozen=True)
class DeviceFeed(WholeFeed):
    """Input on the GPU; results stay there, in arrays of the kind that `asked` has.

    arrays : the device's package for them
    given  : `x` as it came, CuPy's
    """

    asked: Any = None
    arrays: Any = None
    given: Any = None

    @classmethod
    def of(cls, device: Device, network: Network, table: Feed, inputs: Any, step: bool) -> DeviceFeed:
        """Raises as `Network.feed` does, but for single numbers, which the run itself looks at.

        `table` is the feed of no input; with `step`, the inputs have no dimension of time.
        """
        array, size = borrowed(device, inputs), network.layers[0].inputs
        given = array = array[None] if step else array
        kind = array.dtype.kind
        if network.embedding is not None:
            if array.ndim != 2 or kind not in "iu":
                raise ValueError(
                    f"inputs: got {array.dtype} {array.shape}, need integers (steps, batch) for the embedding"
                )
            wanted = np.int64
        else:
            if array.ndim != 3 or array.shape[2] != size or kind not in "fiub":
                raise ValueError(f"inputs: got {array.dtype} {array.shape}, need numbers (steps, batch, {size})")
            wanted = np.float32
        if array.dtype != wanted or not array.flags.c_contiguous:
            with device.on_stream():
                array = device.arrays.ascontiguousarray(array, wanted)
        steps, batch = map(int, array.shape[:2])
        nothing = (table.indptr, table.indices, table.values, table.row_of)
        return cls(*nothing, steps, batch, size, array, 0, inputs, device.arrays, given)

    def part(self, start: int, stop: int) -> Self:
        """Steps `start` to `stop`, in the same memory."""
        return replace(super().part(start, stop), given=self.given[start:stop])

    def _came(self) -> Any:
        return self.given

    def uses(self) -> np.ndarray:
        """How often each symbol was read."""
        return self.arrays.bincount(self.x.ravel(), minlength=len(self.indptr) - 1).get()

    def keep(self, dense: Any) -> Any:
        """Records stay dense."""
        return dense

    def join(self, parts: Sequence[Any]) -> Any:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        return sys.modules["torch"].cat(list(parts)) if is_torch(parts[0]) else self.arrays.concatenate(parts)

    def events(self) -> Any:
        """A copy of the inputs: what they lie in is the caller's, who may fill it anew."""
        return self._as_asked(self.given.copy())

    def put(self, device: Device, target: Any) -> None:
        """Copy it, on the device's stream."""
        target.data.copy_from_device_async(self.x.data, self.x.nbytes)

    def give(self, device: Device, result: Any) -> Any:
        """The same memory: a torch tensor for one, else CuPy's."""
        return self._as_asked(result)

    def _as_asked(self, result: Any) -> Any:
        return sys.modules["torch"].from_dlpack(result) if is_torch(self.asked) else result


class DeviceState(State):
    """A state on the GPU, copied to the host when its arrays are asked for.

    flat : (2, batch * units of all layers) float32, cells and outputs, layer after layer; never written to
    """

    device: Device
    flat: Any
    units: tuple[int, ...]
    _batch: int

    def __init__(self, device: Device, flat: Any, units: Sequence[int], batch: int):
        for name, value in (("device", device), ("flat", flat), ("units", tuple(units)), ("_batch", batch)):
            object.__setattr__(self, name, value)

    @property
    def batch(self) -> int:
        """Samples; asks for nothing."""
        return self._batch

    @cached_property
    def _host(self) -> np.ndarray:
        with self.device.on_stream():
            return self.flat.get()

    @cached_property
    def cells(self) -> tuple[np.ndarray, ...]:
        """Per layer (batch, N)."""
        return by_layer(self._host[0], self.units, self._batch)

    @cached_property
    def outputs(self) -> tuple[np.ndarray, ...]:
        """Per layer (batch, N)."""
        return by_layer(self._host[1], self.units, self._batch)

    def need_finite(self) -> None:
        """The run has looked."""

    def __reduce__(self):
        return State, (self.cells, self.outputs)


def by_layer(flat: Any, units: Sequence[int], batch: int) -> tuple[Any, ...]:
    """Views (batch, N) of each layer's share of one line of a flat state."""
    edges = np.cumsum([0, *(batch * n for n in units)]).tolist()
    return tuple(flat[a:b].reshape(batch, n) for a, b, n in zip(edges[:-1], edges[1:], units, strict=True))


def flattened(state: State) -> np.ndarray:
    """A state of NumPy arrays as `DeviceState` holds it."""
    lines = (
        np.concatenate([np.asarray(a, np.float32).ravel() for a in arrays]) for arrays in (state.cells, state.outputs)
    )
    return np.stack(list(lines))


def check_status(status: np.ndarray, feed: Feed, state: State) -> None:
    """Raise for what a run has found wrong; `state` is the one that it left."""
    if status[STATUS_FAULT]:
        raise RuntimeError(
            "cuda: a block waited for events that never came; another program may hold the GPU's multiprocessors"
        )
    if status[STATUS_INPUT] and isinstance(feed, WholeFeed):
        feed.refuse(LAST - int(status[STATUS_INPUT]))
    if status[STATUS_LARGE]:
        raise FloatingPointError(
            "cuda: an input or output is too large for float16; use CudaBackend(exact=False, precision='bfloat16') or "
            "'tf32'"
        )
    if status[STATUS_CELLS]:
        State(state.cells, state.outputs).need_finite()
