"""Recordings of event cameras and artificial cochleas, and their division into time steps.

A recording is a list of stamps and units. It becomes `Events` by whole numbers only, so that no event is lost:

    unit  = (polarity * height + y) * width + x
    step  = (t - t0) // window
    steps = (t of the last event - t0) // window + 1
    value = the number of events of the unit in the step
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eventrnn._checks import WHOLE, need_flag, need_kind, need_pair, need_whole, number_array, plain_array, said
from eventrnn.events import Events

#: Names that readers give to the fields of an event: tonic, expelliarmus, aedat and event_stream, dv-processing.
FIELDS = {"t": ("t", "timestamp", "timestamps", "ts"), "x": ("x",), "y": ("y",), "p": ("p", "on", "polarity")}

# The largest number of units: the unit of an event is an int32.
MOST_UNITS = 2**31 - 1

# The largest number of time steps, of all samples together: their `Events` need a gigabyte. More come of a window in
# another unit than the stamps.
MOST_ROWS = 2**27

# The largest length of a time step, and number of stamps per second.
LONGEST_WINDOW, MOST_TICKS = 2**62, 10**15

# Counts up to this one are exact in float32.
LARGEST_COUNT = 2**24


@dataclass(frozen=True, eq=False)
class Recording:
    """The events of one recording, in the order of time.

    Attributes
    ----------
    times : (n,) int64, stamp of each event, not decreasing; its unit is that of the device, often a microsecond
    units : (n,) int64, unit of each event, 0..size - 1
    size  : number of units

    Raises ValueError, with the position of the first fault, for stamps that decrease and for units out of range.

    Examples
    --------
    >>> recording = Recording(np.array([0, 3, 3, 12]), np.array([1, 0, 0, 1]), size=2)
    >>> recording.to_events(window=5).to_dense()[:, 0]
    array([[2., 1.],
           [0., 0.],
           [0., 1.]], dtype=float32)
    """

    times: np.ndarray
    units: np.ndarray
    size: int

    def __post_init__(self):
        object.__setattr__(self, "size", need_whole("size", self.size, at_least=1, at_most=MOST_UNITS))
        object.__setattr__(self, "times", _whole("times", self.times))
        object.__setattr__(self, "units", _whole("units", self.units))
        if len(self.times) != len(self.units):
            raise ValueError(f"recording: got {len(self.times)} times and {len(self.units)} units, need one per event")
        _need_range("units", self.units, self.size)
        falls = self.times[1:] < self.times[:-1]
        if falls.any():
            k = int(np.argmax(falls)) + 1
            raise ValueError(
                f"times: {self.times[k]} at event {k} comes after {self.times[k - 1]}, need the order of time; sort "
                "the events (sort=True), unless the device's counter wrapped around: then add its range to the rest"
            )

    def __len__(self) -> int:
        return len(self.times)

    @classmethod
    def from_array(
        cls,
        array: np.ndarray,
        sensor: int | tuple[int, int],
        *,
        polarities: int | None = None,
        ticks: int | None = None,
        sort: bool = False,
    ) -> Recording:
        """A recording from a structured array, as tonic, aedat, dv-processing, expelliarmus and event_stream return it.

        Parameters
        ----------
        array      : (n,) records with a field for the time (`t`, `timestamp`, `timestamps` or `ts`), for the position
                     (`x`; `y` for a sensor with rows), and for the polarity (`p`, `on` or `polarity`). A title of a
                     field counts as its name
        sensor     : (height, width) of a camera in pixels, or the number of channels of a cochlea
        polarities : 2: one unit per pixel and polarity, where polarity 0 has the first half of the units; 1: events of
                     both polarities share a unit, and the field of the polarity is not read. By default 2 for a camera
                     and 1 for a cochlea
        ticks      : number of stamps per second, for stamps in seconds that are not whole numbers; each is rounded to
                     the nearest tick. None for whole stamps, which are taken as they are
        sort       : sort the events by their time; events of the same time keep their order

        Raises ValueError for an array, a field or a value that is not like this, with its position. Cost: O(events).
        """
        height, width = (1, need_whole("sensor", sensor, at_least=1)) if _is_whole(sensor) else _camera(sensor)
        camera = not _is_whole(sensor)
        polarities = need_whole(
            "polarities", (2 if camera else 1) if polarities is None else polarities, at_least=1, at_most=2
        )
        if polarities * height * width > MOST_UNITS:
            raise ValueError(f"sensor: got {said(sensor)}, which has more than {MOST_UNITS:,} units")
        need_flag("sort", sort)
        array = plain_array("events", array)
        if array.ndim != 1 or not array.dtype.fields:
            raise ValueError(
                f"events: got {array.dtype} {array.shape}, need one row of records with the fields t, x, y and p; "
                "Recording(times, units, size) takes plain arrays"
            )
        x = _field(array, "x")
        _need_range("x", x, width)
        units = x
        if camera:
            y = _field(array, "y")
            _need_range("y", y, height)
            units = y * width + x
        if polarities == 2:
            p = _field(array, "p")
            if len(p) and p.min() == -1:
                raise ValueError(
                    f"p: got -1 at event {int(np.argmin(p))}, need 0 and 1; where they are -1 and 1, set "
                    f"array[{_name(array, 'p')!r}][array[{_name(array, 'p')!r}] < 0] = 0"
                )
            _need_range("p", p, 2)
            units = p * (height * width) + units
        times = _stamps(array[_name(array, "t")], ticks)
        if sort:
            order = np.argsort(times, kind="stable")
            times, units = times[order], units[order]
        return cls(times, units, polarities * height * width)

    def to_events(self, window: int, *, t0: int | None = None, steps: int | None = None) -> Events:
        """The recording as a batch of one; see `bin_events`."""
        return bin_events([self], window, t0=t0, steps=steps)[0]


def bin_events(
    recordings: Iterable[Recording], window: int, *, t0: int | None = None, steps: int | None = None
) -> tuple[Events, np.ndarray]:
    """Recordings as one padded batch of graded events, for `simulate(network, events, lengths=lengths)`.

    Parameters
    ----------
    recordings : B recordings of the same size
    window     : length of a time step, in the unit of the stamps
    t0         : stamp at which the first step of every recording begins; None for the first event of each
    steps      : number of time steps of the batch; None for those of the longest recording

    Returns the events (steps, B, size), whose values are numbers of events, and the number of steps of each recording,
    (B,) int64. A recording without events has 0 steps of its own. The head of this file has the rules.

    Raises ValueError where an event lies before `t0` or beyond `steps`: none is left out.
    Cost: O(events * log(events)).
    """
    cells, lengths, shape = _cells(recordings, window, t0, steps)
    rows, units, counts = cells
    indptr = np.zeros(shape[0] * shape[1] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=shape[0] * shape[1]), out=indptr[1:])
    return Events(indptr, units.astype(np.int32), counts.astype(np.float32), shape), lengths


def padded_counts(
    recordings: Iterable[Recording], window: int, *, t0: int | None = None, steps: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Recordings as a dense array of counts, for `Classification(inputs, labels, lengths=lengths)`.

    Parameters and errors: see `bin_events`. Returns the counts (B, steps, size), in the smallest of uint8, uint16 and
    uint32 that holds them, and the number of steps of each recording, (B,) int64, at least 1, since the tasks need a
    step to read. Cost: O(B * steps * size).
    """
    (rows, units, counts), lengths, (n, batch, size) = _cells(recordings, window, t0, steps)
    n = max(n, 1)
    kind = np.min_scalar_type(int(counts.max(initial=0)))
    try:
        dense = np.zeros((batch, n, size), kind)
    except MemoryError:
        raise ValueError(
            f"window: got {window}, for which the counts need {batch:,} x {n:,} x {size:,} {kind}, more than there is "
            "memory; give a longer window or fewer recordings, or use bin_events"
        ) from None
    dense[rows % batch, rows // batch, units] = counts
    return dense, np.maximum(lengths, 1)


Cells = tuple[np.ndarray, np.ndarray, np.ndarray]


def _cells(
    recordings: Iterable[Recording], window: int, t0: int | None, steps: int | None
) -> tuple[Cells, np.ndarray, tuple[int, int, int]]:
    """Cells with events as (row `step * batch + sample`, unit, count), in ascending order of row and unit; the number
    of steps of each recording; and the shape (steps, batch, size)."""
    if isinstance(recordings, Recording) or not isinstance(recordings, Iterable):
        got = "one Recording" if isinstance(recordings, Recording) else said(recordings)
        raise TypeError(f"recordings: got {got}, need several in a list; Recording.to_events takes one")
    recordings = list(recordings)
    for k, each in enumerate(recordings):
        need_kind(f"recordings[{k}]", each, Recording, "a Recording")
    if not recordings:
        raise ValueError("recordings: got none, need at least one")
    sizes = sorted({each.size for each in recordings})
    if len(sizes) > 1:
        raise ValueError(
            f"recordings: got recordings of {', '.join(map(str, sizes))} units, need the same number in all"
        )
    window = need_whole("window", window, at_least=1, at_most=LONGEST_WINDOW)
    t0 = None if t0 is None else need_whole("t0", t0)
    steps = None if steps is None else need_whole("steps", steps, at_least=0)
    lengths = np.array([_steps(k, each, window, t0, steps) for k, each in enumerate(recordings)], np.int64)
    shape = (int(lengths.max()) if steps is None else steps, len(recordings), sizes[0])
    if steps is not None and steps * shape[1] > MOST_ROWS:
        raise ValueError(f"steps: got {steps:,} for {shape[1]} samples, more than {MOST_ROWS:,} together")
    if shape[0] * shape[1] > MOST_ROWS:
        raise ValueError(
            f"window: got {window}, which divides the recordings into {shape[0]:,} steps of {shape[1]} samples, more "
            f"than {MOST_ROWS:,}; give it in the unit of the stamps, often microseconds"
        )
    keys = []
    for sample, each in enumerate(recordings):
        if len(each):
            start = int(each.times[0]) if t0 is None else t0
            step = (each.times - start) // window
            keys.append((step * shape[1] + sample) * shape[2] + each.units)
    places, counts = np.unique(np.concatenate(keys) if keys else np.empty(0, np.int64), return_counts=True)
    rows, units = np.divmod(places, shape[2])
    if counts.max(initial=0) > LARGEST_COUNT:
        k = int(counts.argmax())
        raise ValueError(
            f"window: got {window}, but unit {units[k]} has {counts[k]:,} events in one step, and counts above "
            f"{LARGEST_COUNT:,} are not exact in float32; give a shorter window"
        )
    return (rows, units, counts), lengths, shape


def _steps(k: int, recording: Recording, window: int, t0: int | None, steps: int | None) -> int:
    """The number of steps of a recording. Raises ValueError for events before `t0` and beyond `steps`."""
    if not len(recording):
        return 0
    first, last = int(recording.times[0]), int(recording.times[-1])
    start = first if t0 is None else t0
    if first < start:
        raise ValueError(
            f"t0: got {t0}, but recording {k} begins at {first}; no event is left out, so give at most that"
        )
    if last - start > np.iinfo(np.int64).max:
        raise ValueError(f"recording {k}: its stamps run from {start} to {last}, which is more than int64 can count")
    found = (last - start) // window + 1
    if steps is not None and found > steps:
        raise ValueError(
            f"steps: got {steps}, but recording {k} has {found}; no event is left out, so give at least that, or cut "
            "the recording before"
        )
    return found


# --- fields of structured arrays ----------------------------------------------------------------------------


def _name(array: np.ndarray, field: str) -> str:
    """The name by which an array has a field, a title included. Raises ValueError where it has none."""
    there = array.dtype.fields or {}
    for name in FIELDS[field]:
        if name in there:
            return name
    need = FIELDS[field][0] if len(FIELDS[field]) == 1 else f"one of {', '.join(FIELDS[field])}"
    remedy = {
        "y": "; for a cochlea give the number of its channels as sensor",
        "p": "; give polarities=1 for events without one",
    }
    raise ValueError(f"events: got the fields {', '.join(map(str, there))}, need {need}{remedy.get(field, '')}")


def _field(array: np.ndarray, field: str) -> np.ndarray:
    """A field with whole numbers or booleans as int64."""
    values = array[_name(array, field)]
    if values.dtype.kind == "b":
        return values.astype(np.int64)
    return _whole(field, values)


def _stamps(times: np.ndarray, ticks: int | None) -> np.ndarray:
    """Stamps as int64."""
    if ticks is None:
        if times.dtype.kind == "f":
            raise ValueError(f"t: got {times.dtype}, need whole numbers; ticks=1_000_000 makes microseconds of seconds")
        return _whole("t", times)
    ticks = need_whole("ticks", ticks, at_least=1, at_most=MOST_TICKS)
    if times.dtype.kind != "f":
        raise ValueError(
            f"ticks: got {ticks}, but the stamps are {times.dtype}, whole numbers already; leave ticks out"
        )
    exact = number_array("t", times, "(n,)", ndim=1).astype(np.float64) * ticks
    wrong = ~(np.abs(exact) < 2.0**53)
    if wrong.any():
        k = int(np.argmax(wrong))
        raise ValueError(
            f"t: got {times[k]} at event {k}, which is no time of less than 2^53 ticks; need finite seconds"
        )
    return np.rint(exact).astype(np.int64)


def _whole(name: str, values: Any) -> np.ndarray:
    """Whole numbers (n,) as int64, before any of them is subtracted: differences of unsigned numbers would wrap."""
    array = number_array(name, values, "(n,)", ndim=1, kinds=WHOLE)
    if array.dtype == np.uint64 and len(array) and array.max() > np.iinfo(np.int64).max:
        k = int(array.argmax())
        raise ValueError(f"{name}: got {array[k]} at event {k}, need numbers that int64 holds")
    return np.ascontiguousarray(array, np.int64)


def _need_range(name: str, values: np.ndarray, size: int) -> None:
    wrong = (values < 0) | (values >= size)
    if wrong.any():
        k = int(np.argmax(wrong))
        raise ValueError(f"{name}: got {values[k]} at event {k}, need 0..{size - 1}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer)


def _camera(sensor: Any) -> tuple[int, int]:
    if not isinstance(sensor, Sequence | np.ndarray):
        raise ValueError(f"sensor: got {said(sensor)}, need (height, width) of a camera or a number of channels")
    return need_pair("sensor", sensor, "(height, width) of a camera, each >= 1, or a number of channels")
