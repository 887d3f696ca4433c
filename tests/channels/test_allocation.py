"""Rankings by weights, step sizes, and what goes from which group within a budget."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.channels.allocation import BudgetError, Limits, allocate
from onnxcompress.channels.groups import Channels, Group, MacsModel, find_channels
from onnxcompress.channels.ranking import Ranking, given, magnitudes
from onnxcompress.channels.removing import remove_and_zero
from onnxcompress.cost import count
from onnxcompress.testing import graph_of, model

RNG = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


SCALES = np.linspace(2, 0.1, 32).astype(np.float32)
CHAIN = "a = Conv(x, w1) n = BatchNormalization(a, s, b, m, v) r = Relu(n) c = Conv(r, w2) d = Relu(c) y = Conv(d, w3)"


def chain(*, second_norm: bool = False):
    text = (
        CHAIN.replace("d = Relu(c)", "e = BatchNormalization(c, s2, b2, m2, v2) d = Relu(e)") if second_norm else CHAIN
    )
    more = {"s2": SCALES[:16], "b2": normal(16), "m2": normal(16), "v2": np.ones(16, np.float32)} if second_norm else {}
    weights = {"w1": normal(32, 3, 3, 3), "w2": normal(16, 32, 3, 3), "w3": normal(4, 16, 1, 1)}
    norm = {"s": SCALES, "b": normal(32), "m": normal(32), "v": np.ones(32, np.float32)}
    return model(f"g (float[1,3,12,12] x) => (float[1,?,?,?] y) {{ {text} }}", **weights, **norm, **more)


def channels_of(proto) -> Channels:
    return find_channels(graph_of(proto))


def test_scales_rank_where_all_groups_have_them():
    found = magnitudes(channels_of(chain(second_norm=True)))
    assert found["a"].order.tolist() == list(range(31, -1, -1))
    assert found["a"].costs[0] == pytest.approx(0.1) and found["c"].costs[-1] == pytest.approx(2)


def test_weights_rank_relative_to_their_layer_where_scales_are_missing():
    proto = chain()
    found = magnitudes(channels_of(proto))
    norms = np.abs(np.asarray(graph_of(proto).nodes[3].inputs[1].values)).sum(axis=(1, 2, 3))
    assert found["c"].order.tolist() == np.argsort(norms).tolist()
    assert found["c"].costs.mean() == pytest.approx(1) and found["a"].costs.mean() == pytest.approx(1)


@pytest.mark.parametrize(
    ("size", "width", "round_to", "counts"),
    [
        (64, 1, 8, [64, 56, 48, 40, 32, 24, 16, 8]),
        (36, 1, 8, [36, 32, 24, 16, 8]),
        (16, 1, 8, [16, 12, 8, 4]),  # 8 would leave one step
        (12, 1, 8, [12, 10, 8, 6, 4, 2]),
        (3, 1, 8, [3, 2, 1]),
        (6, 64, 8, [6, 5, 4, 3, 2, 1]),  # heads
        (64, 4, 8, [64, *range(62, 6, -2)]),  # two places of four heads are 8 elements
        (21, 1, 1, list(range(21, 2, -1))),
    ],
)
def test_steps(size, width, round_to, counts):
    group = Group("g", tuple(range(size)), width, (), ())
    assert Limits(round_to, 0.1).counts(group) == counts


def test_a_budget_is_kept_with_the_macs_of_the_real_graph():
    proto = chain()
    channels = channels_of(proto)
    before = count(graph_of(proto)).macs
    for share in (0.9, 0.7, 0.5, 0.3):
        found = allocate(channels, magnitudes(channels), share * before, Limits(8, 0.1))
        pruned, _ = remove_and_zero(proto, found.removed)
        assert count(graph_of(pruned)).macs == found.macs <= share * before
        assert (32 - len(found.removed.get("a", []))) % 8 == 0 and (16 - len(found.removed.get("c", []))) % 4 == 0


def test_what_is_cheap_for_its_macs_goes_first():
    channels = channels_of(chain())
    costs = {"a": np.full(32, 1.0), "c": np.full(16, 0.01)}
    macs = count(channels.graph).macs
    assert set(allocate(channels, given(channels, costs), 0.8 * macs).removed) == {"c"}


def test_a_step_that_was_not_needed_comes_back():
    channels = channels_of(chain())
    macs = count(channels.graph).macs
    ranked = {"a": np.full(32, 1.0), "c": np.full(16, 1.0)}
    found = allocate(channels, given(channels, ranked), 0.6 * macs)
    for name in found.removed:  # no group has a step to spare
        size, unit = (32, 8) if name == "a" else (16, 4)
        fewer = {**found.removed, name: found.removed[name][: len(found.removed[name]) - unit]}
        pruned, _ = remove_and_zero(chain(), fewer)
        assert count(graph_of(pruned)).macs > 0.6 * macs and size


def test_what_cannot_be_reached_names_the_nearest():
    channels = channels_of(chain())
    with pytest.raises(BudgetError, match=r"is the least of .* lower --min-keep") as caught:
        allocate(channels, magnitudes(channels), 1.0)
    assert caught.value.exit_code == 1


def test_an_infinite_cost_stays():
    channels = channels_of(chain())
    ranking = Ranking(np.arange(32), np.array([0.0] * 8 + [np.inf] * 24))
    found = allocate(channels, {"a": ranking}, 0.8 * count(channels.graph).macs)
    assert found.removed == {"a": list(range(8))}
    with pytest.raises(BudgetError):
        allocate(channels, {"a": ranking}, 0.5 * count(channels.graph).macs)


def test_importance_from_outside_fits_the_groups():
    channels = channels_of(chain())
    with pytest.raises(ValueError, match="31 numbers for 32 channels"):
        given(channels, {"a": np.ones(31)})
    with pytest.raises(ValueError, match="'z'"):
        given(channels, {"z": np.ones(4)})


def test_the_products_of_a_resize_go_with_its_channels():
    text = """g (float[1,3,12,12] x) => (float[1,?,?,?] y) {
        a = Conv(x, w1)
        r = Resize<mode="linear">(a, , scales)
        y = Conv(r, w2)
    }"""
    weights = {"w1": normal(16, 3, 3, 3), "w2": normal(4, 16, 3, 3), "scales": np.array([1, 1, 2, 2], np.float32)}
    proto = model(text, **weights)
    removed = {"a": [0, 5, 7, 9]}
    found = MacsModel(channels_of(proto))
    pruned, _ = remove_and_zero(proto, removed)
    assert found.macs(removed) == count(graph_of(pruned)).macs
    by_node = found.macs_by_node(removed)
    assert len(by_node) == 3 and sum(by_node.values()) == found.macs(removed)
