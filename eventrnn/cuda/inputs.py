"""Arrays that stay on the GPU: inputs that the caller has there, and the state between runs.

Nothing is copied if the type is right: CuPy arrays are used as they are. Torch tensors and arrays of other libraries
are read in the same memory, through `__cuda_array_interface__` or DLPack.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.tables import LAST, STATUS_CELLS, STATUS_FAULT, STATUS_GATES, STATUS_INPUT, STATUS_LARGE
from eventrnn.events import Events
from eventrnn.state import HeldGates, InputKind, Inputs, State, gates_not_finite

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.network import Network


def is_torch(array: Any) -> bool:
    """Whether it is a torch tensor. Imports nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def as_cupy(device: Device, array: Any) -> Any:
    """A CuPy array in the memory of the caller's array. Later work on the stream waits for the caller's work so far.

    Raises ValueError for a tensor that requires a gradient and for an array on another GPU, and TypeError for an array
    that CuPy cannot read.
    """
    cupy = device.arrays
    if is_torch(array):
        if array.requires_grad:
            raise ValueError("inputs: got a tensor that requires a gradient, but a run computes none; give x.detach()")
        if str(array.dtype) == "torch.bfloat16":
            raise TypeError(
                "inputs: got torch.bfloat16, which CuPy cannot read; give x.float(), which holds the same numbers"
            )
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
class CupyLibrary:
    """`state.ArrayLibrary` of callers with CuPy arrays or with arrays of a library that is neither CuPy nor torch."""

    device: Device

    @property
    def cupy(self) -> Any:
        """The module."""
        return self.device.arrays

    def wrap(self, array: Any) -> Any:
        """The array itself."""
        return array

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        """See `state.ArrayLibrary`."""
        return self.cupy.concatenate(arrays)

    def take(self, array: Any, positions: np.ndarray, *, axis: int) -> Any:
        """See `state.ArrayLibrary`."""
        # On the stream of the engine, which waits for what the caller still does with the array.
        with self.device.on_stream():
            return self.cupy.take(array, self.device.put(positions), axis=axis)

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """See `state.ArrayLibrary`."""
        return self.wrap(self.cupy.zeros(shape, np.float32))

    def index(self, positions: np.ndarray) -> Any:
        """See `state.ArrayLibrary`."""
        return self.wrap(self.cupy.asarray(positions))

    def bincount(self, values: Any, size: int) -> np.ndarray:
        """See `state.ArrayLibrary`."""
        return self.cupy.bincount(values, minlength=size).get()


@dataclass(frozen=True)
class TorchLibrary(CupyLibrary):
    """`state.ArrayLibrary` of callers with torch tensors."""

    def wrap(self, array: Any) -> Any:
        """A tensor in the same memory."""
        return sys.modules["torch"].from_dlpack(array)

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        """See `state.ArrayLibrary`."""
        return sys.modules["torch"].cat(list(arrays))


def dense_host_inputs(array: np.ndarray) -> Inputs:
    """Inputs from an array (steps, batch, I) float32 on the host. The run checks and compacts them on the GPU."""
    steps, batch, size = array.shape
    return Inputs(InputKind.DENSE, steps, batch, size, values=np.ascontiguousarray(array), checked=False)


