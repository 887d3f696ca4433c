"""The byte budget: kept, used, and no allocation of the same size does less damage."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.codebook.allocation import (
    Offer,
    allocate,
    convex_hull,
    least_size_for_damage,
    pareto,
    smallest_size,
    totals,
)

OFFERS = st.builds(Offer, st.integers(0, 40), st.floats(0, 10, allow_subnormal=False))
LAYERS = st.lists(st.lists(OFFERS, min_size=1, max_size=5), min_size=1, max_size=5)


def brute_force(layers, budget):
    fits = [
        totals(layers, chosen).damage
        for chosen in itertools.product(*(range(len(offers)) for offers in layers))
        if totals(layers, chosen).size_bytes <= budget
    ]
    return min(fits)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.integers(0, 120))
def test_within_budget_and_as_good_as_any(layers, extra):
    budget = smallest_size(layers) + extra
    found = totals(layers, allocate(layers, budget))
    assert found.size_bytes <= budget
    # sums of the same numbers in another order differ by 1e-15 at most
    assert found.damage <= brute_force(layers, budget) * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.lists(st.integers(0, 150), min_size=2, max_size=6))
def test_more_bytes_never_do_more_damage(layers, extras):
    least = smallest_size(layers)
    damages = [totals(layers, allocate(layers, least + extra)).damage for extra in sorted(extras)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(damages))


@settings(max_examples=60, deadline=None)
@given(st.lists(OFFERS, min_size=1, max_size=8))
def test_frontiers(offers):
    front = pareto(offers)
    for index, offer in enumerate(offers):
        assert any(offers[i].size_bytes <= offer.size_bytes and offers[i].damage <= offer.damage for i in front), (
            f"{index} is beaten by none"
        )
    sizes = [offers[i].size_bytes for i in front]
    assert sizes == sorted(set(sizes))
    hull = convex_hull(offers)
    assert hull[0] == front[0] and hull[-1] == front[-1] and set(hull) <= set(front)
    for i in front:  # nothing lies below the hull
        line = np.interp(offers[i].size_bytes, [offers[j].size_bytes for j in hull], [offers[j].damage for j in hull])
        assert offers[i].damage >= line - 1e-9


def test_the_lagrangian_alone_would_miss_it():
    """No hull step but the first fits: the best use of the rest lies above the hull."""
    layers = [[Offer(0, 10.0), Offer(10, 1.0), Offer(6, 6.0)], [Offer(0, 10.0), Offer(9, 2.0), Offer(4, 7.0)]]
    assert allocate(layers, 9) == [0, 1]
    assert allocate(layers, 10) == [1, 0]  # damage 11; 6 + 4 bytes would leave 13
    assert allocate(layers, 14) == [1, 2]
    assert allocate(layers, 18) == [1, 2]
    assert allocate(layers, 19) == [1, 1]


def test_too_small_a_budget_names_what_is_needed():
    with pytest.raises(ValueError, match="at least 7"):
        allocate([[Offer(3, 1.0)], [Offer(4, 0.0), Offer(5, 0.0)]], 6)


def test_a_network_of_100_layers_is_solved_near_its_bound():
    """At a corner of the hull the bound is met: no search over all combinations would find better."""
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(100):
        weights, scale = int(rng.integers(1000, 100_000)), rng.exponential()
        bits = np.array([0.4, 0.5, 0.7, 0.9, 1, 1.4, 2, 2.7, 4, 8, 32])
        noise = rng.uniform(0.9, 1.1, len(bits))
        layers.append(
            [Offer(int(weights * b / 8), float(scale * n * 4.0**-b)) for b, n in zip(bits, noise, strict=True)]
        )
    whole = smallest_size(layers), sum(max(offer.size_bytes for offer in offers) for offers in layers)
    previous = None
    for limit in (10.0, 3.0, 1.0, 0.1):
        met = totals(layers, least_size_for_damage(layers, limit))
        assert met.damage <= limit and whole[0] <= met.size_bytes < whole[1]
        best = totals(layers, allocate(layers, met.size_bytes))
        assert best.damage == pytest.approx(met.damage, rel=1e-9)  # a corner of the hull: nothing is better
        assert previous is None or met.size_bytes > previous
        previous = met.size_bytes


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.floats(0, 30))
def test_a_limit_of_damage_is_met_where_it_can_be(layers, limit):
    found = totals(layers, least_size_for_damage(layers, limit))
    least = sum(min(offer.damage for offer in offers) for offers in layers)
    assert found.damage <= max(limit, least) * (1 + 1e-12)
