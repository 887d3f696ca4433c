"""Ranking by data, and weights that make up for the channels that go: least squares on what the layers read.

A layer y = W x loses the inputs R and keeps K. With the covariance C of its input rows the best weights on K are
W' = W C[:, K] C[K, K]^-1 and the bias takes the means; what is lost then is the part of W_R x_R that no linear map of
x_K gives. A group is ranked by that: channels go one by one, each time the one whose loss, over all layers that read
it, is least once the others have made up for it, as in Hassibi & Stork 1993 (Optimal Brain Surgeon) with a layer's
output error in the place of the loss. A layer's error counts as much as it moves the outputs of the network.

The weights are then fitted in execution order, each to the original's outputs on the input that the pruned network
gives it, so that later layers make up for what earlier ones lost. A LayerNormalization over channels sees zeros while
weights are fitted, and in the pruned graph the channels that stay (``normalization_rules``): deit_mini on Fashion-MNIST
(92.6 %), an eighth of its stream removed and fitted, gives 92.2 % with zeros and 92.0 % as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.channels.groups import Channels, Group, Removed
from onnxcompress.channels.labels import Line
from onnxcompress.channels.ranking import Ranking
from onnxcompress.channels.trace import Binding
from onnxcompress.codebook.codebook import Statistics
from onnxcompress.codebook.damage import DamageMeter
from onnxcompress.codebook.layers import Layer, find_layers
from onnxcompress.codebook.statistics import Calibration
from onnxcompress.graph import Constant, Graph, Node
from onnxcompress.runtime import Runtime

logger = logging.getLogger(__name__)

RIDGE = 1e-3  # of the mean variance, towards the weight that was there
MAX_LENGTH = 2304  # rows longer than this are ranked channel by channel, without what others make up for
NOISE = 0.3  # of each weight, to see how much a layer's error moves the outputs
STEPS = 64  # in which a group is ranked
ROWS_PER_INPUT = 16
Say = Callable[[str], None]


@dataclass(eq=False)
class Reader:
    """A layer that mixes channels.

    Attributes:
        layer: Its weight.
        columns: (D, n) atoms of each column of its matrix.
        rows: (outputs, n) atoms of each row.
    """

    layer: Layer
    columns: np.ndarray | None
    rows: np.ndarray | None


class Layers:
    """The layers of a graph with the channels of their rows and columns."""

    def __init__(self, channels: Channels) -> None:
        self.channels = channels
        found, self.refusals = find_layers(channels.graph)
        bound: dict[tuple[Node, int, str], Binding] = {(b.node, b.slot, b.role): b for b in channels.bindings}
        self.readers = []
        for layer in found:
            use = layer.uses[0]
            sides = [bound.get((use.node, use.slot, role)) for role in ("input", "weight")]
            columns, rows = (
                None if side is None else self._spread(side.line, size)
                for side, size in zip(sides, (layer.length, layer.outputs), strict=True)
            )
            self.readers.append(Reader(layer, columns, rows))
        self.layers = [reader.layer for reader in self.readers]
        self.of_layer = {reader.layer: reader for reader in self.readers}

    def _spread(self, line: Line, size: int) -> np.ndarray | None:
        """(size, n) atoms of neighbouring columns, as many for each slice."""
        if line.size == 0 or size % line.size:
            return None
        sets = [sorted(atoms) for atoms in self.channels.atoms_of(line)]
        most = max(map(len, sets), default=0)
        if most == 0:
            return None
        padded = np.array([atoms + [self.channels.count] * (most - len(atoms)) for atoms in sets])
        return np.repeat(padded, size // line.size, axis=0)


@dataclass(frozen=True, eq=False)
class _Consumer:
    """What ranking needs of a layer: weights, covariance of one group of inputs, and what a unit of error costs."""

    weight: np.ndarray
    covariance: np.ndarray
    columns: np.ndarray
    price: float


def rank_by_data(
    channels: Channels,
    samples: Sequence[Mapping[str, Any]],
    runtime: Runtime,
    *,
    judged: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    say: Say = lambda line: None,
) -> dict[str, Ranking]:
    """Rankings of the groups that layers with statistics read; the others are left out.

    Args:
        channels: Of a graph whose BatchNormalizations may still be there.
        samples: Values by input name, each of one batch.
        runtime: Where the network runs.
        judged: A few samples on which a layer's error is held against the outputs; layers count alike without them.
        seed: Of the choice of rows.
        say: Told what is being done.
    """
    layers = Layers(channels)
    free = {atom for group in channels.groups if not group.frozen for atom in group.atoms}
    consumers: list[_Consumer] = []
    energies = np.zeros(channels.count + 1)
    meter = DamageMeter(channels.graph, layers.layers, judged, runtime) if judged else None
    wishes: dict[str, Any] = {"held_out_fraction": 0.0, "rows_per_input": ROWS_PER_INPUT, "seed": seed}
    with Calibration(channels.graph, layers.layers, samples, runtime=runtime, **wishes) as calibration:
        for stage in calibration.stages():
            for layer in stage:
                reader = layers.of_layer[layer]
                statistics = calibration.statistics(layer)
                if statistics is None:
                    continue
                say(f"reading {layer.name}")
                _add_energies(energies, reader, statistics)
                if reader.columns is not None and free & set(np.unique(reader.columns).tolist()):
                    consumers += _consumers(reader, statistics, meter, seed)
    return {
        group.name: ranking
        for group in channels.groups
        if not group.frozen and (ranking := _rank(group, consumers, energies, channels, say)) is not None
    }


def _covariance(statistics: Statistics, group: int) -> np.ndarray:
    mean = statistics.mean[group]
    return np.asarray(statistics.gram[group] / statistics.rows - np.outer(mean, mean))


def _quadratic(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(..., n): x M x' of each row x of (..., n, D), for M of (..., D, D)."""
    return np.asarray(np.einsum("...nd,...nd->...n", rows @ matrix, rows))


