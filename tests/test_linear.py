"""The linear algebra against a slow convolution written from its definition, over every geometry that hypothesis finds.

An error is max|d| over the largest output of the same operators on absolute values: what rounding is relative to.
"""

import math
from collections import Counter
from dataclasses import fields, replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxcompress.linear import (
    Affine,
    ConvOp,
    ConvTransposeOp,
    Exactness,
    add_identity,
    add_parallel,
    average_pool_as_conv,
    batchnorm_affine,
    bias_map,
    border_class,
    compose,
    compose_affine,
    compose_concat,
    compose_transpose,
    concat_channels,
    conv_as_matrix,
    fold_global_average_pool,
    scale_input,
    scale_output,
    scale_transpose_output,
    shift_input_bias,
    why_not_compose_concat,
    why_not_compose_transpose,
    why_not_concat,
    why_not_identity,
    why_not_parallel,
    why_not_pointwise,
)

MAX_EXAMPLES = 80
MAX_EXAMPLES_SLOW = 4000
EXACT = 5e-15  # measured 5.1e-16
WRONG = 1e-6  # the least measured is 8e-4

normal = settings(max_examples=MAX_EXAMPLES, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------------------------------------------- the definition


def reference(op, x):
    """y[n, o, p] window by window over data with its padding written out; x is (N, I, *spatial)."""
    rank = len(op.strides)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(op.pads_begin, op.pads_end, strict=True)])
    spans = [d * (k - 1) + 1 for d, k in zip(op.dilations, op.weight.shape[2:], strict=True)]
    out = [(size - span) // s + 1 for size, span, s in zip(padded.shape[2:], spans, op.strides, strict=True)]
    rows, columns = op.weight.shape[0] // op.group, op.weight.shape[1]
    y = np.zeros((len(x), op.weight.shape[0], *out))
    for place in np.ndindex(*out):
        cut = [slice(p * s, p * s + n, d) for p, s, n, d in zip(place, op.strides, spans, op.dilations, strict=True)]
        for group in range(op.group):
            window = padded[(slice(None), slice(group * columns, (group + 1) * columns), *cut)]
            for row in range(group * rows, (group + 1) * rows):
                y[(slice(None), row, *place)] = (window * op.weight[row]).sum(axis=tuple(range(1, rank + 2)))
    return y if op.bias is None else y + op.bias.reshape(-1, *[1] * rank)


def reference_transpose(op, x, strides, dilations):
    """ConvTranspose without pads: every input value scatters the kernel; x is (N, I, *spatial)."""
    kernel = op.weight.shape[2:]
    out = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(strides, x.shape[2:], dilations, kernel, strict=True)]
    per_in, per_out = op.weight.shape[0] // op.group, op.weight.shape[1]
    y = np.zeros((len(x), per_out * op.group, *out))
    for channel, column in product(range(op.weight.shape[0]), range(per_out)):
        target = channel // per_in * per_out + column
        for place, taps in product(np.ndindex(*x.shape[2:]), np.ndindex(*kernel)):
            hit = [p * s + u * d for p, s, u, d in zip(place, strides, taps, dilations, strict=True)]
            y[(slice(None), target, *hit)] += x[(slice(None), channel, *place)] * op.weight[(channel, column, *taps)]
    return y if op.bias is None else y + op.bias.reshape(-1, *[1] * len(kernel))


def magnitude(*ops, x):
    """Largest output of the chain on absolute values."""
    for op in ops:
        x = reference(replace(op, weight=abs(op.weight), bias=None if op.bias is None else abs(op.bias)), abs(x))
    return x.max()


def error(actual, expected, scale):
    assert actual.shape == expected.shape
    worst = float(np.abs(actual - expected).max())
    return worst / scale if scale else math.inf if worst else 0.0  # only padding was read, and there is no bias


def test_reference_on_paper():
    x = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    op = ConvOp(np.array([[[1.0, 10.0]]]), np.array([0.5]), (2,), (2,), (1,), (1,))
    assert reference(op, x).tolist() == [[[20.5, 42.5]]]  # 0 1 2 3 4 0: 0*1+2*10, 2*1+4*10
    up = ConvTransposeOp(np.array([[[1.0, 10.0]]]), None)
    assert reference_transpose(up, x[:, :, :2], (2,), (1,)).tolist() == [[[1, 10, 2, 20]]]


# ------------------------------------------------------------------------------------------------------------- cases


def conv(rng, channels, kernel, *, strides=1, dilations=1, pads=0, pads_end=None, group=1, bias=True, dtype=np.float64):
    """A random ConvOp; channels is (O, I), an integer stands for every axis."""
    every = lambda value: tuple(value) if isinstance(value, tuple | list) else (value,) * len(kernel)  # noqa: E731
    weight = rng.standard_normal((channels[0], channels[1] // group, *kernel)).astype(dtype)
    return ConvOp(
        weight,
        rng.standard_normal(channels[0]).astype(dtype) if bias else None,
        every(strides),
        every(dilations),
        every(pads),
        every(pads if pads_end is None else pads_end),
        group,
    )


@st.composite
def axes(draw, largest):
    """(k, s, d, pad begin, pad end) along one axis: often one tap, often padded by its reach."""
    k = draw(st.sampled_from([1, 1, *range(2, largest + 1)]))
    s, d = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2, 3]))
    pads = st.one_of(st.sampled_from([0, d * (k - 1)]), st.integers(0, 3))
    return k, s, d, draw(pads), draw(pads)


@st.composite
def convs(draw, channels=None, group=None, rank=None, largest=3, bias=None):
    """Any convolution; ``channels`` is (O, I) as multiples of the group."""
    rank = draw(st.integers(1, 3)) if rank is None else rank
    group = draw(st.integers(1, 4)) if group is None else group
    out, ins = channels or (group * draw(st.integers(1, 2)), group * draw(st.integers(1, 2)))
    k, s, d, begin, end = zip(*(draw(axes(largest if rank == 1 else 3)) for _ in range(rank)), strict=True)
    rng = np.random.default_rng(draw(seeds))
    bias = draw(st.booleans()) if bias is None else bias
    return conv(rng, (out, ins), k, strides=s, dilations=d, pads=begin, pads_end=end, group=group, bias=bias)


def fits(ops, sizes):
    try:
        for op in ops:
            sizes = op.output_size(sizes)
    except ValueError:
        return False
    return True


@st.composite
def inputs(draw, *ops, most=5):
    """Data (1, I, *spatial) for the chain, from the smallest size that fits."""
    sizes = []
    for axis in range(ops[0].spatial_rank):
        line = [axis_of(op, axis) for op in ops]
        least = next(n for n in range(1, 200) if fits(line, (n,)))
        sizes.append(least + draw(st.integers(0, most if ops[0].spatial_rank < 3 else 2)))
    return np.random.default_rng(draw(seeds)).standard_normal((1, ops[0].in_channels, *sizes))


