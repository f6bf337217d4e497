"""Files of event recordings: N-MNIST, SHD and SSC, NumPy and CSV; and event data of NIR, in and out.

Files that need a decoder of their own (AEDAT, EVT, RAW) are read by the library of the device, whose structured array
`Recording.from_array` takes.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn._checks import WHOLE, check_finite, float32_array, need_kind, need_number, need_whole, number_array
from eventrnn._files import read_arrays
from eventrnn.data.recordings import FIELDS, MOST_ROWS, MOST_UNITS, Recording
from eventrnn.events import Events

# SHD and SSC: channels of the cochlea, and ticks per second of the stamps that are made of their seconds.
HEIDELBERG_CHANNELS, MICROSECONDS = 700, 1_000_000

# N-MNIST: pixels, bytes per event, the row that marks an overflow of the counter, and the ticks of one overflow.
NMNIST_SENSOR, NMNIST_BYTES, OVERFLOW_ROW, OVERFLOW = (34, 34), 5, 240, 1 << 13

# A quotient of a time and a step that is this close to a whole number, relative to its size, is that number. Four times
# the distance of neighbouring numbers of float64, for the roundings of the time, the step and the division.
SAME_STEP = 4 * np.finfo(np.float64).eps


class RecordingError(ValueError):
    """A file that is not the recording that it should be. The message says the file and what is wrong with it."""


def read_recording(
    path: str | os.PathLike[str],
    sensor: int | tuple[int, int] | None = None,
    *,
    polarities: int | None = None,
    ticks: int | None = None,
    sort: bool = False,
) -> Recording:
    """The recording of a file, whose name says its kind.

    path   : `.bin`: N-MNIST. `.npy`: a structured array. `.npz`: a structured array, or one array per field. `.csv`: a
             line of names, which may begin with "#", then a line per event. Fields have the names that
             `Recording.from_array` knows
    sensor : see `Recording.from_array`; for N-MNIST by default its 34 x 34 pixels

    Other parameters: see `Recording.from_array`. Raises `RecordingError` for a file of another kind or content, and
    OSError where it cannot be read.
    """
    path = Path(path)
    readers = {".bin": _nmnist, ".npy": _npy, ".npz": _npz, ".csv": _csv}
    kind = path.suffix.lower()
    if kind not in readers:
        remedy = {
            ".h5": "; read_heidelberg reads the files of SHD and SSC",
            ".hdf5": "; read_heidelberg reads the files of SHD and SSC",
        }
        other = "; read it with the library of the device, and give its array to Recording.from_array"
        raise RecordingError(
            f"{path.name}: the kind {kind or 'without an ending'} is none of {', '.join(readers)}"
            f"{remedy.get(kind, other)}"
        )
    if sensor is None:
        if kind != ".bin":
            raise ValueError("sensor: give (height, width) of the camera, or the number of channels")
        sensor = NMNIST_SENSOR
    array = readers[kind](path)
    try:
        return Recording.from_array(array, sensor, polarities=polarities, ticks=ticks, sort=sort)
    except ValueError as error:
        raise RecordingError(f"{path.name}: {error}") from None


def read_heidelberg(path: str | os.PathLike[str], *, limit: int | None = None) -> tuple[list[Recording], np.ndarray]:
    """The recordings and labels of a file of the Heidelberg digits (SHD) or the spiking speech commands (SSC).

    limit : number of recordings to read, from the first on; None for all

    The stamps of the file are seconds, in float16 or float32, and become whole microseconds. float16 has steps of about
    1 ms above 1 s, so that a window of less is not meaningful. The units are the 700 channels.

    Returns the recordings and their labels, (n,) int64. Needs h5py, the extra `recordings`. Raises ImportError without
    it, `RecordingError` for a file of another content, and OSError where it cannot be read. Source: Cramer et al. 2022,
    the Heidelberg spiking data sets.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError("read_heidelberg needs h5py: pip install 'eventrnn[recordings]'") from None
    path = Path(path)
    need = None if limit is None else need_whole("limit", limit, at_least=1)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # Whether an entry is a group or an array is checked below, which a type checker cannot follow.
        file: Any = h5py.File(path, "r")
    except OSError as error:
        raise RecordingError(
            f"{path.name}: h5py cannot read it ({error}); SHD's files are unpacked with gunzip"
        ) from None
    with file:
        wanted = ("spikes/times", "spikes/units", "labels")
        missing = [name for name in wanted if name not in file]
        if missing:
            raise RecordingError(f"{path.name}: has no {missing[0]}; the files of SHD and SSC have {', '.join(wanted)}")
        if not all(isinstance(file[name], h5py.Dataset) and file[name].ndim for name in wanted):
            raise RecordingError(f"{path.name}: need one row per recording in each of {', '.join(wanted)}")
        labels = file["labels"][:need]
        all_times, all_units = file["spikes/times"][:need], file["spikes/units"][:need]
    if not len(labels) == len(all_times) == len(all_units):
        raise RecordingError(
            f"{path.name}: has {len(labels)} labels, times of {len(all_times)} recordings and units of {len(all_units)}"
        )
    if labels.dtype.kind not in WHOLE or labels.ndim != 1:
        raise RecordingError(f"{path.name}: labels: got {labels.dtype} {labels.shape}, need whole numbers (n,)")
    recordings = []
    for k, (times, units) in enumerate(zip(all_times, all_units, strict=True)):
        array = np.empty(len(times), [("t", times.dtype), ("x", units.dtype)])
        if len(times) != len(units):
            raise RecordingError(f"{path.name}: recording {k} has {len(times)} times and {len(units)} units")
        array["t"], array["x"] = times, units
        try:
            recordings.append(Recording.from_array(array, HEIDELBERG_CHANNELS, ticks=MICROSECONDS))
        except ValueError as error:
            raise RecordingError(f"{path.name}: recording {k}: {error}") from None
    return recordings, labels.astype(np.int64)