def gpu_inputs(device: Device, network: Network, symbol_events: Events | None, array: Any, step: bool) -> Inputs:
    """Inputs that lie on the GPU, used where they are if their type fits, else converted there.

    symbol_events : the events of each symbol; None for a network that reads numbers
    step          : whether `array` is a single step, without the dimension of time

    Raises as `Engine.prepare` does, except for single numbers, which the run checks.
    """
    given, size = as_cupy(device, array), network.layers[0].inputs
    given = given[None] if step else given
    kind = given.dtype.kind
    if symbol_events is not None:
        if given.ndim != 2 or kind not in "iu":
            raise ValueError(f"inputs: got {given.dtype} {given.shape}, need whole numbers (steps, batch), the symbols")
        wanted = np.int64
    else:
        if given.ndim != 3 or given.shape[2] != size or kind not in "fiub":
            raise ValueError(f"inputs: got {given.dtype} {given.shape}, need numbers (steps, batch, {size})")
        wanted = np.float32
    values = given
    if given.dtype != wanted or not given.flags.c_contiguous:
        with device.on_stream():
            values = device.arrays.ascontiguousarray(given, wanted)
    steps, batch = map(int, given.shape[:2])
    return Inputs(
        InputKind.DENSE if symbol_events is None else InputKind.SYMBOLS,
        steps,
        batch,
        size,
        values=values,
        table=symbol_events,
        checked=False,
        array_library=(TorchLibrary if is_torch(array) else CupyLibrary)(device),
        given=given,
    )


def copy_values(device: Device, inputs: Inputs, target: Any) -> None:
    """Copy the numbers or symbols of inputs to device memory of the same size, on the device's stream."""
    if inputs.array_library is None:
        device.send(inputs.values, target)
    else:
        target.data.copy_from_device_async(inputs.values.data, inputs.values.nbytes)


def result_for(device: Device, inputs: Inputs, result: Any) -> Any:
    """A result as the caller of these inputs gets it: on the GPU in the caller's library, else in host memory."""
    if inputs.array_library is not None:
        return inputs.array_library.wrap(result)
    if type(result) is np.ndarray:
        return result
    target = np.empty(result.shape, result.dtype)
    device.fetch(result, target)
    return target


def raise_for_input(inputs: Inputs, place: int) -> None:
    """Raise ValueError for the number or symbol at flat position `place` of these inputs."""
    symbols = inputs.kind is InputKind.SYMBOLS
    row, column = (place, 0) if symbols else divmod(place, inputs.size)
    (step, sample), column = divmod(row, inputs.batch), () if symbols else (column,)
    given = sample if inputs.samples is None else int(inputs.samples[sample])
    at, where = (step, sample, *column), (step + inputs.first_step, given, *column)
    bad = (inputs.values if inputs.given is None else inputs.given)[at].item()
    if symbols:
        raise ValueError(f"inputs: got symbol {bad} at {where}; need 0..{inputs.event_table.shape[0] - 1}")
    name = "inputs"
    if np.isfinite(bad):
        name, bad = "inputs as float32", inputs.values[at].item()
    raise ValueError(f"{name}: got {bad} at position {where}; need finite numbers")


class DeviceState(State):
    """A state on the GPU, copied to the host when its arrays are asked for.

    flat   : (2, batch * (units of all layers + blocks of all shared matrices)) float32: the cells and then the gates;
             the outputs and then, at the place of the gates of a matrix, the bits of `HeldGates.left` as int32. Layer
             after layer and matrix after matrix; never written to
    shared : `Network.shared_gates`
    """

    device: Device
    flat: Any
    units: tuple[int, ...]
    shared: Mapping[str, tuple[int, int]]
    _batch: int

    def __init__(
        self, device: Device, flat: Any, units: Sequence[int], batch: int, shared: Mapping[str, tuple[int, int]]
    ):
        given = {"device": device, "flat": flat, "units": tuple(units), "_batch": batch, "shared": shared}
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @property
    def batch(self) -> int:
        """Number of samples; copies nothing."""
        return self._batch

    @cached_property
    def _host(self) -> np.ndarray:
        with self.device.on_stream():
            host = self.flat.get()
        # A run reads the state on the GPU, and would not see an edit of this copy.
        host.flags.writeable = False
        return host

    @cached_property
    def cells(self) -> tuple[np.ndarray, ...]:
        """Per layer (batch, N) float32."""
        return by_layer(self._host[0], self.units, self._batch)

    @cached_property
    def outputs(self) -> tuple[np.ndarray, ...]:
        """Per layer (batch, N) float32."""
        return by_layer(self._host[1], self.units, self._batch)

    @cached_property
    def gates(self) -> dict[str, HeldGates]:
        """The gates that steps share, by matrix."""
        held = held_gates(self._host, self.units, self.shared, self._batch)
        return {name: HeldGates(gates, left.astype(np.int64)) for name, (gates, left) in held.items()}

    def need_finite(self) -> None:
        """Does nothing: the run has checked its cells on the GPU (`check_status`)."""

    def snapshot(self) -> State:
        """The state itself: nothing writes to it."""
        return self

    def checked(self, network: Network, batch: int) -> State:
        """The state itself, if it has the sizes of the network. Raises ValueError otherwise."""
        wanted = tuple(layer.units for layer in network.layers)
        if (self.units, self.batch) != (wanted, batch):
            raise ValueError(f"state: got {self.batch} samples of {self.units} units, need {batch} of {wanted}")
        # Another order of the matrices, or another period, is seen to on the host.
        same = list(self.shared.items()) == list(network.shared_gates().items())
        return self if same else super().checked(network, batch)

    def __reduce__(self):
        return State, (self.cells, self.outputs, self.gates)