def axis_of(op, axis):
    """The geometry of one axis, one channel."""
    geometry = {name: getattr(op, name)[axis : axis + 1] for name in ("strides", "dilations", "pads_begin", "pads_end")}
    return ConvOp(np.ones((1, 1, op.kernel[axis])), None, **geometry)


@st.composite
def chains(draw, largest=3, **options):
    """Two convolutions in a row, and data for them."""
    group1, group2 = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    middle = math.lcm(group1, group2) * draw(st.integers(1, 2))
    first = draw(convs((middle, group1 * draw(st.integers(1, 2))), group1, largest=largest, **options))
    second = draw(convs((group2 * draw(st.integers(1, 2)), middle), group2, first.spatial_rank, largest))
    return first, second, draw(inputs(first, second))


# ------------------------------------------------------------------------------------------------ two in a row


def check_chain(first, second, x):
    """The merged pair is exactly as good as its class says: no worse, and no better."""
    spatial = x.shape[2:]
    exactness = border_class(first, second, spatial)
    merged = compose(first, second)
    expected, scale = reference(second, reference(first, x)), magnitude(first, second, x=x)
    assert merged.output_size(spatial) == expected.shape[2:]
    naive = error(reference(merged, x), expected, scale)
    if exactness in (Exactness.EXACT, Exactness.EXACT_WITHOUT_BIAS):
        assert naive < EXACT
    else:
        assert naive > WRONG
    if exactness is Exactness.APPROXIMATE:
        with pytest.raises(ValueError, match="no bias can repair it"):
            bias_map(first, second, spatial)
    else:
        field = bias_map(first, second, spatial)
        assert field.shape == (1, *expected.shape[1:])
        assert error(reference(replace(merged, bias=None), x) + field, expected, scale) < EXACT
    return exactness


@normal
@given(chains())
def test_compose_is_as_exact_as_its_class(case):
    check_chain(*case)


@pytest.mark.slow
def test_compose_is_as_exact_as_its_class_at_length():
    seen = Counter()

    @settings(max_examples=MAX_EXAMPLES_SLOW, deadline=None, derandomize=True)
    @given(chains(largest=5))
    def check(case):
        seen[check_chain(*case)] += 1

    check()
    assert all(seen[exactness] >= 100 for exactness in Exactness), seen


def pair(first, second, size, *, bias=True, channels=(2, 3, 2), groups=(1, 1)):
    """Named cases: each side is (kernel, options)."""
    rng = np.random.default_rng(7)
    out, middle, ins = channels
    one = conv(rng, (middle, ins), first[0], **first[1], bias=bias, group=groups[0])
    two = conv(rng, (out, middle), second[0], **second[1], group=groups[1])
    return one, two, rng.standard_normal((1, ins, *size))


NAMED = {
    "3x3p1-1x1": (Exactness.EXACT, pair(((3, 3), {"pads": 1}), ((1, 1), {}), (5, 5))),
    "3x3p1-3x3": (Exactness.EXACT, pair(((3, 3), {"pads": 1}), ((3, 3), {}), (5, 5))),
    "3x3s2p1-3x3d2": (Exactness.EXACT, pair(((3, 3), {"strides": 2, "pads": 1}), ((3, 3), {"dilations": 2}), (10, 9))),
    "end pad that no window reaches": (
        Exactness.EXACT,  # 6 -> windows at 0, 2, 4 of 6 + 1
        pair(((3,), {"pads": 1}), ((2,), {"strides": 2, "pads": 0, "pads_end": 1}), (6,)),
    ),
    "1x1-3x3p1, no bias": (Exactness.EXACT_WITHOUT_BIAS, pair(((1, 1), {}), ((3, 3), {"pads": 1}), (5, 4), bias=False)),
    "1x1-dw3x3p1": (
        Exactness.EXACT_WITH_BIAS_MAP,
        pair(((1, 1), {}), ((3, 3), {"pads": 1}), (5, 4), channels=(4, 4, 2), groups=(1, 4)),
    ),
    "full padding": (Exactness.EXACT_WITH_BIAS_MAP, pair(((3, 3), {"pads": 2}), ((3, 3), {"pads": 1}), (4, 4))),
    "full padding, one axis short of it": (
        Exactness.APPROXIMATE,
        pair(((3, 3), {"pads": (2, 1)}), ((3, 3), {"pads": 1}), (4, 4)),
    ),
    "padding read along the other axis only": (
        Exactness.EXACT_WITH_BIAS_MAP,  # 3x1 then 1x3: the axis that the second pads is one tap wide in the first
        pair(((3, 1), {"pads": (1, 0)}), ((1, 3), {"pads": (0, 1)}), (4, 5)),
    ),
    "1-D full padding": (Exactness.EXACT_WITH_BIAS_MAP, pair(((2,), {"pads": 1}), ((3,), {"pads": 1}), (5,))),
    "every middle position blind": (
        # size 1, taps at -2 and 2 around it: the first gives its bias everywhere, along both axes
        Exactness.EXACT_WITH_BIAS_MAP,
        pair(((2, 3), {"dilations": (4, 1), "pads": (2, 1)}), ((1, 3), {"pads": 1}), (1, 5)),
    ),
    "3x3p1-3x3p1": (Exactness.APPROXIMATE, pair(((3, 3), {"pads": 1}), ((3, 3), {"pads": 1}), (5, 5))),
    "3x3x3p1-3x3x3p1": (Exactness.APPROXIMATE, pair(((3, 3, 3), {"pads": 1}), ((3, 3, 3), {"pads": 1}), (3, 3, 3))),
}


@pytest.mark.parametrize(("expected", "case"), NAMED.values(), ids=NAMED)
def test_border_class_of_named_pairs(expected, case):
    assert check_chain(*case) is expected


def test_zero_bias_is_no_bias():
    first, second, x = NAMED["1x1-dw3x3p1"][1]
    assert check_chain(replace(first, bias=np.zeros(4)), second, x) is Exactness.EXACT_WITHOUT_BIAS


@normal
@given(chains(rank=1), st.booleans())
def test_unknown_size_is_the_worst_of_all_sizes(case, bias):
    first, second, _ = case
    first = replace(first, bias=np.ones(first.out_channels) if bias else None)
    worst = max(border_class(first, second, (n,)) for n in range(1, 90) if fits((first, second), (n,)))
    assert border_class(first, second, (None,)) is border_class(first, second, None) is worst