def shrinkage(matrices: np.ndarray, rows: int) -> np.ndarray:
    """By how much to scale what is off the diagonal of second moments of few rows.

    Of fewer rows than columns every column is a sum of others, which does not hold for further rows. The share is the
    oracle approximating shrinkage of Chen et al., "Shrinkage algorithms for MMSE covariance estimation" (2010, equation
    23), of the correlations to 0.

    Args:
        matrices: (groups, D, D).
        rows: That they are of.

    Returns:
        (groups,) in [0, 1]; 0 leaves them.
    """
    deviations = np.sqrt(np.diagonal(matrices, axis1=1, axis2=2).clip(min=0))
    scale = np.where(deviations > 0, 1 / np.where(deviations > 0, deviations, 1), 0)
    power = np.square(matrices * scale[:, :, None] * scale[:, None, :]).sum(axis=(1, 2))
    p = np.maximum((deviations > 0).sum(axis=1), 1).astype(np.float64)
    beyond = (rows + 1 - 2 / p) * (power - p)
    share = ((1 - 2 / p) * power + p**2) / np.where(beyond > 0, beyond, 1)
    return np.where(beyond > 0, np.minimum(share, 1.0), 1.0)


def _shrunk(matrices: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(..., D, D) with what is off the diagonal scaled by 1 - share."""
    eye = np.eye(matrices.shape[-1])
    return np.asarray(matrices * (1 - share[..., None, None] * (1 - eye)))


def _consumers(reader: Reader, statistics: Statistics, meter: DamageMeter | None, seed: int) -> list[_Consumer]:
    layer, matrix = reader.layer, reader.layer.matrix().astype(np.float64)
    assert reader.columns is not None
    per_group = layer.outputs // layer.groups
    blocks = [matrix[g * per_group : (g + 1) * per_group] for g in range(layer.groups)]
    covariances = [_covariance(statistics, g) for g in range(layer.groups)]
    if statistics.rows < layer.length:
        shares = shrinkage(np.stack(covariances), statistics.rows)
        covariances = [_shrunk(c, share) for c, share in zip(covariances, shares, strict=True)]
    energy = sum(float(_quadratic(w, c).sum()) for w, c in zip(blocks, covariances, strict=True))
    if energy <= 0:
        return []
    price = 1.0
    if meter is not None and meter.taps:
        noise = NOISE * matrix * np.random.default_rng(seed).normal(size=matrix.shape)
        parts = [noise[g * per_group : (g + 1) * per_group] for g in range(layer.groups)]
        error = sum(float(_quadratic(w, c).sum()) for w, c in zip(parts, covariances, strict=True))
        if error > 0:
            price = meter.measure([(layer, (matrix + noise).astype(np.float32), None)]) / (error / energy)
    return [_Consumer(w, c, reader.columns, price / energy) for w, c in zip(blocks, covariances, strict=True)]


def _add_energies(energies: np.ndarray, reader: Reader, statistics: Statistics) -> None:
    """Add the share of a layer's output that each channel it makes has."""
    if reader.rows is None:
        return
    per_group = reader.layer.outputs // reader.layer.groups
    matrix = reader.layer.matrix()
    own = np.concatenate(
        [
            _quadratic(w, _covariance(statistics, g))
            for g in range(reader.layer.groups)
            for w in [matrix[g * per_group : (g + 1) * per_group]]
        ]
    )
    for atoms, share in zip(reader.rows, own / max(own.sum(), 1e-30), strict=True):
        energies[np.unique(atoms)] += share


def _rank(
    group: Group, consumers: Sequence[_Consumer], energies: np.ndarray, channels: Channels, say: Say
) -> Ranking | None:
    mine = set(group.atoms)
    states = [_Elimination(c, group) for c in consumers if mine & set(np.unique(c.columns).tolist())]
    extra = energies[list(group.atoms)] if channels.contracted & mine else np.zeros(group.size)
    if not states and not extra.any():
        return None
    say(f"ranking {group.name}")
    order: list[int] = []
    costs: list[float] = []
    left = np.ones(group.size, bool)
    step = max(1, group.size // STEPS)
    while len(order) < group.size:
        loss = extra + sum((state.losses() for state in states), np.zeros(group.size))
        loss[~left] = np.inf
        chosen = np.argsort(loss, kind="stable")[: min(step, int(left.sum()))]
        for index in chosen.tolist():
            order.append(index)
            costs.append(max(float(loss[index]), 0.0))
            left[index] = False
        for state in states:
            state.remove(chosen)
    return Ranking(np.array(order), np.array(costs))


class _Elimination:
    """One layer while the channels of a group go: what each would cost now."""

    def __init__(self, consumer: _Consumer, group: Group) -> None:
        self.price = consumer.price
        self.weight = consumer.weight.copy()
        self.columns = _columns_of(consumer, group)
        covariance = consumer.covariance
        self.exact = len(covariance) <= MAX_LENGTH
        if self.exact:
            scale = max(float(np.trace(covariance)) / len(covariance), 1e-30)
            self.inverse = np.linalg.inv(covariance + RIDGE * scale * np.eye(len(covariance)))
        else:
            self.inverse = covariance
        self.gone = np.zeros(group.size, bool)
        self._losses: np.ndarray | None = None

    def losses(self) -> np.ndarray:
        """(channels,) priced errors of removing each alone."""
        if self._losses is None:
            self._losses = np.zeros(len(self.gone))
            by_count: dict[int, list[int]] = {}
            for index, columns in self.columns.items():
                if not self.gone[index]:
                    by_count.setdefault(len(columns), []).append(index)
            for indices in by_count.values():
                columns = np.stack([self.columns[index] for index in indices])  # (n, c)
                weights = self.weight.T[columns]  # (n, c, outputs)
                blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
                middle = np.linalg.solve(blocks, weights) if self.exact else blocks @ weights
                self._losses[indices] = self.price * np.einsum("nco,nco->n", weights, middle)
        return self._losses

    def remove(self, chosen: np.ndarray) -> None:
        self.gone[chosen] = True
        touched = [self.columns[index] for index in chosen.tolist() if index in self.columns]
        if not touched:
            return
        self._losses = None
        columns = np.concatenate(touched)
        if not self.exact:
            return
        block = self.inverse[np.ix_(columns, columns)]
        rows = np.linalg.solve(block, self.inverse[columns])
        self.weight -= self.weight[:, columns] @ rows
        self.inverse -= self.inverse[:, columns] @ rows
        # What is gone is 0 for good; rounding would let it come back.
        self.weight[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0


def _columns_of(consumer: _Consumer, group: Group) -> dict[int, np.ndarray]:
    """By channel of the group the columns of the layer that read it; of those that are read."""
    place = {atom: index for index, atom in enumerate(group.atoms)}
    found: dict[int, list[int]] = {}
    for column, atoms in enumerate(consumer.columns.tolist()):
        for index in {place[atom] for atom in atoms if atom in place}:
            found.setdefault(index, []).append(column)
    return {index: np.array(columns) for index, columns in found.items()}


# -- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What became of one layer.

    Attributes:
        name: Of the weight.
        before: Relative squared error of its outputs that stay, with its inputs gone and nothing done about it.
        after: The same with the new weights.
    """

    name: str
    before: float
    after: float


def compensate(
    channels: Channels,
    removed: Removed,
    samples: Sequence[Mapping[str, Any]],
    runtime: Runtime,
    *,
    seed: int = 0,
    say: Say = lambda line: None,
) -> list[Fit]:
    """Give the layers of the graph weights that make up for channels that are to go; no shape changes.

    ``channels`` is of no use afterwards: a layer may have got a bias.
    """
    layers = Layers(channels)
    gone = channels.gone(removed)
    fits, changes = [], []
    wishes: dict[str, Any] = {"held_out_fraction": 0.0, "rows_per_input": ROWS_PER_INPUT, "seed": seed}
    with Calibration(channels.graph, layers.layers, samples, runtime=runtime, **wishes) as calibration:
        for stage in calibration.stages():
            for layer in stage:
                reader = layers.of_layer[layer]
                statistics = calibration.statistics(layer)
                lost = None if reader.columns is None else gone[reader.columns].any(axis=1)
                dead = None if reader.rows is None else gone[reader.rows].any(axis=1)
                is_touched = any(mask is not None and mask.any() for mask in (lost, dead))
                paired = statistics is not None and statistics.cross is not None
                if layer.in_body or not (is_touched or paired):
                    continue
                say(f"fitting {layer.name}")
                matrix, bias, fit = _fit(layer, statistics, lost, dead)
                calibration.replace(layer, matrix, bias)
                changes.append((layer, matrix, bias))
                if fit is not None:
                    fits.append(fit)
    for layer, matrix, bias in changes:
        _write(channels.graph, layer, matrix, bias)
    return fits


def _fit(
    layer: Layer, statistics: Statistics | None, lost: np.ndarray | None, dead: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, Fit | None]:
    """New weights (outputs, D) and bias of a layer; rows that nothing reads are 0."""
    matrix = layer.matrix().astype(np.float64)
    place = layer.uses[0].bias
    with_bias = layer.has_bias and place is not None and not place.new_add
    old = layer.bias() if with_bias else None
    bias = None if not with_bias else (np.zeros(layer.outputs) if old is None else old.astype(np.float64))
    kept = np.ones(layer.length, bool) if lost is None else ~lost
    fit: Fit | None = None
    result = np.where(kept, matrix, 0.0)
    if statistics is not None and (statistics.cross is not None or not kept.all()):
        result, bias, fit = _solve(layer, statistics, matrix, bias, kept, dead)
    if dead is not None:
        result[dead] = 0
        if bias is not None:
            bias[dead] = 0
    return result.astype(np.float32), None if bias is None else bias.astype(np.float32), fit


def _solve(
    layer: Layer,
    statistics: Statistics,
    matrix: np.ndarray,
    bias: np.ndarray | None,
    kept: np.ndarray,
    dead: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None, Fit]:
    """Least squares, group by group of the convolution."""
    rows, shape = statistics.rows, (layer.groups, layer.outputs // layer.groups)
    weight = matrix.reshape(*shape, -1)
    own, mean = statistics.gram / rows, statistics.mean
    cross = own if statistics.cross is None else statistics.cross / rows
    floats = own if statistics.float_gram is None else statistics.float_gram / rows
    float_mean = mean if statistics.float_mean is None else statistics.float_mean
    missing, missing_mean = np.zeros((*mean.shape, shape[1])), np.zeros(shape)
    if statistics.skip is not None:
        missing, missing_mean = statistics.skip.cross / rows, statistics.skip.mean
    if bias is not None:
        own = own - _outer(mean, mean)
        cross = cross - _outer(mean, float_mean)
        floats = floats - _outer(float_mean, float_mean)
        missing = missing - _outer(mean, missing_mean)
    if rows < layer.length:
        share = shrinkage(own, rows)
        own, cross, floats = (_shrunk(matrix, share) for matrix in (own, cross, floats))
        missing = missing * (1 - share[:, None, None])
    wanted = weight @ _turned(cross) + _turned(missing)  # (groups, outputs, D): what each input should give
    some = own[:, kept][:, :, kept]
    ridge = RIDGE * np.maximum(np.trace(some, axis1=1, axis2=2) / max(kept.sum(), 1), 1e-30)[:, None, None]
    right = wanted[:, :, kept] + ridge * weight[:, :, kept]
    result = np.zeros_like(weight)
    result[:, :, kept] = _turned(np.linalg.solve(some + ridge * np.eye(int(kept.sum())), _turned(right)))
    if bias is not None:
        bias = bias + (np.einsum("god,gd->go", weight, float_mean) + missing_mean).ravel()
        bias -= np.einsum("god,gd->go", result, mean).ravel()
    live = np.ones(shape, bool) if dead is None else ~dead.reshape(shape)
    power = _quadratic(weight, floats)
    errors = [
        float((_quadratic(made, own) - 2 * np.einsum("god,god->go", made, wanted) + power)[live].sum())
        for made in (np.where(kept, weight, 0.0), result)
    ]
    scale = max(float(power[live].sum()), 1e-30)
    before, after = (max(error, 0.0) / scale for error in errors)
    return result.reshape(matrix.shape), bias, Fit(layer.name, before, after)


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Outer products of the rows of (groups, n) and (groups, m)."""
    return np.asarray(a[:, :, None] * b[:, None, :])


def _turned(matrices: np.ndarray) -> np.ndarray:
    return np.asarray(matrices.swapaxes(-1, -2))


def _write(graph: Graph, layer: Layer, matrix: np.ndarray, bias: np.ndarray | None) -> None:
    """Put new numbers where the layer's nodes read them."""
    made: list[Constant] = []
    for use in layer.uses:
        values = np.ascontiguousarray(use.view.from_matrix(matrix).astype(use.origin.dtype))
        # One tensor for all readers: what shares a weight loses the same channels.
        shared = next((c for c in made if c.values.dtype == values.dtype and np.array_equal(c.values, values)), None)
        fresh = shared or graph.new_constant(use.origin.root.name, values)
        made.append(fresh)
        _set_input(graph, use.node, use.slot, fresh)
    place = layer.uses[0].bias
    if bias is None or place is None:
        return
    dtype = layer.uses[0].origin.dtype if place.origin is None else place.origin.dtype
    name = f"{layer.name}_bias" if place.origin is None else place.origin.root.name
    fresh = graph.new_constant(name, np.ascontiguousarray(place.with_part(bias).astype(dtype)))
    _set_input(graph, place.node, place.slot, fresh)


def _set_input(graph: Graph, node: Node, slot: int, fresh: Constant) -> None:
    inputs = list(node.inputs)
    if slot == len(inputs):
        inputs.append(fresh)
    else:
        inputs[slot] = fresh
    node.inputs = inputs
    graph.touch(node)
