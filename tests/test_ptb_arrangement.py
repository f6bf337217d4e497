"""experiments/ptb.py: the order of words and units for blocks, and the shares that bands of words keep."""

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import eventrnn as er
from eventrnn.data.vocabulary import Vocabulary
from support.scripts import script

WIDTH, WORDS, BANDS = 4, 32, (8, 16)


@pytest.fixture
def network():
    """A network whose columns belong together in fours, but lie apart; every threshold says which unit it is of."""
    rng = np.random.default_rng(3)
    made = er.Network.random([8, 12], rng=rng, symbols=WORDS, embedding=12, tied=True, threshold=0.1)
    embedding = made.embedding.copy()
    for k, row in enumerate(embedding):
        # Of each band, words 0, 2, 4, … use the first inputs and the others the last ones.
        row[6:] *= k % 2
        row[:6] *= 1 - k % 2
    layers = [replace(each, threshold=np.linspace(0.1, 0.2, each.units, dtype=np.float32)) for each in made.layers]
    readout = er.Readout(er.Dense(np.ascontiguousarray(embedding.T)), rng.random(WORDS).astype(np.float32), tied=True)
    vocabulary = Vocabulary(tuple(f"w{k}" for k in range(WORDS)), "word").to_json()
    return replace(
        made, layers=tuple(layers), embedding=embedding, readout=readout, metadata={"vocabulary": vocabulary}
    )


def test_an_arranged_network_is_the_same_in_another_order_that_keeps_more_energy(monkeypatch, network):
    module = script("ptb_arrangement", monkeypatch)
    made, figures = module.arranged(network, WIDTH, BANDS)
    words = [int(each[1:]) for each in Vocabulary.from_json(made.metadata["vocabulary"]).symbols]
    assert words != list(range(WORDS))
    for low, high in zip((0, *BANDS), (*BANDS, WORDS), strict=True):
        assert sorted(words[low:high]) == list(range(low, high)), "words stay in their band"
        assert {len({word % 2 for word in words[k : k + WIDTH]}) for k in range(low, high, WIDTH)} == {1}
    orders = [
        [int(np.flatnonzero(old.threshold == each)[0]) for each in new.threshold]
        for old, new in zip(network.layers, made.layers, strict=True)
    ]
    inputs = [orders[1], orders[0]]
    for old, new, order, below in zip(network.layers, made.layers, orders, inputs, strict=True):
        assert sorted(order) == list(range(old.units))
        columns = np.concatenate([gate * old.units + np.array(order) for gate in range(3)])
        assert np.array_equal(new.w_in.to_dense(), old.w_in.to_dense()[below][:, columns])
        assert np.array_equal(new.w_rec.to_dense(), old.w_rec.to_dense()[order][:, columns])
        assert np.array_equal(new.bias_in, old.bias_in[columns]) and np.array_equal(new.bias_rec, old.bias_rec[columns])
    assert made.readout.tied and np.array_equal(made.embedding, network.embedding[words][:, orders[1]])
    assert np.array_equal(made.readout.bias, network.readout.bias[words])
    assert set(figures) == {"layers.0", "layers.1", "words"}
    assert all(0 < each["before"] <= each["after"] <= 1 for each in figures.values())
    assert figures["words"]["after"] > figures["words"]["before"]


def test_units_that_leave_no_whole_block_are_dropped_by_their_energy(monkeypatch, network):
    module = script("ptb_arrangement", monkeypatch)
    weights = network.layers[1].w_rec.to_dense().copy()
    weights[5] = 0
    embedding = network.embedding.copy()
    embedding[:, 5] = 0
    readout = replace(network.readout, weights=er.Dense(np.ascontiguousarray(embedding.T)))
    network = replace(
        network.with_matrices({"layers.1.w_rec": er.Dense(weights)}), embedding=embedding, readout=readout
    )
    made, _ = module.arranged(network, 5, ())
    assert [layer.units for layer in made.layers] == [5, 10]
    assert network.layers[1].threshold[5] not in made.layers[1].threshold, "it sends nothing"


def test_bands_of_words_keep_their_shares_in_every_group(monkeypatch, network):
    module = script("ptb_tuning", monkeypatch)
    given = ["embedding=0.75", "embedding:8=0.5", "embedding:16=0.25", "layers.0.w_in=1"]
    shares = module.kept_shares(given, network, 0.5)
    pruning = module.gradual_pruning(0.5, shares, network, (1, WIDTH), updates=100, until=0.5, since=0.2)
    assert (pruning.start, pruning.end) == (20, 50) and not pruning.acts(19)
    parameters = {"embedding": network.embedding.copy(), "readout.bias": network.readout.bias}
    parameters |= {name: w.to_dense().copy() for name, w in network.matrices().items() if name != "readout"}
    masks, kept = {}, []
    for step in range(20, 51):
        if pruning.update(step, parameters, masks):
            kept.append(masks["embedding"].mean())
    assert kept == sorted(kept, reverse=True) and kept[0] == 1
    groups = masks["embedding"].reshape(-1, WIDTH, 12)
    assert (groups == groups[:, :1]).all(), "a group of words is kept or pruned as a whole"
    assert list(groups[:, 0].sum(axis=1)) == [9] * 2 + [6] * 2 + [3] * 4
    assert masks["layers.1.w_rec"].mean() < 1 and "layers.0.w_in" not in masks


def test_wrong_bands_and_spans_are_refused(monkeypatch, network, tmp_path):
    tuning, arrangement = script("ptb_tuning", monkeypatch), script("ptb_arrangement", monkeypatch)
    for bad in ("embedding:0=0.5", "embedding:32=0.5", "embedding:x=0.5", "layers.0.w_in:4=0.5"):
        with pytest.raises(ValueError, match="kept: got"):
            tuning.kept_shares([bad], network, 0.5)
    shares = tuning.kept_shares(["embedding=0.5", "embedding:6=0.25"], network, 0.5)
    with pytest.raises(ValueError, match="embedding:6, .* block of 4 words"):
        tuning.gradual_pruning(0.5, shares, network, (1, WIDTH), 100, 0.5)
    with pytest.raises(ValueError, match=r"since: got 0\.5"):
        tuning.gradual_pruning(0.5, {"embedding": 0.5}, network, (1, WIDTH), 100, 0.5, 0.5)
    for bands in ((6,), (16, 8), (32,)):
        with pytest.raises(ValueError, match="bands: got"):
            arrangement.arranged(network, WIDTH, bands)
    with pytest.raises(ValueError, match="layer 0 has 8 units"):
        arrangement.arranged(network, 16, ())
    apart = er.Network.random([8, 12], rng=np.random.default_rng(0), symbols=WORDS, embedding=16, readout=WORDS)
    with pytest.raises(ValueError, match="its embedding is 16 wide, but the last layer, .*, has 12 units"):
        arrangement.arranged(apart, WIDTH, ())
    module = script("ptb", monkeypatch)
    outcome = CliRunner().invoke(
        module.app, ["arrange", "x", "--bands", "a", "--out", str(tmp_path / "out.safetensors")]
    )
    assert "bands: got 'a'" in str(outcome.exception)