@normal
@given(chains(rank=2))
def test_one_unknown_axis(case):
    first, second, x = case
    size = x.shape[2]
    line = axis_of(first, 1), axis_of(second, 1)
    worst = max(border_class(first, second, (size, n)) for n in range(1, 90) if fits(line, (n,)))
    assert border_class(first, second, (size, None)) is worst


def class_by_enumeration(first, second, size):
    """The predicate along one axis, position by position."""
    middle, out = first.output_size((size,))[0], second.output_size(first.output_size((size,)))[0]
    (k1,), (k2,), (s1,), (s2,), (d1,), (d2,) = (
        first.kernel,
        second.kernel,
        *(getattr(op, name) for name in ("strides", "dilations") for op in (first, second)),
    )
    reads = {p * s2 + v * d2 - second.pads_begin[0] for p in range(out) for v in range(k2)}
    sees = {t for t in reads if any(0 <= t * s1 + u * d1 - first.pads_begin[0] < size for u in range(k1))}
    padded = {t for t in reads if not 0 <= t < middle}
    if not padded:
        return Exactness.EXACT
    return Exactness.APPROXIMATE if padded & sees else Exactness.EXACT_WITHOUT_BIAS


@pytest.mark.parametrize("strides", [(1, 1), (2, 3), (3, 2), (3, 3), (4, 3), (5, 4)])
@pytest.mark.parametrize("taps", [(2, 1), (3, 4)])
@pytest.mark.parametrize("pads", [(0, 0, 0, 1), (1, 2, 0, 1), (4, 0, 2, 0), (0, 4, 0, 2), (4, 4, 1, 7)])
def test_every_remainder_of_the_size_counts(strides, taps, pads):
    rng = np.random.default_rng(0)
    first = conv(rng, (1, 1), (3,), strides=strides[0], dilations=2, pads=pads[0], pads_end=pads[1], bias=False)
    second = conv(rng, (1, 1), taps[:1], strides=strides[1], dilations=taps[1], pads=pads[2], pads_end=pads[3])
    sizes = [n for n in range(1, 160) if fits((first, second), (n,))]
    classes = [class_by_enumeration(first, second, n) for n in sizes]
    assert [border_class(first, second, (n,)) for n in sizes] == classes
    assert border_class(first, second, None) is max(classes)


def test_classes_are_numbered_from_best_to_worst():
    assert [(exactness.name, exactness.value) for exactness in Exactness] == [
        ("EXACT", 1),
        ("EXACT_WITHOUT_BIAS", 2),
        ("EXACT_WITH_BIAS_MAP", 3),
        ("APPROXIMATE", 4),
    ]


def test_pads_of_one_side_only_need_no_size():
    rng = np.random.default_rng(0)
    first = conv(rng, (3, 2), (3, 3), pads=1)
    assert border_class(first, conv(rng, (2, 3), (3, 3)), None) is Exactness.EXACT
    assert border_class(first, conv(rng, (2, 3), (3, 3), pads=0, pads_end=(0, 1)), None) is Exactness.APPROXIMATE
    # One axis known: there the end pad is not reached; along the other nothing is padded.
    second = conv(rng, (2, 3), (2, 1), strides=2, pads=0, pads_end=(1, 0))
    assert border_class(first, second, (6, None)) is Exactness.EXACT
    assert border_class(first, second, (7, None)) is Exactness.APPROXIMATE


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (997, Exactness.EXACT_WITH_BIAS_MAP),  # middle 499, position 499 is read, and starts at 997 of the input
        (998, Exactness.APPROXIMATE),  # the same, and 997 is data
        (999, Exactness.EXACT),  # middle 500, position 500 is not read
        (1000, Exactness.EXACT),
    ],
)
def test_large_sizes_differ_by_their_remainder(size, expected):
    rng = np.random.default_rng(0)
    first = conv(rng, (1, 1), (3,), strides=2, pads=1)
    second = conv(rng, (1, 1), (2,), strides=2, pads=0, pads_end=1)
    assert check_chain(first, second, rng.standard_normal((1, 1, size))) is expected


