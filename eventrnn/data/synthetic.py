"""Two small sets of synthetic recordings that need no download: moving bars before a camera, and chirps in a cochlea.

Both are functions of their arguments and a seed. They serve to try an event network end to end, and in tests; they are
easy, and say nothing about the recordings of a device.
"""

from __future__ import annotations

import numpy as np

from eventrnn._checks import need_number, need_pair, need_whole
from eventrnn.data.recordings import Recording

#: The classes of `moving_bars`, by label: the way in which the bar moves.
DIRECTIONS = ("right", "left", "down", "up")

#: The classes of `chirps`, by label.
SOUNDS = ("rising", "falling", "steady", "alternating")

# The longest duration of a recording in microseconds.
LONGEST = 1_000_000_000


def moving_bars(
    n: int, *, seed: int, sensor: tuple[int, int] = (16, 16), noise: float = 0.002, duration: int = 100_000
) -> tuple[list[Recording], np.ndarray]:
    """Recordings of a bar that crosses the picture of an event camera, and the direction of each.

    Parameters
    ----------
    n        : number of recordings
    seed     : seed of all that is drawn
    sensor   : (height, width) in pixels
    noise    : events of either polarity without a cause, per pixel and millisecond
    duration : duration of a crossing in microseconds, of which each recording takes 50 to 100 %

    A pixel sends an event of polarity 1 when the front of the bar reaches it, and one of polarity 0 when its back
    leaves it, each late by up to 2 ms; one in ten is missing. The bar covers a part of the picture across its way.

    Returns the recordings, with 2 * height * width units, and the labels (n,) int64, numbers of `DIRECTIONS`.
    """
    need_whole("n", n, at_least=1)
    height, width = need_pair("sensor", sensor, "(height, width) of a camera, each >= 1")
    need_number("noise", noise, at_least=0, at_most=1000)
    need_whole("duration", duration, at_least=1000, at_most=LONGEST)
    rng = np.random.default_rng(need_whole("seed", seed, at_least=0))
    labels = rng.integers(0, len(DIRECTIONS), n)
    return [_bar(rng, DIRECTIONS[label], height, width, noise, duration) for label in labels], labels


def _bar(rng: np.random.Generator, direction: str, height: int, width: int, noise: float, duration: int) -> Recording:
    along, across = (width, height) if direction in ("right", "left") else (height, width)
    begin = int(rng.integers(0, max(1, across // 2)))
    lines = np.arange(begin, min(across, begin + max(1, across // 2)))
    whole = int(duration * rng.uniform(0.5, 1.0))
    thick = int(rng.integers(1, 4))
    places = np.arange(along)
    # The front reaches a place, and the back leaves it `thick` places later.
    grid_place, grid_line = np.meshgrid(places, lines, indexing="ij")
    times, places_of, lines_of, polarity = [], [], [], []
    for late, sign in ((0, 1), (thick, 0)):
        kept = rng.random(grid_place.shape) < 0.9
        delay = rng.integers(0, 2000, grid_place.shape)
        times.append(((grid_place + late) * whole // along + delay)[kept])
        places_of.append(grid_place[kept])
        lines_of.append(grid_line[kept])
        polarity.append(np.full(int(kept.sum()), sign))
    t, place, line, p = (np.concatenate(parts) for parts in (times, places_of, lines_of, polarity))
    if direction in ("left", "up"):
        place = along - 1 - place
    x, y = (place, line) if direction in ("right", "left") else (line, place)
    extra = int(rng.poisson(noise * height * width * whole / 1000))
    t = np.concatenate([t, rng.integers(0, whole, extra)])
    x = np.concatenate([x, rng.integers(0, width, extra)])
    y = np.concatenate([y, rng.integers(0, height, extra)])
    p = np.concatenate([p, rng.integers(0, 2, extra)])
    order = np.argsort(t, kind="stable")
    units = (p * height + y) * width + x
    return Recording(t[order].astype(np.int64), units[order].astype(np.int64), 2 * height * width)


def chirps(
    n: int, *, seed: int, channels: int = 64, noise: float = 0.5, duration: int = 500_000
) -> tuple[list[Recording], np.ndarray]:
    """Recordings of short sounds in an artificial cochlea, and the kind of each.

    Parameters
    ----------
    n        : number of recordings
    seed     : seed of all that is drawn
    channels : number of frequency channels, at least 8
    noise    : events without a cause, per channel and second
    duration : duration of a sound in microseconds, of which each recording takes 50 to 100 %

    The channels around the frequency of the sound send one event per 2 ms and channel on average. The frequency rises,
    falls, stays, or alternates between two values.

    Returns the recordings, with `channels` units, and the labels (n,) int64, numbers of `SOUNDS`.
    """
    need_whole("n", n, at_least=1)
    need_whole("channels", channels, at_least=8)
    need_number("noise", noise, at_least=0, at_most=1_000_000)
    need_whole("duration", duration, at_least=1000, at_most=LONGEST)
    rng = np.random.default_rng(need_whole("seed", seed, at_least=0))
    labels = rng.integers(0, len(SOUNDS), n)
    return [_sound(rng, SOUNDS[label], channels, noise, duration) for label in labels], labels


def _sound(rng: np.random.Generator, kind: str, channels: int, noise: float, duration: int) -> Recording:
    whole = int(duration * rng.uniform(0.5, 1.0))
    low, span = rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.6)
    count = int(rng.poisson(5 * whole / 2000))
    t = np.sort(rng.integers(0, whole, count))
    part = t / whole
    shape = {
        "rising": part,
        "falling": 1 - part,
        "steady": np.full(count, 0.5),
        "alternating": (np.floor(part * 6) % 2).astype(float),
    }[kind]
    channel = np.rint((low + span * shape) * (channels - 1) + rng.normal(0, 1.2, count)).astype(np.int64)
    extra = int(rng.poisson(noise * channels * whole / 1_000_000))
    t = np.concatenate([t, rng.integers(0, whole, extra)])
    channel = np.concatenate([np.clip(channel, 0, channels - 1), rng.integers(0, channels, extra)])
    order = np.argsort(t, kind="stable")
    return Recording(t[order].astype(np.int64), channel[order], channels)
