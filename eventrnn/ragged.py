"""Batches of sequences of different lengths, run by an engine that knows only whole batches.

Samples are ordered from the longest to the shortest. Time is cut where a sample ends, so that the samples that are left
are the same within a segment. The engine runs each segment with these samples only: padding is neither computed nor
counted, the state of a sample stays as its last step left it, and, because the bits of a sample do not depend on the
batch, every sample gets the bits of a run of its own. Each distinct length costs one further call of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from eventrnn._checks import need_lengths
from eventrnn.backend import Engine, as_array, merged_paths
from eventrnn.events import Events
from eventrnn.state import Inputs, State, Trace, on_gpu


def prepare(engine: Engine, inputs: Any, lengths: Any) -> Inputs:
    """`Engine.prepare` of padded inputs, whose padding is not looked at and may hold anything.

    inputs  : as `Engine.prepare` takes them
    lengths : (batch,) whole numbers 0..steps, the number of steps of each sample

    Raises ValueError for lengths that are not like this, and as `Engine.prepare` does. Cost: a copy of host inputs.
    """
    if not isinstance(inputs, Events) and not on_gpu(inputs):
        inputs = as_array(inputs)
    shape = getattr(inputs, "shape", ())
    if len(shape) < 2:
        return engine.prepare(inputs)
    ends = need_lengths(lengths, int(shape[0]), int(shape[1]))
    if isinstance(inputs, Events):
        inputs = inputs.until(ends)
    elif isinstance(inputs, np.ndarray) and inputs.dtype.kind in "fiub":
        inputs = inputs.copy()
        inputs[np.arange(len(inputs))[:, None] >= ends] = 0
    return replace(engine.prepare(inputs), lengths=ends)


def run(engine: Engine, inputs: Inputs, state: State, *, record_events: bool, record_states: bool) -> Trace:
    """`Engine.run` of padded inputs: `inputs.lengths` says where each sample ends.

    After the end of a sample its outputs and its recorded events and cells are zero.
    """
    ends = np.clip(inputs.require_lengths() - inputs.first_step, 0, inputs.steps)
    order = np.argsort(-ends, kind="stable")
    kept, initial = [np.array(each) for each in state.arrays()], state
    layers, traces, places, begin = range(len(state.cells)), [], [], 0
    for end in np.unique(ends).tolist() if ends.any() else [0]:
        # The empty segment of samples that end at once tells the shapes of the outputs where there is no other.
        if end == begin and ends.any():
            continue
        samples = order[: np.count_nonzero(ends >= end)]
        part, state = inputs.part(begin, end, samples), initial.with_arrays([each[samples] for each in kept])
        trace = engine.run(part, state, record_events=record_events, record_states=record_states)
        trace.state.need_finite()
        for k, after in enumerate(trace.state.arrays()):
            kept[k] = kept[k].astype(after.dtype, copy=False)
            kept[k][samples] = after
        traces.append(trace)
        places.append((slice(begin, end), samples))
        begin = end

    def padded(parts: Sequence[Any]) -> Any:
        return _padded(inputs, parts, places)

    counted = [trace.input_fired for trace in traces if trace.input_fired is not None]
    return Trace(
        output=padded([trace.output for trace in traces]),
        state=initial.with_arrays(kept),
        fired=tuple(reduce(add, (trace.fired[k] for trace in traces)) for k in layers),
        events=tuple(padded([trace.events[k] for trace in traces]) for k in layers) if record_events else (),
        states=tuple(padded([trace.states[k] for trace in traces]) for k in layers) if record_states else (),
        paths=merged_paths(trace.paths for trace in traces),
        input_fired=reduce(add, counted) if counted else None,
    )


def _padded(inputs: Inputs, parts: Sequence[Any], places: Sequence[tuple[slice, np.ndarray]]) -> Any:
    """The arrays of all segments in one (steps, batch, size) array, in the order of the caller's samples.

    places : the steps and the samples of each part
    """
    shape, library = (inputs.steps, inputs.batch, parts[0].shape[2]), inputs.array_library
    whole = np.zeros(shape, parts[0].dtype) if library is None else library.zeros(shape)
    for part, (steps, samples) in zip(parts, places, strict=True):
        whole[steps, samples if library is None else library.index(samples)] = part
    return whole
