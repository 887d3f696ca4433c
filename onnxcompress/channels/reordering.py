"""Channels in an order in which the layers that read them quantize better: an exact rewrite that costs no byte.

What makes the channels, goes along with them and reads them is permuted alike, group by group (``groups.py``), so that
the graph computes what it did. Which channels stand together is chosen for all readers of a group at once, see
``codebook/permuting.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.channels.checking import compare_with_zeroed
from onnxcompress.channels.groups import Channels, Group, find_channels
from onnxcompress.channels.trace import Binding
from onnxcompress.codebook.layers import Layer, find_layers
from onnxcompress.codebook.permuting import Reading, find_joint_order, weighted_products
from onnxcompress.codebook.segments import Network, prune
from onnxcompress.graph import Constant, Graph, Tensor
from onnxcompress.model_io import load, save, to_proto
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.validation.equivalence import run_model

logger = logging.getLogger(__name__)

MIN_CHANNELS = 16
DAMPING = 0.1
TOLERANCE = 1e-4  # max|d| / max|y|: sums are taken in another order
Orders = Mapping[str, np.ndarray]


class Reorderable:
    """The groups of channels of a graph whose order is free, and the layers that gain by it.

    Args:
        graph: The outermost graph, its nodes in order and its shapes inferred.
        layers: Of the graph.

    Attributes:
        readers: By the group's name, the layers that read its channels, and where each begins in their rows.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer]) -> None:
        self.channels = find_channels(graph)
        self._places = _places(self.channels)
        by_name = {layer.name: layer for layer in layers if len(layer.uses) == 1 and layer.groups == 1}
        self.readers: dict[str, list[tuple[Layer, int]]] = {}
        for group in self.channels.groups:
            if not group.frozen and group.size >= MIN_CHANNELS and self._is_free(group):
                found = self._readers(group, by_name)
                if found:
                    self.readers[group.name] = found

    @property
    def layers(self) -> list[Layer]:
        """Those that read channels whose order is free."""
        return list({layer.name: layer for found in self.readers.values() for layer, _ in found}.values())

    def orders(self, variances: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An order for each group.

        Args:
            variances: By the layer's name, (channels,) of what it reads, where they are known.

        Returns:
            (C,) intp by the group's name: the channel that stands in each place.
        """
        found = {}
        for name, readers in self.readers.items():
            size = self.channels.by_name[name].size
            readings = []
            for layer, start in readers:
                kernel = layer.kernel
                known = variances.get(layer.name, np.ones(layer.length // kernel))
                mean = float(known.mean())
                hessian = (known / mean if mean > 0 else np.ones_like(known)) + DAMPING
                columns = slice(start * kernel, (start + size) * kernel)
                sizes = np.repeat(np.sqrt(hessian), kernel)[columns]
                products = weighted_products(layer.matrix()[:, columns], sizes, kernel)
                # Where bytes are well spent, the errors of layers are in proportion to their weights.
                share = layer.outputs * size * kernel / sum(one.outputs * one.length for one, _ in readers)
                lengths = [m for m in lengths_of(kernel) if size % m == start % m == 0]
                readings += [Reading(products, together, share / len(lengths)) for together in lengths]
            found[name] = find_joint_order(readings)
        return found

    def _is_free(self, group: Group) -> bool:
        """Whether each channel stands in as many places of each constant as the others, and in none with others."""
        own = set(group.atoms)
        for places in self._places.values():
            mixed = any(len(atoms) > 1 and own & atoms for atoms in places)
            counts = dict.fromkeys(own, 0)
            for atoms in places:
                for atom in own & atoms:
                    counts[atom] += 1
            if mixed or len(set(counts.values())) > 1:
                return False
        return True

    def _readers(self, group: Group, by_name: Mapping[str, Layer]) -> list[tuple[Layer, int]]:
        found: dict[str, tuple[Layer, int]] = {}
        for binding in self.channels.bindings:
            layer = by_name.get(binding.tensor.name) if binding.role == "input" else None
            if layer is None:
                continue
            places = self._places[binding.tensor, binding.axis]
            at = {atom: place for place, atoms in enumerate(places) for atom in atoms}
            if len(places) != layer.length // layer.kernel or not set(group.atoms) <= set(at):
                continue
            start = at[group.atoms[0]]
            consecutive = [at[atom] for atom in group.atoms] == list(range(start, start + group.size))
            if consecutive and any(group.size % m == start % m == 0 for m in lengths_of(layer.kernel)):
                found[layer.name] = layer, start
        return list(found.values())


def reorder(
    path: Path, folder: Path, names: Collection[str], feeds: Sequence[Mapping[str, Any]], runtime: Runtime, *,
    options: RunOptions,
) -> Path | None:  # fmt: skip
    """Write a model with its channels in another order.

    Args:
        path: The model.
        folder: Where the result goes.
        names: Of the layers that are to gain.
        feeds: Inputs to see by what the layers read; none go by the weights alone.
        runtime: Where models run.
        options: How onnxruntime loads them.

    Returns:
        The result, which computes what the model does; None where no order is free.
    """
    before, graph = load(path), load(path)
    layers = [layer for layer in find_layers(graph)[0] if layer.name in names]
    found = Reorderable(graph, layers)
    if not found.readers:
        return None
    variances = input_variances(graph, found.layers, feeds, runtime, options) if feeds else {}
    reorder_channels(found.channels, found.orders(variances))
    target = folder / path.name
    if feeds:
        compared = compare_with_zeroed(
            to_proto(graph), to_proto(before), feeds[:1], runtime, folder, tolerance=TOLERANCE, options=options
        )
        if not compared.equivalent:
            logger.info("%s: channels stay in their order: %s", path, compared.message())
            return None
    save(graph, target)
    return target


def input_variances(
    graph: Graph,
    layers: Sequence[Layer],
    feeds: Sequence[Mapping[str, Any]],
    runtime: Runtime,
    options: RunOptions,
) -> dict[str, np.ndarray]:
    """By the layer's name, the variance of each channel that it reads; of layers that read rows."""
    axes = {"patches": 1, "spread patches": 1, "last axis": -1}
    sources = {layer.name: layer.uses[0].rows for layer in layers if not layer.in_body}
    tensors = {source.tensor: axes[source.form] for source in sources.values() if source.form in axes}
    network = Network(graph, layers, list(feeds[0]))
    made = {name for operation in network.operations for name in operation.writes}
    names = [name for name in tensors if name in made]
    if not names:
        return {}
    model = network.model(prune(network.operations, names), feeds[0], names, None)
    sums: dict[str, np.ndarray] = {}
    for feed in feeds:  # one by one: all that the layers read is in memory together
        (values,) = run_model(runtime, model, [feed], options)
        for name, value in zip(names, values, strict=True):
            rows = np.moveaxis(np.asarray(value, np.float64), tensors[name], 0)
            rows = rows.reshape(len(rows), -1)
            own = np.stack([np.full(len(rows), rows.shape[1]), rows.sum(axis=1), (rows**2).sum(axis=1)])
            sums[name] = sums[name] + own if name in sums else own
    spread = {name: np.maximum(s[2] / s[0] - (s[1] / s[0]) ** 2, 0) for name, s in sums.items() if s[0].all()}
    return {
        name: spread[source.tensor]
        for name, source in sources.items()
        if source.tensor in spread and np.isfinite(spread[source.tensor]).all()
    }


def lengths_of(kernel: int) -> tuple[int, ...]:
    """Of how many channels blocks are likely to be; one kernel alone has no neighbours."""
    return (8, 4) if kernel == 1 else (2,) if kernel <= 9 else ()


def reorder_channels(channels: Channels, orders: Orders) -> None:
    """Put channels in another order, everywhere; ``channels`` is of no use afterwards.

    Args:
        channels: Of a graph that was not changed since.
        orders: By the group's name, the channel that is to stand in each place; each of ``Reorderable.readers``.
    """
    moved: dict[int, int] = {}
    for name, order in orders.items():
        atoms = channels.by_name[name].atoms
        moved.update({atoms[place]: atoms[channel] for place, channel in enumerate(order.tolist())})
    taken: dict[Tensor, dict[int, np.ndarray]] = {}
    for (tensor, axis), places in _places(channels).items():
        of_atom: dict[int, list[int]] = {}
        for place, atoms_there in enumerate(places):
            for atom in atoms_there:
                of_atom.setdefault(atom, []).append(place)
        index = np.arange(len(places))
        for atom, here in of_atom.items():
            if atom in moved:
                index[here] = of_atom[moved[atom]]
        if (index != np.arange(len(places))).any():
            taken.setdefault(tensor, {})[axis] = index
    for tensor, axes in taken.items():
        assert isinstance(tensor, Constant)
        values = tensor.values
        for axis, index in axes.items():
            values = values.take(index, axis)
        fresh = Constant(tensor.name, np.ascontiguousarray(values), home=tensor.home)
        for node in list(dict.fromkeys(tensor.outputs)):
            node.inputs = [fresh if given is tensor else given for given in node.inputs]
            channels.graph.touch(node)


def _places(channels: Channels) -> dict[tuple[Tensor, int], list[frozenset[int]]]:
    """The atoms that stand in each place of each axis of a constant."""
    bindings: dict[tuple[Tensor, int], Binding] = {}
    for binding in channels.bindings:
        bindings.setdefault((binding.tensor, binding.axis), binding)
    return {key: channels.atoms_of(binding.line) for key, binding in bindings.items()}