@normal
@given(chains())
def test_merged_group_is_the_largest_that_the_blocks_allow(case):
    first, second, _ = case

    def blocks(op):
        return np.kron(np.eye(op.group), np.ones((op.out_channels // op.group, op.in_channels // op.group))) > 0

    reaches = blocks(second).astype(int) @ blocks(first).astype(int) > 0  # (O, I)
    outs, ins = reaches.shape
    possible = [
        g
        for g in range(1, math.gcd(outs, ins) + 1)
        if math.gcd(outs, ins) % g == 0
        and all(o * g // outs == i * g // ins for o, i in zip(*reaches.nonzero(), strict=True))
    ]
    assert compose(first, second).group == max(possible)


@pytest.mark.parametrize(("groups", "channels", "group"), [((4, 8), (8, 8, 4), 4), ((4, 1), (3, 4, 4), 1)])
def test_depthwise_stays_depthwise(groups, channels, group):
    first, second, x = pair(((3,), {}), ((2,), {}), (6,), groups=groups, channels=channels)
    assert compose(first, second).group == group
    check_chain(first, second, x)


def test_group_is_structure_not_zeros():
    zeros = ConvOp(np.eye(4)[:, :, None], None, (1,), (1,), (0,), (0,))
    assert compose(zeros, zeros).group == 1


def test_lattice_of_the_merged_kernel():
    rng = np.random.default_rng(0)
    dilated = compose(conv(rng, (1, 1), (3,), dilations=2, pads=1), conv(rng, (1, 1), (2,), dilations=3, strides=2))
    assert (dilated.kernel, dilated.dilations) == ((8,), (1,))  # offsets 0 2 4 + 0 3
    strided = compose(conv(rng, (1, 1), (1,), strides=2, dilations=5), conv(rng, (1, 1), (3,), pads=1))
    assert (strided.kernel, strided.dilations, strided.strides, strided.pads) == ((3,), (2,), (2,), (2, 2))
    point = compose(conv(rng, (1, 1), (1,), dilations=4), conv(rng, (1, 1), (1,), dilations=6, strides=3))
    assert (point.kernel, point.dilations, point.strides) == ((1,), (1,), (3,))


def test_bias_map_along_an_axis_of_unknown_size():
    first, second, _ = pair(((1, 1), {}), ((3, 3), {"pads": (1, 0)}), (5, 4))
    narrow = bias_map(first, second, (5, None))
    assert narrow.shape == (1, 2, 5, 1)
    np.testing.assert_array_equal(np.broadcast_to(narrow, (1, 2, 5, 2)), bias_map(first, second, (5, 4)))
    with pytest.raises(ValueError, match="axis 0 is padded"):
        bias_map(first, second, (None, 4))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda rng: conv(rng, (2, 4), (3, 3)), "gives 3 channels, the second takes 4"),
        (lambda rng: conv(rng, (2, 3), (3,)), "2 and 1 spatial axes"),
        (lambda rng: conv(rng, (2, 3), (3, 3), dtype=np.float32), "one dtype is needed"),
    ],
)
def test_convolutions_that_do_not_follow_one_another(other, message):
    rng = np.random.default_rng(0)
    first = conv(rng, (3, 2), (3, 3))
    for function in (compose, lambda a, b: border_class(a, b, None), lambda a, b: bias_map(a, b, (9, 9))):
        with pytest.raises(ValueError, match=message):
            function(first, other(rng))


def test_sizes_must_fit():
    first, second, _ = NAMED["3x3p1-3x3"][1]
    with pytest.raises(ValueError, match="axis 1: size 2, 2 padded, is less than 3"):
        border_class(first, second, (5, 2))
    with pytest.raises(ValueError, match="2 sizes are needed"):
        border_class(first, second, (5,))


# ----------------------------------------------------------------------------------------------------- side by side


@st.composite
def twins(draw, aligned):
    """Two convolutions of one input with the same strides; ``aligned``: with the same output grid for every size."""
    rank, groups = draw(st.integers(1, 3)), (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    channels = [math.lcm(*groups) * draw(st.integers(1, 2)) for _ in range(2)]
    ops = [draw(convs(tuple(channels), group, rank, 5)) for group in groups]
    ops[1] = replace(ops[1], strides=ops[0].strides)
    if aligned:
        surplus = [draw(st.integers(-min(r), 3)) for r in zip(ops[0].reach, ops[1].reach, strict=True)]
        for index, op in enumerate(ops):
            total = [n + r for n, r in zip(surplus, op.reach, strict=True)]
            begin = tuple(draw(st.integers(0, n)) for n in total)
            end = tuple(n - b for n, b in zip(total, begin, strict=True))
            ops[index] = replace(op, pads_begin=begin, pads_end=end)
    return ops[0], ops[1], draw(inputs(*sorted(ops, key=lambda op: op.reach)[-1:], most=6))


@normal
@given(twins(aligned=True))
def test_sum_of_two(case):
    a, b, x = case
    assume(fits([a], x.shape[2:]) and fits([b], x.shape[2:]))
    assert why_not_parallel(a, b) is None
    total = add_parallel(a, b)
    assert total.group == math.gcd(a.group, b.group)
    scale = magnitude(a, x=x) + magnitude(b, x=x)
    assert error(reference(total, x), reference(a, x) + reference(b, x), scale) < EXACT


@normal
@given(twins(aligned=False))
def test_sum_of_two_at_one_size(case):
    a, b, x = case
    assume(fits([a], x.shape[2:]) and fits([b], x.shape[2:]))
    left, right = reference(a, x), reference(b, x)
    reason = why_not_parallel(a, b, x.shape[2:])
    assert (reason is None) == (left.shape == right.shape), reason
    if reason is None:
        total = add_parallel(a, b, x.shape[2:])
        assert error(reference(total, x), left + right, magnitude(a, x=x) + magnitude(b, x=x)) < EXACT
    else:
        with pytest.raises(ValueError, match="outputs of"):
            add_parallel(a, b, x.shape[2:])


@normal
@given(twins(aligned=False))
def test_unknown_size_needs_one_grid_for_all(case):
    a, b, _ = case
    for axis in range(a.spatial_rank):
        one, two = axis_of(a, axis), axis_of(b, axis)
        sizes = [n for n in range(1, 60) if fits([one], (n,)) and fits([two], (n,))]
        agree = all(one.output_size((n,)) == two.output_size((n,)) for n in sizes)
        assert (why_not_parallel(one, two) is None) == agree


@pytest.mark.parametrize(
    ("a", "b", "kernel", "dilations", "pads"),
    [
        (((3, 3), {"strides": 2, "pads": 1}), ((1, 1), {"strides": 2}), (3, 3), (1, 1), (1, 1, 1, 1)),
        (((1, 3), {"pads": (0, 1)}), ((3, 1), {"pads": (1, 0)}), (3, 3), (1, 1), (1, 1, 1, 1)),
        (((5, 5), {"pads": 2}), ((3, 3), {"pads": 1}), (5, 5), (1, 1), (2, 2, 2, 2)),
        (((3, 3), {"pads": 2, "dilations": 2}), ((1, 1), {"dilations": 7}), (3, 3), (2, 2), (2, 2, 2, 2)),
        (((3,), {"pads": 4, "dilations": 4}), ((3,), {"pads": 6, "dilations": 6}), (7,), (2,), (6, 6)),
        (((3,), {"pads": 3, "dilations": 3}), ((3,), {"pads": 2, "dilations": 2}), (7,), (1,), (3, 3)),
        (((2,), {"pads": 0, "pads_end": 1}), ((2,), {"pads": 1, "pads_end": 0}), (3,), (1,), (1, 1)),
    ],
)
def test_sum_of_named_pairs(a, b, kernel, dilations, pads):
    rng = np.random.default_rng(3)
    one, two = (conv(rng, (3, 2), shape, **options) for shape, options in (a, b))
    total = add_parallel(one, two)
    assert (total.kernel, total.dilations, total.pads) == (kernel, dilations, pads)
    x = rng.standard_normal((1, 2, *(9, 8)[: len(kernel)]))
    scale = magnitude(one, x=x) + magnitude(two, x=x)
    assert error(reference(total, x), reference(one, x) + reference(two, x), scale) < EXACT


def test_resnet_d_shortcut_joins_the_strided_convolution():
    rng = np.random.default_rng(3)
    pool = average_pool_as_conv(4, (2, 2), (2, 2), (0, 0), (0, 0), np.float64)
    shortcut = compose(pool, conv(rng, (6, 4), (1, 1)))
    main = conv(rng, (6, 4), (3, 3), strides=2, pads=1)
    assert why_not_parallel(main, shortcut) is not None  # an odd size loses its last row in the pool alone
    assert "outputs of 4 and 3" in why_not_parallel(main, shortcut, (8, 7))
    total = add_parallel(main, shortcut, (8, 6))
    assert total.kernel == (3, 3)
    x = rng.standard_normal((2, 4, 8, 6))
    pooled = x.reshape(2, 4, 4, 2, 3, 2).mean((3, 5))
    expected = reference(main, x) + reference(conv(np.random.default_rng(3), (6, 4), (1, 1)), pooled)
    assert error(reference(total, x), expected, magnitude(main, x=x) + magnitude(shortcut, x=x)) < EXACT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (4, 2)}, "output channels differ: 3 and 4"),
        ({"channels": (3, 4)}, "input channels differ: 2 and 4"),
        ({"kernel": (1,), "pads": 0}, "2 and 1 spatial axes"),
        ({"dtype": np.float32}, "dtypes differ: float64 and float32"),
        ({"strides": 2}, "strides differ"),
        ({"pads_end": (1, 2)}, "axis 1: output sizes are not the same for every input size"),
        ({"kernel": (3, 5)}, "axis 1: output sizes"),
    ],
)
def test_sums_that_are_none(change, message):
    rng = np.random.default_rng(0)
    a = conv(rng, (3, 2), (3, 3), pads=1)
    options = {"channels": (3, 2), "kernel": (3, 3), "pads": 1}
    assert why_not_parallel(a, conv(rng, **options)) is None
    b = conv(rng, **(options | change))
    assert message in why_not_parallel(a, b)
    with pytest.raises(ValueError, match="cannot be added"):
        add_parallel(a, b)


