"""For the command `arrange` of ptb.py: an order of words and units in which blocks of neighbours lose little.

A block 1xC is kept or pruned as a whole: C neighbouring outputs of one input. The order of words and of the units of a
layer is free, so neighbours are made to use the same inputs. Energy is the sum of squared weights; the order is to lose
little of it where every group of C columns keeps the same share of its blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

import eventrnn as er
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.weights import Dense

# Share of the blocks of a group that are counted as kept while the groups are sought.
KEPT = 0.4

# Rounds of power iteration per bisection, and of reassignment of columns to groups.
POWER, ROUNDS = 8, 4


def arranged(network: er.Network, width: int, bands: tuple[int, ...]) -> tuple[er.Network, dict[str, Any]]:
    """The network, dense and tied, with words and units in another order; and the shares of energy kept before and
    after. A read-out that was apart from the embedding replaces it.

    width : outputs per block. Each layer loses the fewest units that leave whole blocks per gate, those whose weights
            to others have the least energy; everything else is a change of order
    bands : first words of the bands but the first, ascending; words move within their band only

    Raises ValueError for a network without a read-out over its embedding, for an embedding that is not as wide as the
    last layer, for layers with fewer units than `width`, and for bands that do not ascend between the first and the
    last word, or whose limits do not fall between blocks.
    """
    embedding, readout = network.embedding, network.readout
    if embedding is None or readout is None or readout.weights.shape[1] != len(embedding):
        raise ValueError("model: needs an embedding and a read-out over the same words")
    units = network.layers[-1].units
    if embedding.shape[1] != units:
        width_of = f"its embedding is {embedding.shape[1]} wide"
        raise ValueError(f"model: {width_of}, but the last layer, which it would be tied to, has {units} units")
    words = len(embedding)
    limits = (0, *bands, words)
    if list(limits) != sorted(set(limits)) or any(limit % width for limit in limits[:-1]):
        raise ValueError(f"bands: got {bands}, need ascending multiples of {width} between 0 and {words}")
    matrices = {name: w.to_dense() for name, w in network.matrices().items()}
    layers, vectors, figures = network.layers, {}, {}
    for k, layer in enumerate(layers):
        if layer.units < width:
            raise ValueError(f"model: layer {k} has {layer.units} units; need at least the width of a block, {width}")
        sent = [matrices[f"layers.{k}.w_rec"], matrices.get(f"layers.{k + 1}.w_in", matrices["readout"])]
        energy = sum(np.square(each, dtype=np.float64).sum(axis=1) for each in sent)
        fewest = np.sort(np.argsort(-energy, kind="stable")[: layer.units // width * width])
        gates = layer.cell.gates
        # The first input matrix is not among these: where the embedding is folded into it, pruning it saves nothing.
        panels = [matrices[f"layers.{k}.w_rec"], *([matrices[f"layers.{k}.w_in"]] if k else [])]
        energies = [np.square(part[:, fewest]).T for each in panels for part in np.split(each, gates, axis=1)]
        groups, figures[f"layers.{k}"] = sought(energies, width, (0, len(fewest)))
        _reorder(matrices, k, gates, len(layers), order := fewest[groups])
        rows = np.concatenate([gate * layer.units + order for gate in range(gates)])
        vectors[k] = {name: getattr(layer, name)[rows] for name in ("bias_in", "bias_rec")}
        vectors[k]["threshold"] = layer.threshold[order]
    # The rows of an input matrix follow the layer below, so that no layer is made before all of them are in order.
    for k, changed in vectors.items():
        changed |= {name: Dense(matrices[f"layers.{k}.{name}"]) for name in ("w_in", "w_rec")}
    order, figures["words"] = sought([np.square(matrices["readout"]).T], width, limits)
    embedding = np.ascontiguousarray(matrices["readout"][:, order].T)
    vocabulary = Vocabulary.from_json(network.metadata["vocabulary"])
    vocabulary = replace(vocabulary, symbols=tuple(vocabulary.symbols[k] for k in order))
    made = replace(
        network,
        layers=tuple(replace(layer, **vectors[k]) for k, layer in enumerate(layers)),
        embedding=embedding,
        readout=er.Readout(Dense(np.ascontiguousarray(embedding.T)), readout.bias[order], tied=True),
        metadata={**network.metadata, "vocabulary": vocabulary.to_json()},
    )
    return made, figures


def _reorder(matrices: dict[str, np.ndarray], k: int, gates: int, layers: int, order: np.ndarray) -> None:
    """Take the units of layer k in this order, in place: columns of its matrices, rows of those that it feeds.

    The units of the last layer are the values of a word, which is the input of the first layer too.
    """
    for name in (f"layers.{k}.w_in", f"layers.{k}.w_rec"):
        parts = np.split(matrices[name], gates, axis=1)
        matrices[name] = np.ascontiguousarray(np.concatenate([part[:, order] for part in parts], axis=1))
    fed = [f"layers.{k}.w_rec", *([f"layers.{k + 1}.w_in"] if k + 1 < layers else ["readout", "layers.0.w_in"])]
    for name in fed:
        matrices[name] = np.ascontiguousarray(matrices[name][order])


def sought(energies: list[np.ndarray], width: int, limits: tuple[int, ...]) -> tuple[np.ndarray, dict[str, float]]:
    """An order of columns whose groups of `width` neighbours use the same inputs; and the energy kept before and after.

    energies : matrices (columns, inputs) of the energy of each weight; a group keeps `KEPT` of the inputs in each
    limits   : columns move between two neighbouring limits only

    Columns are bisected along the first principal direction, then assigned anew to groups while that keeps more energy.
    Cost per round: O(columns x inputs x groups), and one linear assignment per band.
    """
    total, order, before, after = sum(float(each.sum()) for each in energies), [], 0.0, 0.0
    for low, high in zip(limits[:-1], limits[1:], strict=True):
        columns = np.arange(low, high)
        scaled = np.sqrt(np.concatenate([each[low:high] for each in energies], axis=1))
        groups = _bisected(scaled, columns - low, width)
        own = [each[low:high] for each in energies]
        before += _kept(own, np.array_split(columns - low, range(width, high - low, width)))[0]
        best = _kept(own, groups)[0]
        for _ in range(ROUNDS):
            tried = _assigned(own, groups, width)
            if (now := _kept(own, tried)[0]) <= best:
                break
            groups, best = tried, now
        after += best
        order.append(low + np.concatenate(groups))
    return np.concatenate(order), {"before": before / total, "after": after / total}


def _bisected(values: np.ndarray, columns: np.ndarray, width: int) -> list[np.ndarray]:
    """Groups of `width` columns, the last one smaller where they do not divide, by repeated bisection."""
    if len(columns) <= width:
        return [columns]
    centred = values[columns] - values[columns].mean(axis=0)
    direction = np.random.default_rng(0).standard_normal(values.shape[1]).astype(values.dtype)
    for _ in range(POWER):
        direction = centred.T @ (centred @ direction)
        direction /= np.linalg.norm(direction) or 1.0
    ranked = columns[np.argsort(centred @ direction, kind="stable")]
    half = -(-len(columns) // width) // 2 * width
    return _bisected(values, ranked[:half], width) + _bisected(values, ranked[half:], width)


def _kept(energies: list[np.ndarray], groups: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """The energy that the groups keep, and per matrix where they keep it: (groups, inputs) of 0 and 1."""
    energy, masks = 0.0, []
    starts = np.cumsum([0, *map(len, groups)])[:-1]
    for each in energies:
        scores = np.add.reduceat(each[np.concatenate(groups)], starts, axis=0)
        count = max(1, round(KEPT * scores.shape[1]))
        mask = np.zeros(scores.shape, np.float32)
        np.put_along_axis(mask, np.argpartition(-scores, count - 1, axis=1)[:, :count], 1, axis=1)
        energy += float((scores * mask).sum(dtype=np.float64))
        masks.append(mask)
    return energy, masks


def _assigned(energies: list[np.ndarray], groups: list[np.ndarray], width: int) -> list[np.ndarray]:
    """Groups of the same sizes, with every column where the inputs that groups keep now hold most of its energy."""
    gain = np.zeros((len(energies[0]), len(groups)), np.float32)
    for each, mask in zip(energies, _kept(energies, groups)[1], strict=True):
        gain += each @ mask.T
    places = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    columns, chosen = linear_sum_assignment(-gain[:, places])
    return [columns[places[chosen] == k] for k in range(len(groups))]