# --- event data of NIR ---------------------------------------------------------------------------------------


def to_nir(events: Events, dt: float) -> Any:
    """Events as `nir.ValuedEventData`: idx, time and value of shape (samples, most events of a sample).

    dt : length of a time step in seconds

    An event of step k has the time (k + 0.5) * dt, so that readers that divide by dt and round down find its step.
    Places without an event have idx -1, time inf and value 0. Needs nir, the extra `recordings`. An EGRU itself is no
    NIR graph: NIR has no gated node.
    """
    nir = _nir()
    need_kind("events", events, Events, "Events")
    dt = need_number("dt", dt, above=0)
    steps, batch, size = events.shape
    rows = events.rows()
    step, sample = np.divmod(rows, max(1, batch))
    order = np.argsort(sample, kind="stable")
    counts = np.bincount(sample, minlength=batch)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (batch, int(counts.max(initial=0)))
    idx, time, value = np.full(shape, -1, np.int64), np.full(shape, np.inf), np.zeros(shape)
    at = sample[order], place
    idx[at], time[at], value[at] = events.indices[order], (step[order] + 0.5) * dt, events.values[order]
    return nir.ValuedEventData(idx=idx, time=time, n_neurons=size, t_max=steps * dt, value=value)


def from_nir(data: Any, dt: float) -> Events:
    """Events of `nir.EventData` or `nir.ValuedEventData`, in time steps of `dt` seconds.

    An event at the time t is of step floor(t / dt), where a quotient within four roundings of a whole number is that
    number: 0.003 s are three steps of 0.001 s. There are t_max / dt steps, rounded up. Events of one unit in the same
    step are added. An event without a value has the value 1.

    Raises ValueError, with the place of the fault, for times outside [0, t_max), for units outside 0..n_neurons - 1,
    and for values that are not finite. Sums of zero are no events.
    """
    dt = need_number("dt", dt, above=0)
    missing = [name for name in ("idx", "time", "n_neurons", "t_max") if not hasattr(data, name)]
    if missing:
        raise TypeError(f"data: got {type(data).__name__} without {missing[0]}, need nir.EventData or ValuedEventData")
    idx = number_array("idx", data.idx, "(samples, events)", ndim=2, kinds="iu").astype(np.int64)
    time = number_array("time", data.time, "(samples, events)", ndim=2).astype(np.float64)
    value = getattr(data, "value", None)
    value = np.ones(idx.shape) if value is None else number_array("value", value, "(samples, events)", ndim=2)
    if not idx.shape == time.shape == value.shape:
        raise ValueError(f"data: got idx {idx.shape}, time {time.shape} and value {value.shape}, need the same shape")
    size = need_whole("n_neurons", data.n_neurons, at_least=1, at_most=MOST_UNITS)
    t_max = need_number("t_max", data.t_max, at_least=0)
    if t_max / MOST_ROWS > dt / max(1, len(idx)):
        raise ValueError(
            f"dt: got {dt:g}, which divides {t_max:g} seconds of {len(idx)} samples into more than {MOST_ROWS:,}, "
            "need seconds"
        )
    steps = int(np.ceil(_steps_of(np.array([t_max]), dt))[0])
    there = idx != -1
    check_finite("value", np.where(there, value, 0))
    wrong = there & ((idx < 0) | (idx >= size))
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"idx: got {idx[at]} at (sample, event) {at}, need 0..{size - 1}, or -1 for no event")
    with np.errstate(invalid="ignore"):
        step = np.floor(_steps_of(np.where(there, time, 0.0), dt))
        wrong = there & ~((time >= 0) & (time < t_max) & (step < steps))
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"time: got {time[at]} at (sample, event) {at}, need a time in [0, {t_max})")
    sample = np.broadcast_to(np.arange(len(idx))[:, None], idx.shape)[there]
    keys = (step[there].astype(np.int64) * len(idx) + sample) * size + idx[there]
    places, inverse = np.unique(keys, return_inverse=True)
    sums = float32_array("value", np.bincount(inverse, weights=value[there], minlength=len(places)), "of an event")
    places, sums = places[sums != 0], sums[sums != 0]
    rows, units = np.divmod(places, size)
    indptr = np.zeros(steps * len(idx) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=steps * len(idx)), out=indptr[1:])
    return Events(indptr, units.astype(np.int32), sums, (steps, len(idx), size))