@st.composite
def residuals(draw):
    """A convolution whose output lies on its input, whose own tap exists, and data."""
    group = draw(st.integers(1, 4))
    channels = group * draw(st.integers(1, 2))
    op = draw(convs((channels, channels), group, largest=5))
    begin = tuple(d * draw(st.integers(0, k - 1)) for k, d in zip(op.kernel, op.dilations, strict=True))
    end = tuple(r - b for r, b in zip(op.reach, begin, strict=True))
    op = replace(op, strides=(1,) * op.spatial_rank, pads_begin=begin, pads_end=end)
    return op, draw(inputs(op))


@normal
@given(residuals(), st.booleans(), seeds)
def test_skip_connection(case, scaled, seed):
    op, x = case
    scale = np.random.default_rng(seed).standard_normal(op.out_channels) if scaled else None
    assert why_not_identity(op) is None
    total = add_identity(op, scale)
    assert (total.kernel, total.dilations, total.group, total.pads) == (
        op.kernel,
        tuple(d if k > 1 else 1 for d, k in zip(op.dilations, op.kernel, strict=True)),
        op.group,
        op.pads,
    )
    factors = np.ones(op.out_channels) if scale is None else scale
    expected = reference(op, x) + factors.reshape(-1, *[1] * op.spatial_rank) * x
    assert error(reference(total, x), expected, magnitude(op, x=x) + abs(x).max()) < EXACT


def test_skip_on_an_axis_of_size_one_does_not_mind_the_stride():
    rng = np.random.default_rng(0)
    op = conv(rng, (2, 2), (3, 3), strides=(2, 1), pads=1)
    assert why_not_identity(op, (1, 5)) is None
    assert why_not_identity(op, (2, 5)) == why_not_identity(op) == "spatial axis 0: stride 2"
    assert "axis 0: the output does not have the size" in why_not_identity(replace(op, pads_end=(3, 1)), (1, 5))
    before = conv(rng, (2, 2), (1, 3), strides=(2, 1), pads=(1, 1), pads_end=(0, 1))  # reads -1, where no data is
    assert "axis 0: no tap reads its own position" in why_not_identity(before, (1, 5))
    x = rng.standard_normal((1, 2, 1, 5))
    expected = reference(op, x) + x
    assert error(reference(add_identity(op, spatial=(1, 5)), x), expected, magnitude(op, x=x)) < EXACT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (4, 2)}, "2 input and 4 output channels"),
        ({"strides": (1, 2)}, "axis 1: stride 2"),
        ({"pads": 0}, "axis 0: the output does not have the size of the input"),
        ({"pads_end": (1, 2)}, "axis 1: the output does not have the size of the input"),
        ({"kernel": (2, 2), "dilations": 2, "pads": 1}, "axis 0: no tap reads its own position"),
        ({"kernel": (3, 2), "dilations": (1, 2)}, "axis 1: no tap reads its own position"),
    ],
)
def test_skips_that_stay(change, message):
    rng = np.random.default_rng(0)
    options = {"channels": (2, 2), "kernel": (3, 3), "pads": 1}
    assert why_not_identity(conv(rng, **options)) is None
    op = conv(rng, **(options | change))
    assert message in why_not_identity(op)
    with pytest.raises(ValueError, match="skip connection"):
        add_identity(op)


@normal
@given(convs(group=2, channels=(2, 4)), st.data())
def test_concatenation_of_outputs(op, data):
    rng = np.random.default_rng(data.draw(seeds))
    group = data.draw(st.sampled_from([1, 2]))
    other = replace(
        op, weight=rng.standard_normal((6, 4 // group, *op.kernel)), bias=rng.standard_normal(6), group=group
    )
    x = data.draw(inputs(op))
    for ops in ([op], [op, other], [other, op, op]):
        assert why_not_concat(ops) is None
        expected = np.concatenate([reference(part, x) for part in ops], axis=1)
        assert error(reference(concat_channels(ops), x), expected, magnitude(other, x=x)) < EXACT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (3, 4)}, "input channels differ"),
        ({"dtype": np.float32}, "dtypes differ"),
        ({"kernel": (3, 1)}, "kernel, strides, dilations or pads differ"),
        ({"strides": 2}, "kernel, strides, dilations or pads differ"),
        ({"dilations": 2}, "kernel, strides, dilations or pads differ"),
        ({"pads_end": 2}, "kernel, strides, dilations or pads differ"),
    ],
)
def test_concatenations_that_stay(change, message):
    rng = np.random.default_rng(0)
    options = {"channels": (3, 2), "kernel": (3, 3), "pads": 1}
    ops = [conv(rng, **options), conv(rng, **(options | {"channels": (5, 2)}))]
    assert concat_channels(ops).out_channels == 8
    ops[1] = conv(rng, **(options | change))
    assert message in why_not_concat(ops)
    with pytest.raises(ValueError, match="side by side"):
        concat_channels(ops)
    assert why_not_concat([]) == "there is no convolution"


@normal
@given(twins(aligned=True), st.data())
def test_convolution_on_a_concatenation(case, data):
    a, b, x = case
    assume(fits([a], x.shape[2:]) and fits([b], x.shape[2:]))
    rng = np.random.default_rng(data.draw(seeds))
    channels = 2 * a.out_channels
    kernel = [data.draw(st.integers(1, 2)) for _ in range(a.spatial_rank)]
    group = data.draw(st.sampled_from([1, 2]))
    second = conv(
        rng, (2, channels), kernel, strides=data.draw(st.integers(1, 2)), group=group, bias=data.draw(st.booleans())
    )
    middle = np.concatenate([reference(a, x), reference(b, x)], axis=1)
    assume(fits([second], middle.shape[2:]))
    assert why_not_compose_concat([a, b], second) is None
    merged = compose_concat([a, b], second)
    scale = magnitude(second, x=np.full_like(middle, max(magnitude(a, x=x), magnitude(b, x=x))))
    assert error(reference(merged, x), reference(second, middle), scale) < EXACT


