"""Which codebooks layers share: each costs its bytes once, however many layers use it.

With a set of shared codebooks given, the bytes are allocated as ever. The set grows by the codebook that lowers the
damage most at the given size, its own bytes taken off, until none does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.codebook.allocation import Offer
from onnxcompress.codebook.codebook import Choice
from onnxcompress.codebook.layers import Layer
from onnxcompress.codebook.offers import VECTORS_PER_CODEWORD, Form
from onnxcompress.codebook.sharing import Member, SharedCodebook, fit_shared, shared_error
from onnxcompress.codebook.statistics import Calibration
from onnxcompress.codebook.target import covariance
from onnxcompress.graph import Graph

POOL_BYTES = 130  # nodes and headers of a shared codebook
MAX_POOLS = 6
NOT_ON_OFFER = Offer(1 << 50, float("inf"))
ROWS_PER_INPUT = 4
PRICES = (-9, 0, 128)  # of a byte, in damage: exponents of ten, and how many
TINY = 1e-12  # of an error that has a logarithm
MEASURABLE = 1 << 21  # numbers in layers that may share: beyond it the estimates have to do
Offers = list[list[Offer]]


@dataclass(frozen=True, order=True)
class Pool:
    """A codebook that layers may share.

    Attributes:
        block: Length of a sub-vector.
        codewords: How many.
        depthwise: For kernels of depthwise convolutions, and for nothing else.
    """

    block: int
    codewords: int
    depthwise: bool

    @property
    def size_bytes(self) -> int:
        return self.block * (self.codewords + 4) + POOL_BYTES


def is_shared(form: Form) -> bool:
    """Whether a form shares its codebook."""
    return isinstance(form, Choice) and form.shared


def pool_of(layer: Layer, form: Form) -> Pool | None:
    """The codebook that a form shares."""
    if isinstance(form, Choice) and form.shared:
        return Pool(form.block, form.codewords, layer.depthwise)
    return None


def with_pools(offers: Offers, pools: Sequence[Sequence[Pool | None]], enabled: Collection[Pool]) -> Offers:
    """The offers without those of other shared codebooks."""
    return [
        [
            offer if pool is None or pool in enabled else NOT_ON_OFFER
            for offer, pool in zip(of_layer, pools_of_layer, strict=True)
        ]
        for of_layer, pools_of_layer in zip(offers, pools, strict=True)
    ]


def choose_pools(offers: Offers, pools: Sequence[Sequence[Pool | None]], room: int | None) -> frozenset[Pool]:
    """The shared codebooks that are worth their bytes.

    Args:
        offers: Of each layer.
        pools: The shared codebook of each offer.
        room: Bytes for the chosen offers and codebooks; None for as few as possible.
    """
    known = sorted({pool for of_layer in pools for pool in of_layer if pool is not None})
    prices = np.zeros(1) if room is None else np.logspace(*PRICES)
    own = _least_costs(offers, pools, None, prices)
    with_pool = {pool: np.minimum(own, _least_costs(offers, pools, pool, prices)) for pool in known}

    def cost(costs: np.ndarray, enabled: Collection[Pool]) -> float:
        """The dual bound: damage and the price of all bytes beyond the room, at the price where that is most."""
        fixed = sum(pool.size_bytes for pool in enabled)
        return float((costs.sum(axis=0) + (fixed if room is None else prices * (fixed - room))).max())

    chosen: frozenset[Pool] = frozenset()
    best = cost(own, chosen)
    while len(chosen) < MAX_POOLS:
        tried = [
            (cost(np.minimum(own, with_pool[pool]), chosen | {pool}), pool) for pool in known if pool not in chosen
        ]
        found = min(tried, default=None)
        if found is None or found[0] >= best:
            break
        best, chosen, own = found[0], chosen | {found[1]}, np.minimum(own, with_pool[found[1]])
    return chosen


def _least_costs(
    offers: Offers, pools: Sequence[Sequence[Pool | None]], pool: Pool | None, prices: np.ndarray
) -> np.ndarray:
    """(layers, prices): the least  damage + price * bytes  of offers of one shared codebook; bytes alone at price 0."""
    found = np.full((len(offers), len(prices)), np.inf)
    for number, (of_layer, pools_of_layer) in enumerate(zip(offers, pools, strict=True)):
        pairs = [(one.damage, one.size_bytes) for one, its in zip(of_layer, pools_of_layer, strict=True) if its == pool]
        if pairs:
            damages, sizes = np.array(pairs, np.float64).T
            costs = sizes[:, None] if not prices.any() else damages[:, None] + sizes[:, None] * prices
            found[number] = costs.min(axis=0)
    return found


def fit_pools(
    graph: Graph,
    layers: Sequence[Layer],
    forms: Mapping[str, Form],
    importance: Mapping[str, float],
    samples: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    **wishes: Any,
) -> dict[str, SharedCodebook]:
    """Fit the shared codebooks of a plan on what the float net gives its layers.

    Args:
        graph: The outermost graph.
        layers: Its layers.
        forms: Of each layer.
        importance: Damage of an error as large as the layer's output.
        samples: To run the float net on.
        seed: Same seed, same codebooks.
        wishes: For ``Calibration``.

    Returns:
        The codebook of each layer that shares one.
    """
    pools = {layer.name: pool_of(layer, forms[layer.name]) for layer in layers}
    sharing = [layer for layer in layers if pools[layer.name] is not None]
    members = _members(graph, sharing, importance, samples, seed=seed, **wishes)
    found: dict[str, SharedCodebook] = {}
    for pool in sorted({pool for pool in pools.values() if pool is not None}):
        names = [layer.name for layer in sharing if pools[layer.name] == pool]
        codebook = fit_shared([members[name] for name in names], pool.block, pool.codewords, seed=seed)
        found.update(dict.fromkeys(names, codebook))
    return found


def measure_pools(
    graph: Graph,
    layers: Sequence[Layer],
    forms: Mapping[str, Collection[Form]],
    importance: Mapping[str, float],
    samples: Sequence[Mapping[str, Any]],
    *,
    swept: bool,
    seed: int,
    **wishes: Any,
) -> dict[str, dict[Form, float]]:
    """Fit each shared codebook that is on offer once, to all layers that it is on offer for.

    How much worse it is than a codebook of a layer's own is no constant: for layers of three nets of ``models/`` the
    squared error was 0.17 to 22 times the estimate of ``offers.py``, most where sub-vectors are long and codewords few.
    Of many sub-vectors the smallest and the largest number of codewords are fitted, those between lie on a line of
    logarithms. Of few, each number is: a codebook that knows them all by heart says nothing about a smaller one.

    Args:
        graph: The outermost graph.
        layers: Its layers.
        forms: On offer for each layer.
        importance: Damage of an error as large as the layer's output.
        samples: To run the float net on.
        swept: Whether layers will be swept with error feedback.
        seed: Same seed, same errors.
        wishes: For ``Calibration``.

    Returns:
        By the layer's name, the relative squared error of its output with each shared form.
    """
    offered = {layer.name: {pool_of(layer, form): form for form in forms[layer.name]} for layer in layers}
    known = {pool for of_layer in offered.values() for pool in of_layer if pool is not None}
    sharing = [layer for layer in layers if any(offered[layer.name])]
    members = _members(graph, sharing, importance, samples, seed=seed, **wishes)
    found: dict[str, dict[Form, float]] = {layer.name: {} for layer in sharing}
    for block, depthwise in sorted({(pool.block, pool.depthwise) for pool in known}):
        family = sorted(pool for pool in known if (pool.block, pool.depthwise) == (block, depthwise))
        users = [layer.name for layer in sharing if any(pool in offered[layer.name] for pool in family)]
        vectors = sum(members[name].weight.size // block for name in users)
        fitted: dict[int, dict[str, float]] = {}
        for size in sorted({pool.codewords for pool in family}):
            ends = size in (family[0].codewords, family[-1].codewords)
            if ends or vectors < VECTORS_PER_CODEWORD * family[-1].codewords:
                codebook = fit_shared([members[name] for name in users], block, size, seed=seed)
                fitted[size] = {name: shared_error(members[name], codebook, swept=swept) for name in users}
        for name in users:
            known_sizes = [math.log(size) for size in fitted]
            errors = [math.log(max(its[name], TINY)) for its in fitted.values()]
            for pool in family:
                if pool in offered[name]:
                    error = math.exp(float(np.interp(math.log(pool.codewords), known_sizes, errors)))
                    found[name][offered[name][pool]] = error
    return found


def _members(
    graph: Graph,
    layers: Sequence[Layer],
    importance: Mapping[str, float],
    samples: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    **wishes: Any,
) -> dict[str, Member]:
    members: dict[str, Member] = {}
    settings = {**wishes, "held_out_fraction": 0.0, "rows_per_input": ROWS_PER_INPUT, "seed": seed}
    with Calibration(graph, layers, samples, **settings) as calibration:
        for stage in calibration.stages() if layers else ():
            for layer in stage:
                statistics = calibration.statistics(layer)
                moments = np.eye(layer.length)[None] if statistics is None else covariance(statistics)
                members[layer.name] = Member(layer.matrix(), moments, importance[layer.name])
    return members