def _steps_of(times: np.ndarray, dt: float) -> np.ndarray:
    """times / dt, where a quotient that is a whole number but for rounding is that number."""
    quotients = times / dt
    whole = np.rint(quotients)
    return np.where(np.abs(quotients - whole) <= SAME_STEP * np.maximum(1, np.abs(quotients)), whole, quotients)


def _nir() -> Any:
    try:
        import nir
    except ImportError:
        raise ImportError("to_nir needs nir: pip install 'eventrnn[recordings]'") from None
    return nir


# --- files ---------------------------------------------------------------------------------------------------


def _nmnist(path: Path) -> np.ndarray:
    """Events of an N-MNIST file (Orchard et al. 2015): 5 bytes each, x, y, then one bit of polarity and 23 of time.

    An event in row 240 is none: it says that the counter of the device overflowed. 2^13 is added to all later times.
    """
    raw = np.fromfile(path, np.uint8)
    if len(raw) % NMNIST_BYTES:
        raise RecordingError(f"{path.name}: has {len(raw)} bytes, no whole number of events of {NMNIST_BYTES} bytes")
    parts = raw.reshape(-1, NMNIST_BYTES).astype(np.int64)
    overflows = parts[:, 1] == OVERFLOW_ROW
    times = ((parts[:, 2] & 127) << 16) | (parts[:, 3] << 8) | parts[:, 4]
    times += OVERFLOW * np.cumsum(overflows)
    kept = ~overflows
    array = np.empty(int(kept.sum()), [("t", np.int64), ("x", np.int64), ("y", np.int64), ("p", bool)])
    array["t"], array["x"], array["y"], array["p"] = times[kept], parts[kept, 0], parts[kept, 1], parts[kept, 2] >> 7
    return array


def _npy(path: Path) -> np.ndarray:
    return _structured(path, _loaded(path))


def _npz(path: Path) -> np.ndarray:
    arrays = _loaded(path)
    if isinstance(arrays, np.ndarray):
        raise RecordingError(f"{path.name}: holds a single array, as a file .npy does; rename it")
    if len(arrays) == 1 and next(iter(arrays.values())).dtype.fields:
        return next(iter(arrays.values()))
    return _records(path, {name: array for name, array in arrays.items() if _is_field(name)}, list(arrays))


def _loaded(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    try:
        return read_arrays(path)
    except ValueError as error:
        raise RecordingError(str(error)) from None


def _structured(path: Path, array: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise RecordingError(f"{path.name}: holds several arrays, as a file .npz does; rename it")
    if not array.dtype.fields:
        raise RecordingError(f"{path.name}: holds {array.dtype} {array.shape}, need an array of records with fields")
    return array


def _csv(path: Path) -> np.ndarray:
    try:
        # Spreadsheets write a mark of the encoding first.
        head, *lines = path.read_text(encoding="utf-8-sig").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise RecordingError(f"{path.name}: is no text in UTF-8 ({error}); save it as UTF-8") from None
    names = [name.strip() for name in next(csv.reader([head.lstrip("# ")]), [])]
    if not any(map(_is_field, names)):
        there = ", ".join(names) or "empty"
        raise RecordingError(f"{path.name}: its first line is {there}, need the names t, x, y and p")
    try:
        # Stamps are read as whole numbers first, since float64 would round long ones.
        return _columns(names, lines, np.int64)
    except ValueError:
        pass
    try:
        return _columns(names, lines, np.float64)
    except ValueError as error:
        raise RecordingError(f"{path.name}, below its first line: {error}") from None


def _columns(names: list[str], lines: list[str], stamps: type) -> np.ndarray:
    """The columns of a CSV file that are fields of an event, as records."""
    at = [k for k, name in enumerate(names) if _is_field(name)]
    columns = [(names[k], stamps if names[k] in FIELDS["t"] else np.int64) for k in at]
    if not lines:
        return np.empty(0, columns)
    return np.loadtxt(lines, columns, delimiter=",", comments=None, quotechar='"', usecols=at, ndmin=1)


def _is_field(name: str) -> bool:
    return any(name in names for names in FIELDS.values())


def _records(path: Path, columns: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """Columns of equal length as one array of records."""
    sizes = {name: array.shape for name, array in columns.items()}
    if not columns or len(set(sizes.values())) > 1 or any(array.ndim != 1 for array in columns.values()):
        there = ", ".join(f"{name} {sizes.get(name, '')}".strip() for name in names) or "nothing"
        raise RecordingError(
            f"{path.name}: holds {there}, need rows of equal length for t, x and, of a camera, y and p"
        )
    array = np.empty(next(iter(sizes.values())), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        array[name] = column
    return array