def test_inception_block_is_one_convolution():
    rng = np.random.default_rng(5)
    firsts = [
        conv(rng, (2, 4), (1, 1), dtype=np.float32, bias=False),
        conv(rng, (3, 4), (3, 3), pads=1, dtype=np.float32, bias=False),
        conv(rng, (4, 4), (1, 5), pads=(0, 2), group=2, dtype=np.float32, bias=False),
    ]
    second = conv(rng, (6, 9), (1, 1), dtype=np.float32, bias=False)
    merged = compose_concat(firsts, second)
    assert (merged.kernel, merged.bias, merged.weight.dtype) == ((3, 5), None, np.float32)
    exact = compose_concat([op.astype(np.float64) for op in firsts], second.astype(np.float64))
    np.testing.assert_array_equal(merged.weight, exact.weight.astype(np.float32))  # rounded once, not per branch


@pytest.mark.parametrize(
    ("change", "second", "message"),
    [
        ({"channels": (5, 2)}, {}, "the branches give 8 channels, the convolution takes 7"),
        ({"strides": 2}, {}, "branches 0 and 1: strides differ"),
        ({"pads": 0}, {}, "branches 0 and 1: spatial axis 0"),
        ({}, {"dtype": np.float32}, "branch 0: dtype"),
        ({}, {"kernel": (3, 3), "pads": 1}, "branch 0: the convolution reads its padding"),
    ],
)
def test_branches_that_stay(change, second, message):
    rng = np.random.default_rng(0)
    options = {"channels": (4, 2), "kernel": (3, 3), "pads": 1}
    then = {"channels": (2, 7), "kernel": (1, 1)}
    firsts = [conv(rng, (3, 2), (3, 3), pads=1), conv(rng, **options)]
    assert why_not_compose_concat(firsts, conv(rng, **then)) is None
    firsts[1], last = conv(rng, **(options | change)), conv(rng, **(then | second))
    assert message in why_not_compose_concat(firsts, last)
    with pytest.raises(ValueError, match="cannot be merged"):
        compose_concat(firsts, last)
    assert "no convolution before" in why_not_compose_concat([], last)


# ------------------------------------------------------------------------------------------------ scales and shifts


@normal
@given(convs(), st.data())
def test_scale_and_shift_of_the_output(op, data):
    rng = np.random.default_rng(data.draw(seeds))
    x = data.draw(inputs(op))
    scale, shift = rng.standard_normal((2, op.out_channels))
    every = [-1, *[1] * op.spatial_rank]
    expected = scale.reshape(every) * reference(op, x)
    most = magnitude(op, x=x) * abs(scale).max() + abs(shift).max()
    assert error(reference(scale_output(op, scale), x), expected, most) < EXACT
    moved = reference(scale_output(op, scale, shift), x)
    assert error(moved, expected + shift.reshape(every), most) < EXACT
    assert (scale_output(op, scale).bias is None) == (op.bias is None)


@normal
@given(convs(), st.data())
def test_scale_and_shift_of_the_input(op, data):
    rng = np.random.default_rng(data.draw(seeds))
    x = data.draw(inputs(op))
    scale, shift = rng.standard_normal((2, op.in_channels))
    every = [-1, *[1] * op.spatial_rank]
    moved = scale.reshape(every) * x + shift.reshape(every)
    expected, most = reference(op, moved), magnitude(op, x=abs(scale.reshape(every) * x) + abs(shift.reshape(every)))
    assert error(reference(scale_input(op, scale), x), reference(op, scale.reshape(every) * x), most) < EXACT

    bias = shift_input_bias(op, shift, x.shape[2:])
    bare = replace(scale_input(op, scale), bias=None)
    full = bias if bias.ndim > 1 else bias.reshape(1, *every)
    assert error(reference(bare, x) + full, expected, most) < EXACT
    # A map is given only where the bias of the interior would not do.
    if bias.ndim > 1:
        assert bias.shape == (1, *expected.shape[1:])
        interior = shift_input_bias(unpadded(op), shift, None)
        assert error(reference(bare, x) + interior.reshape(every), expected, most) > WRONG
        with pytest.raises(ValueError, match="is padded, so the bias depends on its size"):
            shift_input_bias(op, shift, None)
    elif not any(op.pads):
        np.testing.assert_array_equal(shift_input_bias(op, shift, None), bias)


def unpadded(op):
    zeros = (0,) * op.spatial_rank
    return replace(op, pads_begin=zeros, pads_end=zeros)


def test_shift_by_zero_needs_no_size():
    rng = np.random.default_rng(0)
    op = conv(rng, (3, 2), (3, 3), pads=1)
    np.testing.assert_array_equal(shift_input_bias(op, np.zeros(2), None), op.bias)
    np.testing.assert_array_equal(shift_input_bias(replace(op, bias=None), np.zeros(2), None), np.zeros(3))


def test_scales_of_a_wrong_length():
    op = conv(np.random.default_rng(0), (3, 2), (3, 3))
    for function in (scale_output, scale_input, lambda op, s: shift_input_bias(op, s, None)):
        with pytest.raises(ValueError, match="broadcast"):
            function(op, np.ones(4))
    np.testing.assert_array_equal(scale_input(op, 2.0).weight, 2 * op.weight)


def test_batchnorm_affine():
    rng = np.random.default_rng(0)
    scale, bias, mean = rng.standard_normal((3, 4)).astype(np.float32)
    var = np.array([0.0, 1e-3, 1.0, 50.0], np.float32)  # 0: a channel that died in training
    s, t = batchnorm_affine(scale, bias, mean, var, 1e-5)
    assert s.dtype == t.dtype == np.float64
    x = rng.standard_normal((5, 4))
    expected = (x - mean) / np.sqrt(var.astype(np.float64) + 1e-5) * scale + bias
    assert error(x * s + t, expected, np.abs(expected).max()) < EXACT
    with pytest.raises(ValueError, match=r"channel 2: var \+ epsilon is -0\.5"):
        batchnorm_affine(scale, bias, mean, np.array([1.0, 1.0, -0.5, -0.5]), 0.0)
    with pytest.raises(ValueError, match=r"channel 1: var \+ epsilon is 0,"):
        batchnorm_affine(scale, bias, mean, np.array([1.0, 0.0, 1.0, 1.0]), 0.0)


