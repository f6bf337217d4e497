"""Events and their encoders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn._checks import check_finite
from eventrnn.events import Events, encode_delta, encode_threshold
from eventrnn.testing import event_trains

sizes = st.integers(0, 6)
trains = event_trains(sizes, sizes, sizes)


@given(trains)
def test_dense_and_back(events):
    events.check()
    dense = events.to_dense()
    assert dense.shape == events.shape
    again = Events.from_dense(dense)
    for name in ("indptr", "indices", "values"):
        assert np.array_equal(getattr(again, name), getattr(events, name))
    assert len(events) == np.count_nonzero(dense)
    assert events.activity == (np.count_nonzero(dense) / dense.size if dense.size else 0)


@given(trains)
def test_rows_and_graded_values(events):
    steps, batch, size = events.shape
    flat = events.to_dense().reshape(steps * batch, size)
    assert np.array_equal(flat[events.rows(), events.indices], events.values)
    assert events.graded.sum() == ((flat != 0) & (np.abs(flat) != 1)).sum()


@given(trains, st.data())
def test_slice_and_concatenate_are_inverse(events, data):
    cut = data.draw(st.integers(0, events.shape[0]))
    dense = events.to_dense()
    joined = Events.concatenate([Events.from_dense(dense[:cut]), Events.from_dense(dense[cut:])])
    joined.check()
    assert joined.shape == events.shape
    assert np.array_equal(joined.to_dense(), dense)


def test_concatenate_refuses_other_sizes():
    parts = [Events.from_dense(np.ones((2, 1, 3))), Events.from_dense(np.ones((2, 1, 4)))]
    with pytest.raises(ValueError, match="need the same batch and size"):
        Events.concatenate(parts)


def an_event(**changes) -> Events:
    # Two steps of one sample: units 0 and 2, then unit 1.
    arrays = {
        "indptr": np.array([0, 2, 3]),
        "indices": np.array([0, 2, 1], np.int32),
        "values": np.array([0.5, 1, -1], np.float32),
        "shape": (2, 1, 3),
    }
    return Events(**(arrays | changes))


def test_a_valid_record():
    an_event().check()
    assert an_event().to_dense().tolist() == [[[0.5, 0, 1]], [[0, -1, 0]]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (2, 1, -3)}, ValueError, r"events shape: got \(2, 1, -3\), need sizes >= 0"),
        ({"shape": (3, 1, 3)}, ValueError, r"events indptr: got int64 \(3,\), need int64 \(4,\)"),
        ({"indptr": np.array([0, 2, 3], np.int32)}, ValueError, "events indptr: got int32"),
        ({"indices": np.array([0, 2, 1])}, TypeError, "got indices int64 and values float32"),
        ({"values": np.ones(3)}, TypeError, "values float64, need int32 and float32"),
        ({"indptr": np.array([0, 2, 4])}, ValueError, "indptr runs from 0 to 4"),
        ({"indptr": np.array([1, 2, 3])}, ValueError, "indptr runs from 1 to 3"),
        ({"values": np.ones(2, np.float32)}, ValueError, r"\(2,\) values"),
    ],
)
def test_events_refused_by_the_cheap_check(changes, error, message):
    with pytest.raises(error, match=message):
        an_event(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indptr": np.array([0, 4, 3])}, "indptr: decreases"),
        ({"indices": np.array([0, 3, 1], np.int32)}, r"indices: outside 0\.\.2"),
        ({"indices": np.array([0, -1, 1], np.int32)}, r"indices: outside 0\.\.2"),
        ({"indices": np.array([2, 0, 1], np.int32)}, "not strictly ascending within a row"),
        ({"indices": np.array([2, 2, 1], np.int32)}, "not strictly ascending within a row"),
        ({"values": np.array([1, np.nan, 1], np.float32)}, r"events values: got nan at position \(1,\)"),
        ({"values": np.array([1, 0, 1], np.float32)}, "contains zeros"),
    ],
)
def test_events_refused_by_the_full_check(changes, message):
    with pytest.raises(ValueError, match=message):
        an_event(**changes).check()


def test_rows_may_start_anywhere():
    # Empty rows at either end and between: the next row's first index may be lower than the last row's last.
    events = an_event(indptr=np.array([0, 0, 2, 2, 3, 3]), shape=(5, 1, 3))
    events.check()
    assert events.to_dense()[[1, 3], 0].tolist() == [[0.5, 0, 1], [0, -1, 0]]


def test_from_dense_needs_three_axes():
    with pytest.raises(ValueError, match=r"dense events: got float64 \(2, 3\), need numbers \(steps, batch, size\)"):
        Events.from_dense(np.ones((2, 3)))


def test_non_finite_numbers_are_named_by_position():
    array = np.zeros((2, 3))
    array[1, 2] = np.inf
    with pytest.raises(ValueError, match=r"signal: got inf at position \(1, 2\); need finite numbers"):
        check_finite("signal", array)
    with pytest.raises(ValueError, match=r"signal: got nan at position \(0, 1, 0\)"):
        encode_delta(np.array([[[0.0], [np.nan]]]), 0.1)


@given(trains, st.sampled_from([0.0, 0.25, 1.0]))
def test_threshold_encoder(events, threshold):
    signal = events.to_dense()
    encoded = encode_threshold(signal, threshold)
    encoded.check()
    assert np.array_equal(encoded.to_dense(), signal * (np.abs(signal) > threshold))


@given(event_trains(sizes, sizes, sizes, dyadic=True), st.sampled_from([0.0, 0.25, 1.0]))
def test_delta_encoder_follows_its_signal(events, threshold):
    signal = events.to_dense()
    encoded = encode_delta(signal, threshold)
    encoded.check()
    # With dyadic numbers the running sum is exact.
    assert (np.abs(np.cumsum(encoded.to_dense(), axis=0) - signal) <= threshold).all()
    assert (np.abs(encoded.values) > threshold).all()


def test_delta_encoder_by_hand():
    signal = np.array([0.0, 0.3, 0.6, 0.6, -0.5]).reshape(5, 1, 1)
    # Events: none, none (0.3), 0.6 - 0, none, -0.5 - 0.6
    assert encode_delta(signal, 0.5).to_dense().ravel().tolist() == [
        0,
        0,
        np.float32(0.6),
        0,
        np.float32(-0.5) - np.float32(0.6),
    ]


@given(event_trains(sizes, sizes, sizes), st.sampled_from([0.0, 0.3, 1.0]), st.lists(st.integers(0, 9), max_size=3))
def test_delta_encoder_in_chunks_equals_one_call(events, threshold, cuts):
    signal = events.to_dense()
    whole, last = encode_delta(signal, threshold, return_sent=True)
    edges = [0, *sorted(min(cut, len(signal)) for cut in cuts), len(signal)]
    sent, parts = None, []
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        before = None if sent is None else sent.copy()
        part, after = encode_delta(signal[a:b], threshold, sent=sent, return_sent=True)
        assert before is None or np.array_equal(before, sent), "the caller's sums were changed"
        parts, sent = [*parts, part], after
    joined = Events.concatenate(parts)
    assert joined.to_dense().tobytes() == whole.to_dense().tobytes()
    assert sent.tobytes() == last.tobytes()


def test_delta_encoder_refuses_sums_that_do_not_fit_and_changes_that_overflow():
    signal = np.ones((2, 1, 3))
    with pytest.raises(ValueError, match=r"sent: got shape \(3,\), need \(1, 3\), the batch and size of the signal"):
        encode_delta(signal, 0.1, sent=np.zeros(3))
    with pytest.raises(ValueError, match=r"sent: got inf at position \(0, 1\)"):
        encode_delta(signal, 0.1, sent=np.array([[0, np.inf, 0]]))
    with pytest.raises(ValueError, match="return_sent: got 1, need True or False"):
        encode_delta(signal, 0.1, return_sent=1)
    huge = np.array([3e38, -3e38], np.float32).reshape(2, 1, 1)
    with pytest.raises(ValueError, match=r"change of the signal: got -inf at position \(1, 0, 0\)"):
        encode_delta(huge, 0.1)


@pytest.mark.parametrize("encode", [encode_threshold, encode_delta])
@pytest.mark.parametrize(
    ("signal", "words"),
    [
        (np.ones((1, 1, 1), complex), "complex numbers"),
        (np.ones((1, 1, 1), "M8[s]"), "dates"),
        (np.full((1, 1, 1), None), "Python objects"),
        (np.full((1, 1, 1), "1"), "text"),
        (np.ma.masked_array(np.ones((1, 1, 1)), mask=True), "masked array"),
    ],
)
def test_encoders_refuse_what_is_no_number(encode, signal, words):
    with pytest.raises(ValueError, match=f"signal: got .*{words}"):
        encode(signal, 0.1)


@given(trains, st.data())
def test_events_until_an_end_are_those_before_it(events, data):
    steps, batch, _ = events.shape
    ends = np.array(data.draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch)))
    cut = events.until(ends)
    cut.check()
    assert np.array_equal(cut.to_dense(), events.to_dense() * (np.arange(steps)[:, None] < ends)[:, :, None])


@pytest.mark.parametrize("encode", [encode_threshold, encode_delta])
def test_encoders_refuse_invalid_arguments(encode):
    with pytest.raises(ValueError, match=r"signal: got float64 \(3,\), need numbers \(steps, batch, size\)"):
        encode(np.ones(3), 0.1)
    for threshold in (-0.1, np.nan):
        with pytest.raises(ValueError, match=r"threshold: got .*, need a number >= 0"):
            encode(np.ones((1, 1, 1)), threshold)


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        an_event().shape = (1, 1, 1)
    assert replace(an_event(), shape=(1, 2, 3)).shape == (1, 2, 3)
