"""Chains and sums of chains as one convolution and a map, against the operators one after the other, in float64."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxcompress.linear import ConvOp, Exactness
from onnxcompress.linear.chain import ChainGeometry, Plan, plan_sum

STEPS = st.integers(1, 2)


def convolve(conv, x):
    """A convolution by its definition, (N, I, *size) -> (N, O, *out), float64."""
    pads = [(0, 0), (0, 0), *zip(conv.pads_begin, conv.pads_end, strict=True)]
    padded, out = np.pad(x, pads), conv.output_size(x.shape[2:])
    weight, result = conv.dense_weight().astype(np.float64), np.zeros((len(x), conv.out_channels, *out))
    for taps in product(*map(range, conv.kernel)):
        window = tuple(
            slice(d * u, d * u + s * (n - 1) + 1, s)
            for d, u, s, n in zip(conv.dilations, taps, conv.strides, out, strict=True)
        )
        result += np.einsum("oi,ni...->no...", weight[(..., *taps)], padded[(slice(None), slice(None), *window)])
    bias = np.zeros(conv.out_channels) if conv.bias is None else conv.bias
    return result + bias.reshape(-1, *[1] * conv.spatial_rank)


@st.composite
def convs(draw, inside, outside, axes, *, kernel=3, pads=2, bias=True):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    group = draw(st.sampled_from([g for g in (1, 2, 3) if inside % g == 0 and outside % g == 0]))
    shape = (outside, inside // group, *(draw(st.integers(1, kernel)) for _ in range(axes)))
    values = rng.normal(size=outside) if bias and draw(st.booleans()) else None
    steps = [tuple(draw(STEPS) for _ in range(axes)) for _ in range(2)]
    edges = [tuple(draw(st.integers(0, pads)) for _ in range(axes)) for _ in range(2)]
    return ConvOp(rng.normal(size=shape), values, *steps, *edges, group)


@st.composite
def chains(draw, axes, inside, outside):
    channels = [inside, *(draw(st.sampled_from([1, 2, 3, 6])) for _ in range(draw(st.integers(0, 2)))), outside]
    return [draw(convs(a, b, axes)) for a, b in pairwise(channels)]


def run(ops, x):
    for op in ops:
        assume(all(n + b + e > r for n, b, e, r in zip(x.shape[2:], op.pads_begin, op.pads_end, op.reach, strict=True)))
        x = convolve(op, x)
    return x


def error(plan: Plan, expected, x):
    merged = plan.merge()
    assert merged.conv.weight.shape == plan.conv.weight.shape
    assert (merged.conv.bias is None) == (plan.conv.bias is None)
    actual = convolve(merged.conv, x)
    if merged.bias_map is not None:
        assert merged.bias_map.full.shape == plan.map_shape
        assert merged.bias_map.values.shape == plan.kinds_shape
        actual = actual + merged.bias_map.full
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-3)


@given(st.data(), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_a_plan_is_exact_or_is_refused(data, axes, seed):
    ops = data.draw(chains(axes, 6, 6))
    sizes = [data.draw(st.integers(1, 7)) for _ in range(axes)]
    x = np.random.default_rng(seed).normal(size=(1, 6, *sizes))
    expected = run(ops, x)
    known = [data.draw(st.booleans()) for _ in range(axes)]
    plan = plan_sum([ops], [n if k else None for n, k in zip(sizes, known, strict=True)])
    if isinstance(plan, Plan):
        assert error(plan, expected, x) < 5e-14  # measured 5.2e-15 over 1,900 chains


@given(st.data(), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_a_sum_is_exact_or_is_refused(data, axes, seed):
    parts = [data.draw(chains(axes, 3, 2)) for _ in range(data.draw(st.integers(2, 3)))]
    sizes = [data.draw(st.integers(1, 6)) for _ in range(axes)]
    x = np.random.default_rng(seed).normal(size=(1, 3, *sizes))
    made = [run(ops, x) for ops in parts]
    plan = plan_sum(parts, sizes)
    if isinstance(plan, Plan):
        assert len({part.shape for part in made}) == 1
        assert error(plan, sum(made), x) < 5e-14  # measured 2.1e-15 over 560 sums


def conv(*shape, bias=False, **geometry):
    axes, rng = len(shape) - 2, np.random.default_rng(sum(shape))
    ones, zeros = (1,) * axes, (0,) * axes
    values = {"strides": ones, "dilations": ones, "pads_begin": zeros, "pads_end": zeros, **geometry}
    return ConvOp(rng.normal(size=shape), rng.normal(size=shape[0]) if bias else None, **values)


def test_classes():
    point, padded = conv(4, 2, 1, 1), conv(3, 4, 3, 3, pads_begin=(1, 1), pads_end=(1, 1))
    assert plan_sum([[padded, conv(2, 3, 1, 1)]], [None, None]).exactness is Exactness.EXACT
    assert plan_sum([[point, padded]], [None, None]).exactness is Exactness.EXACT_WITHOUT_BIAS
    biased = conv(4, 2, 1, 1, bias=True)
    assert plan_sum([[biased, padded]], [5, 6]).exactness is Exactness.EXACT_WITH_BIAS_MAP
    assert plan_sum([[biased, padded]], [5, 6]).map_shape == (1, 3, 5, 6)
    assert "dynamic" in plan_sum([[biased, padded]], [5, None])
    assert "class 4" in plan_sum([[padded, conv(4, 3, 3, 3, pads_begin=(1, 1), pads_end=(1, 1))]], [5, 6])


def test_a_bias_of_zeros_is_none():
    zero = ConvOp(np.ones((4, 2, 1)), np.zeros(4), (1,), (1,), (0,), (0,))
    plan = plan_sum([[zero, conv(3, 4, 3, pads_begin=(1,), pads_end=(1,))]], [None])
    assert not plan.has_map
    assert plan.conv.bias is None


def test_the_order_in_which_a_chain_is_put_together_does_not_matter():
    # The second reads padding where the first sees data, for its last output, which the strided third does not take.
    ends = {"pads_end": (1,)}
    ops = [conv(2, 2, 3, **ends), conv(2, 2, 2, **ends), conv(2, 2, 1, strides=(3,))]
    assert "class 4" in plan_sum([ops[:2]], [6])
    assert plan_sum([ops], [6]).exactness is Exactness.EXACT


def test_channels_and_dtypes_must_fit():
    assert "dtypes differ" in plan_sum([[conv(3, 2, 1), conv(2, 3, 1).astype(np.float32)]], [4])
    assert "output channels differ: 3, 4" in plan_sum([[conv(3, 2, 1)], [conv(4, 2, 1)]], [4])
    assert "input channels differ: 2, 3" in plan_sum([[conv(3, 2, 1)], [conv(3, 3, 1)]], [4])
    assert "4 channels come before an operator that takes 3" in plan_sum([[conv(4, 2, 1), conv(2, 3, 1)]], [4])
    assert "is less than" in plan_sum([[conv(4, 2, 5), conv(2, 4, 1)]], [4])


def test_segments_of_a_chain():
    ops = [conv(4, 2, 1, bias=True), conv(4, 4, 3, pads_begin=(1,), pads_end=(1,)), conv(2, 4, 1)]
    geometry = ChainGeometry(ops, [7])
    assert [size for (size,) in geometry.sizes] == [7, 7, 7, 7]
    assert geometry.plan(1, 3).exactness is Exactness.EXACT
    assert geometry.plan(0, 3).map_shape == (1, 2, 7)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_value_too_large_for_the_dtype(dtype):
    big = ConvOp(np.full((2, 2, 1), 300, dtype), None, (1,), (1,), (0,), (0,))
    plan = plan_sum([[big, big]], [4])
    if dtype is np.float16:
        with pytest.raises(OverflowError, match="does not fit float16"):
            plan.merge()
    else:
        assert plan.merge().conv.weight.max() == 180000