@normal
@given(convs(group=1, channels=(1, 1), bias=False), st.data())
def test_average_pool(op, data):
    channels = data.draw(st.integers(1, 3))
    pool = average_pool_as_conv(channels, op.kernel, op.strides, op.pads_begin, op.pads_end, np.float64, op.dilations)
    x = np.repeat(data.draw(inputs(op)), channels, axis=1) * np.arange(1, channels + 1).reshape(
        -1, *[1] * op.spatial_rank
    )
    padded = np.pad(x, [(0, 0), (0, 0), *zip(op.pads_begin, op.pads_end, strict=True)])
    expected = np.zeros((1, channels, *pool.output_size(x.shape[2:])))
    for place in np.ndindex(*expected.shape[2:]):
        starts = [p * s for p, s in zip(place, op.strides, strict=True)]
        window = [slice(n, n + r + 1, d) for n, r, d in zip(starts, op.reach, op.dilations, strict=True)]
        expected[(..., *place)] = padded[(..., *window)].mean(axis=tuple(range(2, x.ndim)))
    assert error(reference(pool, x), expected, abs(x).max()) < EXACT
    assert pool.group == channels


# ----------------------------------------------------------------------------------------------------- as matrices


@normal
@given(convs(), st.data())
def test_convolution_as_a_matrix(op, data):
    x = data.draw(inputs(op, most=3))
    matrix, bias = conv_as_matrix(op, x.shape[2:])
    expected = reference(op, x).reshape(1, -1)
    assert error(x.reshape(1, -1) @ matrix + bias, expected, magnitude(op, x=x)) < EXACT
    assert matrix.dtype == bias.dtype == op.weight.dtype


def affine(rng, ins, outs, *, bias=True, dtype=np.float64):
    return Affine(
        rng.standard_normal((ins, outs)).astype(dtype), rng.standard_normal(outs).astype(dtype) if bias else None
    )


def apply(op, x):
    return x @ op.matrix + (0 if op.bias is None else op.bias)


@pytest.mark.parametrize("biases", list(product([True, False], repeat=2)))
def test_affine_algebra(biases):
    rng = np.random.default_rng(1)
    first, second = affine(rng, 4, 6, bias=biases[0]), affine(rng, 6, 3, bias=biases[1])
    x = rng.standard_normal((5, 4))
    both = compose_affine(first, second)
    assert (both.bias is None) == (not any(biases))
    y = apply(second, apply(first, x))
    assert error(apply(both, x), y, abs(y).max()) < EXACT

    square, shift, scale = affine(rng, 4, 4, bias=biases[0]), rng.standard_normal(4), rng.standard_normal(4)
    y = apply(square, x)
    assert error(apply(square.add_identity(), x), y + x, abs(y).max()) < EXACT
    assert error(apply(square.add_identity(scale), x), y + scale * x, abs(y).max()) < EXACT
    assert error(apply(square.scale_output(scale, shift), x), scale * y + shift, abs(y).max()) < EXACT
    assert error(apply(square.scale_output(scale), x), scale * y, abs(y).max()) < EXACT
    moved = apply(square, scale * x + shift)
    assert error(apply(square.scale_input(scale, shift), x), moved, abs(moved).max()) < EXACT
    assert error(apply(square.scale_input(scale), x), apply(square, scale * x), abs(moved).max()) < EXACT


def test_affine_refusals():
    rng = np.random.default_rng(1)
    with pytest.raises(ValueError, match="cannot come before"):
        compose_affine(affine(rng, 4, 5), affine(rng, 4, 5))
    with pytest.raises(ValueError, match="cannot come before"):
        compose_affine(affine(rng, 4, 5), affine(rng, 5, 4, dtype=np.float32))
    with pytest.raises(ValueError, match="square"):
        affine(rng, 4, 5).add_identity()
    with pytest.raises(ValueError, match="are needed"):
        Affine(np.ones((2, 3)), np.ones(2))
    with pytest.raises(TypeError, match="int64"):
        Affine(np.ones((2, 3), np.int64))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolution_passes_a_global_average(group, bias):
    rng = np.random.default_rng(2)
    op, gemm = conv(rng, (6, 4), (1, 1), group=group, bias=bias), affine(rng, 6, 3)
    x = rng.standard_normal((2, 4, 5, 3))
    expected = apply(gemm, reference(op, x).mean((2, 3)))
    folded = fold_global_average_pool(op, gemm)
    assert folded.matrix.shape == (4, 3)
    assert error(apply(folded, x.mean((2, 3))), expected, abs(expected).max()) < EXACT


@pytest.mark.parametrize(
    "change",
    [{"kernel": (1, 2)}, {"strides": (1, 2)}, {"pads": 0, "pads_end": (0, 1)}, {"pads": (1, 0), "pads_end": 0}],
)
def test_what_does_not_pass_a_global_average(change):
    rng = np.random.default_rng(2)
    options = {"channels": (3, 2), "kernel": (1, 1)}
    assert why_not_pointwise(conv(rng, **options)) is None
    op = conv(rng, **(options | change))
    assert why_not_pointwise(op) is not None
    with pytest.raises(ValueError, match="global average"):
        fold_global_average_pool(op, affine(rng, 3, 3))
    # It would be wrong: the means of the output are not the matrix of the means of the input.
    x = rng.standard_normal((1, 2, 4, 5))
    guess = x.mean((2, 3)) @ op.weight.sum((2, 3)).T + op.bias
    assert error(guess, reference(op, x).mean((2, 3)), magnitude(op, x=x)) > WRONG


# -------------------------------------------------------------------------------------------------- ConvTranspose


