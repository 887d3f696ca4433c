"""The dynamic program over cut points against all partitions."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from onnxcompress.merging.partition import SegmentPrice, fastest_partition


def every_partition(length, longest):
    for count in range(length):
        for cuts in combinations(range(1, length), count):
            edges = [0, *cuts, length]
            segments = list(pairwise(edges))
            if all(stop - start <= longest for start, stop in segments):
                yield segments


@pytest.mark.parametrize("seed", range(60))
def test_it_finds_what_trying_all_finds(seed):
    rng = np.random.default_rng(seed)
    length, longest = int(rng.integers(1, 9)), int(rng.integers(2, 6))
    prices = {}
    for start in range(length):
        for stop in range(start + 1, length + 1):
            single = stop - start == 1
            known = single or rng.random() < 0.6
            growth = 0 if single else int(rng.integers(-20, 30))
            prices[start, stop] = SegmentPrice(float(rng.integers(1, 40)), growth) if known else None
    allowed = [
        (sum(prices[s].latency_ms for s in segments), segments)
        for segments in every_partition(length, longest)
        if all(prices[s] is not None for s in segments) and sum(prices[s].growth_bytes for s in segments) <= 5
    ]
    best = fastest_partition(length, lambda a, b: prices[a, b], growth_bytes=5, longest=longest)
    assert best.latency_ms == min(latency for latency, _ in allowed)
    assert best.growth_bytes <= 5
    assert list(best.merged) in [[s for s in segments if s[1] - s[0] > 1] for _, segments in allowed]


def test_one_segment_may_grow_by_what_another_saves():
    prices = {(0, 2): SegmentPrice(1.0, 30), (2, 4): SegmentPrice(1.0, -40)}

    def price(start, stop):
        return SegmentPrice(2.0, 0) if stop - start == 1 else prices.get((start, stop))

    assert fastest_partition(4, price, growth_bytes=0, longest=4).merged == ((0, 2), (2, 4))
    prices[2, 4] = SegmentPrice(1.0, -10)
    assert fastest_partition(4, price, growth_bytes=0, longest=4).merged == ((2, 4),)


def test_a_long_chain_is_cut_at_the_longest_segment():
    best = fastest_partition(20, lambda start, stop: SegmentPrice(1.0, 0), growth_bytes=0, longest=8)
    assert best.latency_ms == 3.0
    assert max(stop - start for start, stop in best.merged) <= 8