def by_layer(flat: Any, units: Sequence[int], batch: int) -> tuple[Any, ...]:
    """Per layer, the view (batch, N) of its part of one row of a flat state."""
    edges = np.cumsum([0, *(batch * n for n in units)]).tolist()
    return tuple(flat[a:b].reshape(batch, n) for a, b, n in zip(edges[:-1], edges[1:], units, strict=True))


def held_gates(
    flat: Any, units: Sequence[int], shared: Mapping[str, tuple[int, int]], batch: int
) -> dict[str, tuple[Any, Any]]:
    """By matrix, the views of a flat state that `HeldGates` has: gates (batch, blocks) float32, left (batch,) int32."""
    found, at = {}, batch * sum(units)
    for name, (blocks, _) in shared.items():
        found[name] = (
            flat[0][at : at + batch * blocks].reshape(batch, blocks),
            flat[1][at : at + batch].view(np.int32),
        )
        at += batch * blocks
    return found


def flattened(state: State) -> np.ndarray:
    """A state of NumPy arrays as one array, in the order of `DeviceState.flat`."""
    held = state.gates.values()
    left = [np.zeros_like(each.gates, np.float32) for each in held]
    for words, each in zip(left, held, strict=True):
        words.ravel()[: len(each.left)] = each.left.astype(np.int32).view(np.float32)
    lines = (*state.cells, *(each.gates for each in held)), (*state.outputs, *left)
    return np.stack([np.concatenate([np.asarray(a, np.float32).ravel() for a in arrays]) for arrays in lines])


def check_status(status: np.ndarray, inputs: Inputs | None, state: State, names: Sequence[str]) -> None:
    """Raise for the faults that a run has reported.

    status : (STATUS_FIELDS + ...,) int64, the status words of the run
    inputs : the inputs of the run; None where the caller has checked them
    state  : the state that the run left
    names  : the names of the matrices, by their number

    Raises RuntimeError for events that never arrived, ValueError for bad inputs, and FloatingPointError for numbers too
    large for float16, for gates and for cell states that are not finite.
    """
    if status[STATUS_FAULT]:
        raise RuntimeError(
            "cuda: a block waited for events that never came; another program may hold the GPU's multiprocessors"
        )
    if status[STATUS_INPUT] and inputs is not None and not inputs.checked:
        raise_for_input(inputs, LAST - int(status[STATUS_INPUT]))
    if status[STATUS_LARGE]:
        raise FloatingPointError(
            "cuda: an input or output is too large for float16; use CudaBackend(exact=False, precision='bfloat16') or "
            "'tf32'"
        )
    if status[STATUS_GATES]:
        raise gates_not_finite(names[LAST - int(status[STATUS_GATES])])
    if status[STATUS_CELLS]:
        State(state.cells, state.outputs).need_finite()