@st.composite
def upsamplers(draw):
    group, rank = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    group2 = draw(st.integers(1, 4))
    middle = math.lcm(group, group2) * draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(seeds))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    weight = rng.standard_normal((group * draw(st.integers(1, 2)), middle // group, *kernel))
    first = ConvTransposeOp(weight, rng.standard_normal(middle) if draw(st.booleans()) else None, group)
    out = group2 * draw(st.integers(1, 2))
    second = conv(rng, (out, middle), (1,) * rank, group=group2, bias=draw(st.booleans()))
    steps = [[draw(st.integers(1, 3)) for _ in range(rank)] for _ in range(2)]
    return first, second, rng.standard_normal((1, first.in_channels, *[2, 3][:rank])), *steps


@normal
@given(upsamplers(), seeds)
def test_transpose_folds(case, seed):
    first, second, x, strides, dilations = case
    rank = x.ndim - 2
    up = reference_transpose(first, x, strides, dilations)
    most = magnitude(
        second, x=abs(reference_transpose(replace(first, weight=abs(first.weight)), abs(x), strides, dilations))
    )
    merged = compose_transpose(first, second)
    assert merged.group == math.gcd(first.group, second.group)
    expected = reference(second, up)
    assert error(reference_transpose(merged, x, strides, dilations), expected, max(most, abs(expected).max())) < EXACT

    scale, shift = np.random.default_rng(seed).standard_normal((2, first.out_channels, *[1] * rank))
    scaled = scale_transpose_output(first, scale.ravel(), shift.ravel())
    expected = scale * up + shift
    assert error(reference_transpose(scaled, x, strides, dilations), expected, abs(expected).max()) < EXACT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (2, 5)}, "gives 4 channels, the second takes 5"),
        ({"kernel": (1,)}, "dtype or number of spatial axes"),
        ({"dtype": np.float32}, "dtype or number of spatial axes"),
        ({"kernel": (3, 3)}, "the kernel is \\(3, 3\\)"),
        ({"pads": 1}, "does not have the positions"),
        ({"strides": 2}, "does not have the positions"),
    ],
)
def test_transposes_that_stay(change, message):
    rng = np.random.default_rng(0)
    first = ConvTransposeOp(rng.standard_normal((3, 4, 2, 2)), None)
    options = {"channels": (2, 4), "kernel": (1, 1)}
    assert why_not_compose_transpose(first, conv(rng, **options)) is None
    with pytest.raises(ValueError, match=message):
        compose_transpose(first, conv(rng, **(options | change)))


def test_transpose_shapes():
    with pytest.raises(ValueError, match="with group 2"):
        ConvTransposeOp(np.ones((3, 4, 2)), None, 2)
    with pytest.raises(ValueError, match="\\(8,\\) is needed"):
        ConvTransposeOp(np.ones((4, 4, 2)), np.ones(4), 2)
    with pytest.raises(TypeError, match="int8"):
        ConvTransposeOp(np.ones((4, 4, 2), np.int8), None)


# ------------------------------------------------------------------------------------------------------------ ConvOp


@normal
@given(convs(), st.data())
def test_regroup_keeps_the_convolution(op, data):
    x = data.draw(inputs(op))
    for group in range(1, 6):
        assert op.can_regroup(group) == (op.group % group == 0)
        if op.can_regroup(group):
            coarse = op.regroup(group)
            assert (coarse.group, coarse.in_channels) == (group, op.in_channels)
            assert error(reference(coarse, x), reference(op, x), magnitude(op, x=x)) < EXACT
        else:
            with pytest.raises(ValueError, match="does not divide"):
                op.regroup(group)
    assert op.dense_weight().shape == (op.out_channels, op.in_channels, *op.kernel)


@normal
@given(convs(), st.data())
def test_sizes_and_counts(op, data):
    x = data.draw(inputs(op))
    y = reference(op, x)
    assert op.output_size(x.shape[2:]) == y.shape[2:]
    taps = sum(np.count_nonzero(row) for row in op.weight)
    assert op.macs(y.shape[2:]) == taps * math.prod(y.shape[2:])
    assert op.param_count == taps + (0 if op.bias is None else len(op.bias))


def test_counts_on_paper():
    op = conv(np.random.default_rng(0), (8, 4), (3, 3), strides=2, pads=1, group=2)
    assert op.output_size((7, 8)) == (4, 4)
    assert op.macs((4, 4)) == 8 * 2 * 9 * 16
    assert op.param_count == 8 * 2 * 9 + 8
    assert op.pads == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="2 known sizes are needed"):
        op.output_size((7,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pads_begin": (-1, 0)}, "pads_begin is \\(-1, 0\\)"),
        ({"pads_end": (0, -1)}, "pads_end is"),
        ({"strides": (0, 1)}, "strides is"),
        ({"dilations": (1,)}, "2 integers of at least 1"),
        ({"group": 2}, "group 2 does not divide the 3 output channels"),
        ({"bias": np.ones(2)}, "bias has shape"),
        ({"weight": np.ones((3, 2))}, "weight has shape"),
        ({"weight": np.ones((3, 2, 0, 3))}, "without zeros"),
    ],
)
def test_malformed_convolutions(change, message):
    with pytest.raises(ValueError, match=message):
        replace(conv(np.random.default_rng(0), (3, 2), (3, 3)), **change)


def test_weights_are_floating_point():
    with pytest.raises(TypeError, match="int8"):
        ConvOp(np.ones((1, 1, 1), np.int8), None, (1,), (1,), (0,), (0,))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_results_are_rounded_once(dtype):
    rng = np.random.default_rng(4)
    first, second = conv(rng, (6, 4), (3,), group=2, dtype=dtype), conv(rng, (3, 6), (3,), group=3, dtype=dtype)
    square, scale, shift = conv(rng, (4, 4), (3,), pads=1, dtype=dtype), *rng.standard_normal((2, 4))
    wide = {op: op.astype(np.float64) for op in (first, second, square)}
    for narrow, exact in [
        (compose(first, second), compose(wide[first], wide[second])),
        (add_identity(square, scale), add_identity(wide[square], scale)),
        (add_parallel(square, square), add_parallel(wide[square], wide[square])),
        (scale_output(square, scale, shift), scale_output(wide[square], scale, shift)),
        (scale_input(square, scale), scale_input(wide[square], scale)),
    ]:
        assert narrow.weight.dtype == narrow.bias.dtype == dtype
        np.testing.assert_array_equal(narrow.weight, exact.weight.astype(dtype))
        np.testing.assert_array_equal(narrow.bias, exact.bias.astype(dtype))
    field = bias_map(replace(first, weight=first.weight[..., :1]), replace(second, pads_end=(1,)), (7,))
    assert (field.dtype, field.shape) == (dtype, (1, 3, 6))


def test_float16_does_not_overflow_silently():
    op = conv(np.random.default_rng(0), (1, 1), (1,), dtype=np.float16)
    with pytest.raises(OverflowError, match="does not fit float16"):
        scale_output(op, 1e9)
    infinite = replace(op, weight=np.full((1, 1, 1), np.inf, np.float16))
    assert np.isinf(scale_output(infinite, 2.0).weight).all()


@normal
@given(chains(rank=1))
def test_operands_are_left_alone(case):
    first, second, x = case
    before = [
        np.copy(getattr(op, f.name)) for op in (first, second) for f in fields(op) if getattr(op, f.name) is not None
    ]
    compose(first, second)
    add_parallel(first, first)
    concat_channels([second, second])
    scale_output(first, 2.0, 1.0)
    scale_input(second, 3.0)
    shift_input_bias(first, np.ones(first.in_channels), x.shape[2:])
    conv_as_matrix(first, x.shape[2:])
    after = [getattr(op, f.name) for op in (first, second) for f in fields(op) if getattr(op, f.name) is not None]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
