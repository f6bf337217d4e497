"""Recordings become events by whole numbers: every event of a file is in the step and unit of a plain count."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventrnn as er
from eventrnn import data
from eventrnn.data import Recording, RecordingError, bin_events, padded_counts, read_recording
from eventrnn.data.synthetic import DIRECTIONS, SOUNDS

SENSOR = HEIGHT, WIDTH = (3, 4)

#: The records of five libraries: names of the fields, their types, and titles of a field beside its name.
READERS = {
    "tonic": [("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")],
    "dv-processing": [("timestamp", "<i8"), ("x", "<i2"), ("y", "<i2"), ("polarity", "i1")],
    "expelliarmus": [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1")],
    "event_stream": [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), (("p", "on"), "?")],
    "aedat": [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), (("on", "p"), "?")],
}


@st.composite
def event_lists(draw, most=40):
    """Times, columns, rows and polarities of a camera, in the order of time."""
    n = draw(st.integers(0, most))
    times = sorted(draw(st.lists(st.integers(-50, 400), min_size=n, max_size=n)))
    place = st.tuples(st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1), st.integers(0, 1))
    places = draw(st.lists(place, min_size=n, max_size=n))
    return [(t, *place) for t, place in zip(times, places, strict=True)]


def recorded(rows, reader="tonic") -> np.ndarray:
    """Events as a structured array of a library."""
    array = np.zeros(len(rows), READERS[reader])
    time, p = ("timestamp", "polarity") if reader == "dv-processing" else ("t", "p")
    for k, (t, x, y, polarity) in enumerate(rows):
        array[time][k], array["x"][k], array["y"][k], array[p][k] = t, x, y, polarity
    return array


def counted(events: er.Events) -> Counter:
    """The values of events by (step, sample, unit)."""
    events.check()
    steps, samples = np.divmod(events.rows(), max(1, events.shape[1]))
    keys = zip(steps.tolist(), samples.tolist(), events.indices.tolist(), strict=True)
    return Counter(dict(zip(keys, events.values.tolist(), strict=True)))


@given(batch=st.lists(event_lists(), min_size=1, max_size=3), window=st.integers(1, 90), aligned=st.booleans())
def test_bin_events_any_recordings_equal_a_plain_count_of_every_event(batch, window, aligned):
    t0 = -50 if aligned else None
    recordings = [Recording.from_array(recorded(rows), SENSOR) for rows in batch]
    events, lengths = bin_events(recordings, window, t0=t0)

    expected = Counter()
    for sample, rows in enumerate(batch):
        for t, x, y, p in rows:
            start = rows[0][0] if t0 is None else t0
            expected[((t - start) // window, sample, (p * HEIGHT + y) * WIDTH + x)] += 1
    assert counted(events) == expected
    ends = [max((step for step, b, _ in expected if b == sample), default=-1) + 1 for sample in range(len(batch))]
    assert lengths.tolist() == ends
    assert events.shape == (max(ends), len(batch), 2 * HEIGHT * WIDTH)

    dense, read = padded_counts(recordings, window, t0=t0)
    np.testing.assert_array_equal(np.moveaxis(dense[:, : len(events.to_dense())], 0, 1), events.to_dense())
    assert dense.sum() == sum(map(len, batch))
    assert read.tolist() == [max(1, end) for end in ends]


@pytest.mark.parametrize("reader", READERS)
def test_from_array_records_of_a_library_give_the_same_units(reader):
    rows = [(3, 0, 2, 1), (3, 3, 0, 0), (9, 1, 1, 1)]
    array = recorded(rows, reader)
    before = array.copy()
    recording = Recording.from_array(array, SENSOR)
    assert recording.times.tolist() == [3, 3, 9]
    assert recording.units.tolist() == [(p * HEIGHT + y) * WIDTH + x for _, x, y, p in rows]
    assert recording.size == 2 * HEIGHT * WIDTH
    np.testing.assert_array_equal(array, before)


def test_from_array_one_polarity_and_channels_read_no_more_fields():
    rows = [(0, 1, 2, 1), (5, 1, 2, 0)]
    merged = Recording.from_array(recorded(rows), SENSOR, polarities=1)
    assert (merged.size, merged.units.tolist()) == (HEIGHT * WIDTH, [2 * WIDTH + 1] * 2)
    cochlea = Recording.from_array(recorded(rows)[["t", "x"]], 5)
    assert (cochlea.size, cochlea.units.tolist()) == (5, [1, 1])
    both_ears = Recording.from_array(recorded(rows)[["t", "x", "p"]], 5, polarities=2)
    assert both_ears.units.tolist() == [6, 1]


def test_from_array_unsigned_stamps_do_not_wrap():
    array = np.zeros(2, [("t", np.uint64), ("x", np.uint8)])
    array["t"] = 2**40, 2**40 + 7
    assert bin_events([Recording.from_array(array, 1)], 5, t0=2**40 - 5)[1].tolist() == [3]


def test_from_array_sort_keeps_the_order_of_equal_times():
    array = recorded([(9, 0, 0, 0), (3, 1, 0, 0), (3, 2, 0, 0)])
    assert Recording.from_array(array, SENSOR, sort=True).units.tolist() == [1, 2, 0]


def test_from_array_seconds_become_the_nearest_ticks():
    array = np.zeros(3, [("t", np.float32), ("x", int)])
    array["t"] = 0.0, 0.0015, 0.25
    recording = Recording.from_array(array, 1, ticks=1000)
    assert recording.times.tolist() == np.rint(array["t"].astype(float) * 1000).astype(int).tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"array": recorded([(5, 0, 0, 0), (4, 0, 0, 0)])}, "times: 4 at event 1 comes after 5"),
        ({"array": recorded([(5, 4, 0, 0)])}, "x: got 4 at event 0, need 0..3"),
        ({"array": recorded([(5, 0, 3, 0)])}, "y: got 3 at event 0, need 0..2"),
        ({"array": recorded([(5, 0, -1, 0)])}, "y: got -1 at event 0"),
        ({"array": recorded([(5, 0, 0, 2)], "dv-processing")}, "p: got 2 at event 0, need 0..1"),
        ({"array": recorded([])[["t", "x", "p"]]}, "need y; for a cochlea"),
        ({"array": recorded([])[["t", "x", "y"]]}, "need one of p, on, polarity; give polarities=1"),
        ({"array": recorded([])[["x", "y", "p"]]}, "need one of t, timestamp"),
        ({"array": np.zeros(3)}, "events: got float64 (3,)"),
        ({"array": np.zeros(1, [("t", float), ("x", int)]), "sensor": 2}, "t: got float64, need whole numbers; ticks"),
        (
            {"array": np.array([(np.nan, 0)], [("t", float), ("x", int)]), "sensor": 2, "ticks": 9},
            "t: got nan at event 0",
        ),
        ({"array": np.array([(2**64 - 1, 0)], [("t", "u8"), ("x", int)]), "sensor": 2}, "int64 holds"),
        ({"ticks": 1000}, "ticks: got 1000, but the stamps are int64"),
        ({"sensor": (3,)}, "sensor: got (3,)"),
        ({"sensor": (10**12, 10**12)}, "sensor: got (1000000000000, 1000000000000), which has more than"),
        ({"sensor": np.array(5)}, "sensor: got array(5)"),
        (
            {"array": np.zeros(2, [("t", float, (3,)), ("x", int)]), "sensor": 2, "ticks": 9, "sort": True},
            "t: got float64 (2, 3), need numbers (n,)",
        ),
        ({"array": np.zeros(1, [("t", float), ("x", int)]), "sensor": 2, "ticks": 10**400}, "ticks: got 1000"),
        ({"sensor": 0}, "sensor: got 0"),
        ({"sensor": None}, "sensor: got None"),
        (
            {"array": np.array([(1, 0, 0, 1), (2, 0, 0, -1)], [("t", int), ("x", int), ("y", int), ("on", "i1")])},
            "p: got -1 at event 1, need 0 and 1; where they are -1 and 1, set array['on'][array['on'] < 0] = 0",
        ),
        ({"polarities": 3}, "polarities: got 3"),
        ({"sort": 1}, "sort: got 1"),
    ],
)
def test_from_array_wrong_records_are_refused_by_name(change, words):
    arguments = {"array": recorded([(5, 0, 0, 0)]), "sensor": SENSOR} | change
    with pytest.raises(ValueError) as refused:
        Recording.from_array(**arguments)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "window: got 0"),
        ({"window": 1}, "in the unit of the stamps"),
        ({"window": 10**30}, "window: got 1000"),
        # A window in another unit than the stamps would take more memory than there is.
        ({"window": 2**13}, "divides the recordings into 268,435,457 steps"),
        ({"steps": 2**40}, "steps: got 1,099,511,627,776"),
        ({"t0": 11}, "t0: got 11, but recording 0 begins at 10"),
        ({"steps": 2, "window": 2**40}, "steps: got 2, but recording 0 has 3"),
        ({"recordings": []}, "recordings: got none"),
        ({"recordings": [Recording([0], [0], 2), Recording([0], [0], 3)]}, "recordings of 2, 3 units"),
        ({"t0": -(2**63), "window": 2**62}, "more than int64 can count"),
    ],
)
def test_bin_events_wrong_arguments_are_refused_and_no_event_is_left_out(change, words):
    long = Recording([10, 10 + 2**41], [0, 1], 2)
    arguments = {"recordings": [long], "window": 2**41} | change
    with pytest.raises(ValueError) as refused:
        bin_events(**arguments)
    assert words in str(refused.value)


def test_padded_counts_that_no_memory_holds_are_refused():
    long = Recording([0, 2**27 - 1], [0, 1], 2**31 - 1)
    with pytest.raises(ValueError, match="window: got 1, for which the counts need 1 x 134,217,728 x 2,147,483,647"):
        padded_counts([long], 1)


def test_bin_events_one_recording_or_another_object_is_a_type_error():
    with pytest.raises(TypeError, match="in a list"):
        bin_events(Recording([0], [0], 2), 5)
    with pytest.raises(TypeError, match=r"recordings\[0\]"):
        bin_events([np.zeros(3)], 5)


def test_simulate_a_padded_batch_of_recordings_equals_each_alone():
    recordings, _ = data.chirps(3, seed=4, channels=8, duration=20_000)
    events, lengths = bin_events(recordings, 1000)
    network = er.Network.random([5], inputs=8, rng=np.random.default_rng(0), threshold=0.05)
    whole = er.simulate(network, events, lengths=lengths, backend="reference")
    for b, recording in enumerate(recordings):
        alone = er.simulate(network, recording.to_events(1000), backend="reference")
        np.testing.assert_array_equal(whole.output[: lengths[b], b], alone.output[:, 0])


# --- files ---


def test_read_recording_every_kind_of_file_gives_the_same_recording(tmp_path):
    array = recorded([(2**60 + 1, 3, 2, 1), (2**60 + 8, 0, 1, 0)])
    columns = {name: array[name] for name in ("t", "x", "y", "p")}
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", events=array)
    np.savez(tmp_path / "c.npz", extra=np.zeros(7), **columns)
    lines = ["camera, timestamp ,x,y,on", *(f"7,{t},{x},{y},{int(p)}" for x, y, t, p in array.tolist())]
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
    expected = Recording.from_array(array, SENSOR)
    for name in ("a.npy", "b.npz", "c.npz", "d.csv"):
        found = read_recording(tmp_path / name, SENSOR)
        assert (found.times.tolist(), found.units.tolist()) == (expected.times.tolist(), expected.units.tolist()), name


def test_read_recording_n_mnist_adds_the_overflows_of_the_counter(tmp_path):
    def event(x, y, polarity, t):
        return bytes([x, y, polarity << 7 | t >> 16, t >> 8 & 255, t & 255])

    (tmp_path / "0.bin").write_bytes(event(1, 2, 1, 70_000) + event(0, 240, 0, 3) + event(33, 33, 0, 65_000))
    recording = read_recording(tmp_path / "0.bin")
    assert recording.times.tolist() == [70_000, 65_000 + 2**13]
    assert recording.units.tolist() == [34 * 34 + 2 * 34 + 1, 33 * 34 + 33]
    (tmp_path / "1.bin").write_bytes(b"")
    assert len(read_recording(tmp_path / "1.bin")) == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.aedat4", b"", "none of .bin, .npy, .npz, .csv; read it with the library of the device"),
        ("a.h5", b"", "read_heidelberg"),
        ("a.bin", b"abcd", "has 4 bytes"),
        ("a.bin", bytes([99, 0, 0, 0, 0]), "x: got 99 at event 0"),
        ("a.npy", b"no array", "NumPy cannot read it"),
        ("a.csv", b"", "its first line is empty"),
        ("a.csv", b"a,b\n1,2\n", "its first line is a, b"),
        ("a.csv", b"t,x,y,p\n1,2\n", "below its first line"),
        ("a.csv", b"t,x,y,p\n1,two,0,0\n", "two"),
        ("a.csv", b"t,x,y,p\n1.5,2,0,0\n", "ticks=1_000_000"),
    ],
)
def test_read_recording_wrong_files_are_refused_with_their_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordingError) as refused:
        read_recording(tmp_path / name, (34, 34))
    assert name in str(refused.value)
    assert words in str(refused.value)


def test_read_recording_damaged_and_misnamed_archives_are_refused_with_their_name(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", t=np.arange(300), x=np.arange(300))
    np.save(tmp_path / "b.npy", np.arange(3))
    whole, plain = (tmp_path / "a.npz").read_bytes(), (tmp_path / "b.npy").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:120])
    (tmp_path / "bad.npz").write_bytes(whole[:60] + b"\xff" * 30 + whole[90:])
    (tmp_path / "archive.npy").write_bytes(whole)
    (tmp_path / "array.npz").write_bytes(plain)
    for name, words in (
        ("cut.npz", "cannot read"),
        ("bad.npz", "cannot read"),
        ("archive.npy", "rename it"),
        ("array.npz", "rename it"),
    ):
        with pytest.raises(RecordingError, match=f"{name}: .*{words}"):
            read_recording(tmp_path / name, 300)


def test_read_recording_csv_of_spreadsheets_and_of_numpy_savetxt(tmp_path):
    array = np.array([[1, 2], [5, 3]])
    np.savetxt(tmp_path / "numpy.csv", array, fmt="%d", delimiter=",", header="t,x")
    (tmp_path / "sheet.csv").write_bytes("\ufefft,x\r\n1,2\r\n5,3\r\n".encode())
    for name in ("numpy.csv", "sheet.csv"):
        found = read_recording(tmp_path / name, 4)
        assert (found.times.tolist(), found.units.tolist()) == ([1, 5], [2, 3])
    (tmp_path / "other.csv").write_bytes("t,x\n1,2\n".encode("utf-16"))
    with pytest.raises(RecordingError, match=r"other.csv: is no text in UTF-8"):
        read_recording(tmp_path / "other.csv", 4)


def test_read_recording_arrays_without_fields_or_of_two_lengths_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    np.savez(tmp_path / "b.npz", t=np.zeros(3, int), x=np.zeros(2, int))
    np.savez(tmp_path / "c.npz", q=np.zeros(3))
    for name in ("a.npy", "b.npz", "c.npz"):
        with pytest.raises(RecordingError, match=name):
            read_recording(tmp_path / name, 4)
    with pytest.raises(ValueError, match="sensor: give"):
        read_recording(tmp_path / "a.npy")


def heidelberg(path, times, units, labels) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    with h5py.File(path, "w") as file:
        for name, rows, kind in (("times", times, np.float16), ("units", units, np.uint16)):
            stored = file.create_dataset(f"spikes/{name}", (len(rows),), h5py.vlen_dtype(kind))
            for k, row in enumerate(rows):
                stored[k] = np.array(row, kind)
        file["labels"] = np.array(labels, np.uint16)


def test_read_heidelberg_seconds_become_microseconds_and_no_event_is_lost(tmp_path):
    heidelberg(tmp_path / "shd.h5", [[0.25, 0.5, 1.0], []], [[0, 699, 5], []], [3, 17])
    recordings, labels = data.read_heidelberg(tmp_path / "shd.h5")
    assert labels.tolist() == [3, 17]
    assert [each.times.tolist() for each in recordings] == [[250_000, 500_000, 1_000_000], []]
    assert recordings[0].units.tolist() == [0, 699, 5]
    assert {each.size for each in recordings} == {700}
    assert len(data.read_heidelberg(tmp_path / "shd.h5", limit=1)[0]) == 1


def test_read_heidelberg_other_files_are_refused(tmp_path):
    heidelberg(tmp_path / "wrong.h5", [[0.5, 0.25]], [[0, 0]], [1])
    with pytest.raises(RecordingError, match=r"wrong.h5: recording 0: times: 250000 at event 1"):
        data.read_heidelberg(tmp_path / "wrong.h5")
    heidelberg(tmp_path / "range.h5", [[0.5]], [[700]], [1])
    with pytest.raises(RecordingError, match="x: got 700"):
        data.read_heidelberg(tmp_path / "range.h5")
    h5py = pytest.importorskip("h5py")
    heidelberg(tmp_path / "labels.h5", [[0.5]], [[0]], [1])
    with h5py.File(tmp_path / "labels.h5", "a") as file:
        del file["labels"]
        file["labels"] = np.array([1.5])
    with pytest.raises(RecordingError, match=r"labels: got float64 \(1,\)"):
        data.read_heidelberg(tmp_path / "labels.h5")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        for name in ("spikes/times/0", "spikes/units/0", "labels"):
            file[name] = np.zeros(1, int)
    with pytest.raises(RecordingError, match="need one row per recording"):
        data.read_heidelberg(tmp_path / "group.h5")
    (tmp_path / "text.h5").write_text("no recordings")
    with pytest.raises(RecordingError, match="h5py cannot read it"):
        data.read_heidelberg(tmp_path / "text.h5")
    with pytest.raises(FileNotFoundError):
        data.read_heidelberg(tmp_path / "nothing.h5")


# --- event data of NIR ---


def valued(idx, time, value=None, *, n_neurons=3, t_max=1.0):
    """What a `nir.ValuedEventData` or, without values, a `nir.EventData` holds."""
    found = SimpleNamespace(idx=np.array(idx), time=np.array(time), n_neurons=n_neurons, t_max=t_max)
    if value is not None:
        found.value = np.array(value)
    return found


def test_from_nir_times_on_the_edge_of_a_step_are_of_that_step():
    whole = np.arange(999)
    events = data.from_nir(valued([np.zeros(999, int)], [whole * 0.001], t_max=0.999), 0.001)
    np.testing.assert_array_equal(events.rows(), whole)
    assert events.shape == (999, 1, 3)


def test_from_nir_pads_sums_and_drops_sums_of_zero():
    events = data.from_nir(
        valued(
            [[1, 1, 2, 2], [0, -1, -1, -1]],
            [[0.1, 0.2, 0.6, 0.7], [0.9] + [np.inf] * 3],
            [[1.5, 2.0, 1.0, -1.0], [4.0, 0, 0, 0]],
        ),
        0.5,
    )
    assert counted(events) == {(0, 0, 1): 3.5, (1, 1, 0): 4.0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (valued([[3]], [[0.1]]), "idx: got 3 at (sample, event) (0, 0), need 0..2"),
        (valued([[-2]], [[0.1]]), "idx: got -2"),
        (valued([[0]], [[1.0]]), "time: got 1.0"),
        (valued([[0]], [[np.inf]]), "time: got inf"),
        (valued([[0]], [[-0.1]]), "time: got -0.1"),
        (valued([[0]], [[1.1]], t_max=1.05), "time: got 1.1"),
        (valued([[0]], [[0.1]], [[1e300]]), "value as float32: got inf"),
        (valued([[0]], [[0.1]], t_max=1e9), "dt: got 0.5, which divides 1e+09 seconds"),
        (valued([[0]], [[0.1]], [[np.nan]]), "value: got nan"),
        (valued([[0, 1]], [[0.1]]), "need the same shape"),
        (valued([0], [0.1]), "idx: got int64 (1,)"),
        (valued([[0]], [[0.1]], t_max=np.inf), "t_max: got inf"),
        (valued([[0]], [[0.1]], n_neurons=0), "n_neurons: got 0"),
    ],
)
def test_from_nir_wrong_data_are_refused_by_name(changed, words):
    with pytest.raises(ValueError) as refused:
        data.from_nir(changed, 0.5)
    assert words in str(refused.value)


@given(rows=event_lists(), window=st.integers(1, 90))
def test_to_nir_and_back_are_the_same_events(rows, window):
    nir = pytest.importorskip("nir", reason="needs nir")
    events, _ = bin_events([Recording.from_array(recorded(rows), SENSOR), Recording([0, 5], [1, 1], 24)], window)
    there = data.to_nir(events, 0.001)
    assert isinstance(there, nir.ValuedEventData)
    back = data.from_nir(there, 0.001)
    assert (back.shape, counted(back)) == (events.shape, counted(events))


def test_from_nir_another_object_is_a_type_error():
    with pytest.raises(TypeError, match="data: got int without idx"):
        data.from_nir(3, 0.5)


# --- synthetic sets ---


@pytest.mark.parametrize(("draw", "classes"), [(data.moving_bars, DIRECTIONS), (data.chirps, SOUNDS)])
def test_synthetic_sets_are_a_function_of_the_seed_and_have_every_class(draw, classes):
    one, two, other = draw(40, seed=1), draw(40, seed=1), draw(40, seed=2)
    assert set(one[1].tolist()) == set(range(len(classes)))
    np.testing.assert_array_equal(one[1], two[1])
    for a, b in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(a.times, b.times)
        np.testing.assert_array_equal(a.units, b.units)
    assert any(len(a) != len(b) for a, b in zip(one[0], other[0], strict=True))
    assert all(len(each) for each in one[0])


def test_moving_bars_the_front_moves_in_the_direction_of_the_label():
    recordings, labels = data.moving_bars(60, seed=3, sensor=(8, 12), noise=0.0)
    for recording, label in zip(recordings, labels, strict=True):
        p, place = np.divmod(recording.units, 8 * 12)
        y, x = np.divmod(place, 12)
        along = (x if DIRECTIONS[label] in ("right", "left") else y)[p == 1]
        half = len(along) // 2
        later = along[half:].mean() > along[:half].mean()
        assert later == (DIRECTIONS[label] in ("right", "down"))
