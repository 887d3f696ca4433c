"""One layer as codewords and indices: stored form, errors, guards, and what each stage is worth."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.codebook.codebook import Choice, QuantizedLayer, Skip, Statistics, size_bytes
from onnxcompress.codebook.layer import _sweep_and_refine, quantize_layer, rule_damping, why_no_sweep
from onnxcompress.codebook.objective import damped_objective
from onnxcompress.codebook.target import corrected_bias, float_target, relative_error
from onnxcompress.errors import QuantizationError

PLAIN = Choice(block=4, codewords=16)


def moments(rows, float_rows=None, missing=None):
    """Statistics of rows (groups, n, D), with those of the float net where they differ, and of c = s_f - s_q."""
    x = np.asarray(rows, np.float64)
    gram, mean = x.transpose(0, 2, 1) @ x, x.mean(axis=1)
    if float_rows is None:
        return Statistics(x.shape[1], gram, mean)
    f = np.asarray(float_rows, np.float64)
    skip = None
    if missing is not None:
        c = np.asarray(missing, np.float64)
        skip = Skip(x.transpose(0, 2, 1) @ c, f.transpose(0, 2, 1) @ c, c.mean(axis=1), float((c**2).sum()))
    cross, float_gram = x.transpose(0, 2, 1) @ f, f.transpose(0, 2, 1) @ f
    return Statistics(x.shape[1], gram, mean, cross, f.mean(axis=1), float_gram, skip)


def correlated(rng, rows, length, groups=1, decay=0.85):
    """Rows whose neighbours move together, with a mean, like the activations of a layer."""
    distance = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    factor = np.linalg.cholesky(decay**distance)
    return rng.standard_normal((groups, rows, length)) @ factor.T + 0.5


def layer(rng, outputs=32, length=48):
    """Weights of output channels that differ in size, as they do once BatchNormalization is folded."""
    sizes = np.exp(rng.standard_normal((outputs, 1)))
    weight = sizes * rng.standard_normal((outputs, length))
    return weight.astype(np.float32), rng.standard_normal(outputs).astype(np.float32)


CHOICES = [
    Choice(4, 16),
    Choice(4, 16, "int8", scaled=True),
    Choice(3, 32, scaled=True),
    Choice(2, 64, "int8"),
    Choice(1, 300),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("method", ["sweep", "em", "kmeans", "bgd"])
def test_stored_form(choice, method):
    rng = np.random.default_rng(0)
    weight, bias = layer(rng)
    statistics = moments(correlated(rng, 400, 48))
    result = quantize_layer(weight, bias, statistics, choice, seed=0, method=method, int8_tolerance=None)
    scaled = choice.scaled and method not in ("kmeans", "bgd")
    assert result.choice == dataclasses.replace(choice, scaled=scaled)
    assert result.codebook.shape == (choice.codewords, choice.block) and result.codebook.dtype == choice.codebook_type
    assert result.indices.shape == (32, 48 // choice.block) and result.indices.max() < choice.codewords
    assert result.indices.dtype == (np.uint8 if choice.codewords <= 256 else np.uint16)
    assert (result.codebook_scale is None) == (choice.codebook_type == "float16")
    assert (result.scales is None) == (not scaled) and result.bias.dtype == np.float32
    decoded = result.decode()
    assert decoded.dtype == np.float32 and np.array_equal(decoded, loop_decode(result))
    assert result.size_bytes() == size_bytes(weight.shape, result.choice, has_bias=True) == counted_bytes(result)
    assert result.error == relative_error(weight, bias, decoded, result.bias, statistics)


def loop_decode(result: QuantizedLayer):
    outputs, blocks = result.indices.shape
    block = result.choice.block
    weight = np.empty((outputs, blocks * block), np.float32)
    for o in range(outputs):
        for j in range(blocks):
            for e in range(block):
                value = np.float32(result.codebook[result.indices[o, j], e])
                if result.codebook_scale is not None:
                    value = value * result.codebook_scale[e]
                if result.scales is not None:
                    value = value * np.float32(result.scales[o])
                weight[o, j * block + e] = value
    return weight


def counted_bytes(result: QuantizedLayer):
    k = result.choice.codewords
    if k <= 16:
        packed = np.packbits(np.unpackbits(result.indices.reshape(-1, 1), axis=1)[:, 4:])
    else:
        packed = result.indices
    rest = [result.codebook, result.codebook_scale, result.scales, result.bias]
    return len(packed.tobytes()) + sum(len(a.tobytes()) for a in rest if a is not None)


@pytest.mark.parametrize("method", ["sweep", "kmeans", "bgd"])
def test_same_seed_same_result(method):
    rng = np.random.default_rng(1)
    weight, bias = layer(rng)
    statistics = moments(correlated(rng, 300, 48))
    first, again, other = (
        quantize_layer(weight, bias, statistics, PLAIN, seed=seed, method=method) for seed in (5, 5, 6)
    )
    for field in ("codebook", "indices", "bias"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert not np.array_equal(first.codebook, other.codebook)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["one net", "two nets", "skip"]), st.sampled_from([1, 2, 3]))
def test_error_from_moments_is_that_of_the_rows(seed, kind, groups):
    rng = np.random.default_rng(seed)
    x = correlated(rng, 40, 6, groups)
    f = x if kind == "one net" else x + 0.2 * rng.standard_normal(x.shape)
    missing = 0.1 * x[:, :, :4] + 0.3 * rng.standard_normal((groups, 40, 4)) + 0.2 if kind == "skip" else None
    weight, bias = rng.standard_normal((groups * 4, 6)), rng.standard_normal(groups * 4)
    stored, stored_bias = weight + 0.1 * rng.standard_normal(weight.shape), bias + 0.1
    y_f = np.concatenate([f[g] @ weight[4 * g : 4 * g + 4].T for g in range(groups)], axis=1) + bias
    y_q = np.concatenate([x[g] @ stored[4 * g : 4 * g + 4].T for g in range(groups)], axis=1) + stored_bias
    short = 0 if missing is None else np.concatenate(missing, axis=1)
    explicit = np.linalg.norm(y_f + short - y_q) / np.linalg.norm(y_f - y_f.mean(axis=0))
    statistics = moments(x, None if kind == "one net" else f, missing)
    assert relative_error(weight, bias, stored, stored_bias, statistics) == pytest.approx(explicit, rel=1e-9)


def test_corrected_bias_keeps_the_mean_output():
    rng = np.random.default_rng(2)
    f = correlated(rng, 200, 12, groups=2)
    x = f + 0.3 * rng.standard_normal(f.shape) + 0.1
    weight, bias = layer(rng, 8, 12)
    decoded = weight + 0.1 * rng.standard_normal(weight.shape)
    corrected = corrected_bias(weight, bias, decoded, moments(x, f))
    for g in range(2):
        part = slice(4 * g, 4 * g + 4)
        wanted = (f[g] @ weight[part].T + bias[part]).mean(axis=0)
        given_ = (x[g] @ decoded[part].T + corrected[part]).mean(axis=0)
        assert np.allclose(wanted, given_, rtol=0, atol=1e-6)  # measured 2e-7


@pytest.mark.parametrize("groups", [1, 2])
def test_float_target_makes_up_for_a_disturbed_input(groups):
    rng = np.random.default_rng(3)
    f = correlated(rng, 2000, 24, groups)
    x = 0.8 * f + 0.1 * rng.standard_normal(f.shape) + 0.3
    weight, bias = layer(rng, 8, 24)
    statistics = moments(x, f)

    def error(target):
        return relative_error(weight, bias, target, corrected_bias(weight, bias, target, statistics), statistics)

    aimed = float_target(weight, statistics, damping=1e-6)
    assert error(aimed) < 0.65 * error(weight)  # measured 0.54 and 0.53
    centred_x, centred_f = x - x.mean(axis=1, keepdims=True), f - f.mean(axis=1, keepdims=True)
    parts = np.split(weight, groups)
    solved = [np.linalg.lstsq(centred_x[g], centred_f[g] @ parts[g].T, rcond=None)[0].T for g in range(groups)]
    explicit = np.concatenate(solved)
    assert np.allclose(aimed, explicit, rtol=0, atol=1e-3 * np.abs(explicit).max())  # the ridge; measured 2e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_target_makes_up_for_what_the_other_path_lost(groups):
    rng = np.random.default_rng(5)
    f = correlated(rng, 2000, 24, groups)
    x = 0.9 * f + 0.05 * rng.standard_normal(f.shape)
    weight, bias = layer(rng, 8, 24)
    known = x @ rng.standard_normal((groups, 24, 8 // groups)) / 2
    statistics = moments(x, f, known + 0.1 * rng.standard_normal(known.shape) + 0.5)
    blind = dataclasses.replace(statistics, skip=None)

    def error(target):
        return relative_error(weight, bias, target, corrected_bias(weight, bias, target, statistics), statistics)

    aware, unaware = (float_target(weight, given_, damping=1e-6) for given_ in (statistics, blind))
    assert error(aware) < 0.5 * error(unaware)  # measured 0.26 and 0.37
    rows, wanted = x - x.mean(axis=1, keepdims=True), f @ weight.reshape(groups, -1, 24).transpose(0, 2, 1)
    assert statistics.skip is not None
    moment = rows.transpose(0, 2, 1) @ (wanted - wanted.mean(axis=1, keepdims=True))
    moment += statistics.skip.cross - 2000 * statistics.mean[:, :, None] * statistics.skip.mean[:, None, :]
    explicit = np.linalg.solve(rows.transpose(0, 2, 1) @ rows, moment).transpose(0, 2, 1).reshape(8, 24)
    assert np.allclose(aware, explicit, rtol=0, atol=1e-3 * np.abs(explicit).max())  # the ridge


def test_bias_makes_up_for_the_mean_that_the_other_path_lost():
    rng = np.random.default_rng(6)
    x = correlated(rng, 200, 12, groups=2)
    weight, bias = layer(rng, 8, 12)
    missing = rng.standard_normal((2, 200, 4)) + rng.standard_normal((2, 1, 4))
    corrected = corrected_bias(weight, bias, weight, moments(x, x, missing))
    assert np.allclose(corrected - bias, missing.mean(axis=1).reshape(-1), rtol=0, atol=2e-6)


def test_layer_makes_up_for_the_other_path():
    rng = np.random.default_rng(7)
    f = correlated(rng, 2000, 48)
    x = f + 0.05 * rng.standard_normal(f.shape)
    weight, bias = layer(rng)
    missing = x @ rng.standard_normal((1, 48, 32)) / 4
    statistics = moments(x, f, missing)
    aware = quantize_layer(weight, bias, statistics, Choice(2, 128), seed=0)
    blind = quantize_layer(weight, bias, dataclasses.replace(statistics, skip=None), Choice(2, 128), seed=0)
    unaware = relative_error(weight, bias, blind.decode(), blind.bias, statistics)
    assert aware.error == pytest.approx(relative_error(weight, bias, aware.decode(), aware.bias, statistics))
    assert aware.error < 0.6 * unaware  # measured 0.50


def test_sweep_makes_up_for_a_disturbed_input():
    rng = np.random.default_rng(4)
    f = correlated(rng, 2000, 48)
    x = 0.8 * f + 0.05 * rng.standard_normal(f.shape)
    weight, bias = layer(rng)
    choice = Choice(2, 128)
    aware = quantize_layer(weight, bias, moments(x, f), choice, seed=0)
    blind = quantize_layer(weight, bias, moments(x), choice, seed=0)
    unaware = relative_error(weight, bias, blind.decode(), blind.bias, moments(x, f))
    assert aware.error < 0.45 * unaware  # measured 0.26 to 0.35 over three seeds


def test_stages_are_worth_it_on_rows_not_seen():
    """Correlated inputs, channels of different sizes: each stage against the one before, on held-out rows."""
    rng = np.random.default_rng(5)
    weight, bias = layer(rng, 64, 72)
    fit, test = moments(correlated(rng, 4000, 72, decay=0.95)), moments(correlated(rng, 2000, 72, decay=0.95))
    choice, scaled = Choice(4, 64), Choice(4, 64, scaled=True)

    def error(choice, method):
        result = quantize_layer(weight, bias, fit, choice, seed=0, method=method)
        return relative_error(weight, bias, result.decode(), result.bias, test)

    kmeans, bgd, em, sweep = (error(choice, method) for method in ("kmeans", "bgd", "em", "sweep"))
    assert em < 0.6 * min(kmeans, bgd)  # measured 0.52
    assert sweep < 0.85 * em  # measured 0.76
    assert error(scaled, "sweep") < 0.85 * sweep  # measured 0.75


def test_distinct_vectors_that_fit_are_met_exactly():
    rng = np.random.default_rng(6)
    codewords = rng.standard_normal((16, 4)).astype(np.float16).astype(np.float32)
    weight = codewords[rng.integers(16, size=(32, 12))].reshape(32, 48)
    for statistics in (None, moments(correlated(rng, 500, 48))):
        result = quantize_layer(weight, None, statistics, PLAIN, seed=0)
        assert np.allclose(result.decode(), weight, rtol=2**-10, atol=2e-4)  # float16; measured 2^-11, 1e-4


@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize("scaled", [False, True])
def test_constant_layer_is_met_exactly(value, scaled):
    weight = np.full((32, 48), value, np.float32)
    statistics = moments(correlated(np.random.default_rng(7), 100, 48))
    result = quantize_layer(weight, None, statistics, dataclasses.replace(PLAIN, scaled=scaled), seed=0)
    assert np.array_equal(result.decode(), weight) and result.error == 0


def test_dead_inputs_zero_rows_and_singular_moments():
    rng = np.random.default_rng(8)
    weight, bias = layer(rng)
    weight[3] = 0
    rows = correlated(rng, 30, 48)  # fewer rows than inputs: singular
    rows[:, :, 10:20] = 0
    for choice in (PLAIN, Choice(4, 16, "int8", scaled=True)):
        result = quantize_layer(weight, bias, moments(rows), choice, seed=0)
        assert np.isfinite(result.decode()).all() and np.isfinite(result.bias).all() and result.error < 0.5
        if choice.scaled:
            assert not result.decode()[3].any()


def test_all_inputs_dead():
    weight, bias = layer(np.random.default_rng(9))
    result = quantize_layer(weight, bias, moments(np.zeros((1, 50, 48))), PLAIN, seed=0)
    assert np.isfinite(result.decode()).all() and np.array_equal(result.bias, bias) and result.error == 0


def test_without_data_it_fits_the_weight_and_keeps_the_bias():
    weight, bias = layer(np.random.default_rng(10))
    plain = quantize_layer(weight, bias, None, PLAIN, seed=0)
    scaled = quantize_layer(weight, bias, None, dataclasses.replace(PLAIN, scaled=True), seed=0)
    assert plain.method == "em" and np.array_equal(plain.bias, bias) and plain.held_out_error is None
    lost = np.linalg.norm(weight - plain.decode()) / np.linalg.norm(weight)
    assert plain.error == pytest.approx(lost, rel=1e-6)
    assert scaled.error < plain.error
    assert quantize_layer(weight, None, None, PLAIN, seed=0).bias is None


def test_groups_share_the_codebook_and_have_their_own_metric():
    rng = np.random.default_rng(11)
    weight, bias = layer(rng, 32, 24)
    rows = correlated(rng, 1000, 24, groups=2)
    rows[1] = rows[1][:, ::-1] * 3
    result = quantize_layer(weight, bias, moments(rows), Choice(4, 32), seed=0)
    swapped = quantize_layer(weight, bias, moments(rows[::-1]), Choice(4, 32), seed=0)
    assert result.method == "sweep" and result.error < 0.3
    assert relative_error(weight, bias, swapped.decode(), swapped.bias, moments(rows)) > result.error


def test_no_rows_enough_for_a_sweep():
    rng = np.random.default_rng(12)
    weight, bias = layer(rng)
    few = moments(correlated(rng, 5, 48))
    assert quantize_layer(weight, bias, few, PLAIN, seed=0).method == "em"
    assert "5 rows are too few" in why_no_sweep(few) and why_no_sweep(few, few) is None
    assert why_no_sweep(moments(correlated(rng, 6, 48))) is None and why_no_sweep(None) is not None
    assert rule_damping(10**6, 48) == 0.05 < rule_damping(480, 48) < rule_damping(48, 48) == 1


def test_held_out_rows_decide():
    """Fitted to rows of another kind than it will meet, the sweep loses and EM is kept."""
    rng = np.random.default_rng(13)
    weight, bias = layer(rng)
    narrow = rng.standard_normal((1, 100, 3)) @ rng.standard_normal((3, 48)) + 0.01 * rng.standard_normal((1, 100, 48))
    wide = moments(rng.standard_normal((1, 500, 48)))
    choice = Choice(1, 16)
    fooled = quantize_layer(weight, bias, moments(narrow), choice, seed=0, damping=1e-3)
    warned = quantize_layer(weight, bias, moments(narrow), choice, seed=0, damping=1e-3, held_out=wide)
    assert fooled.method == "sweep" and warned.method == "em"
    assert warned.held_out_error < relative_error(weight, bias, fooled.decode(), fooled.bias, wide)
    assert warned.held_out_error == relative_error(weight, bias, warned.decode(), warned.bias, wide)


def test_int8_codebook_falls_back_where_it_costs():
    rng = np.random.default_rng(14)
    weight, bias = rng.standard_normal((32, 48)).astype(np.float32), None
    weight[0, 0] = 2000  # one outlier spoils the step of its position
    statistics = moments(correlated(rng, 500, 48))
    choice = Choice(4, 64, "int8")
    assert quantize_layer(weight, bias, statistics, choice, seed=0).choice.codebook_type == "float16"
    kept = quantize_layer(weight, bias, statistics, choice, seed=0, int8_tolerance=None)
    assert kept.choice == choice and kept.codebook.dtype == np.int8
    weight[0, 0] = 0
    assert quantize_layer(weight, bias, statistics, choice, seed=0).choice == choice


def broken(value):
    weight = layer(np.random.default_rng(15))[0]
    weight[1, 2] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "choice", "message"),
    [
        (broken(np.nan), PLAIN, "1 of 1536 weights are NaN or infinite"),
        (broken(np.inf), PLAIN, "1 of 1536 weights are NaN or infinite"),
        (broken(0), Choice(5, 16), "rows of 48 weights cannot be cut into blocks of 5"),
        (broken(0), Choice(4, 97), "384 sub-vectors are too few for 97 codewords; at most 96"),
        (np.zeros((0, 48), np.float32), PLAIN, "at least one element"),
        (np.zeros(48, np.float32), PLAIN, r"shape \(48,\)"),
        (broken(1e6), PLAIN, "exceeds float16's 65504"),
        (broken(0) * 1e-9, PLAIN, "vanish in float16"),
        (broken(1e9), Choice(4, 16, scaled=True), "factor of .* exceeds float16's 65504"),
    ],
)
def test_refuses(weight, choice, message):
    with pytest.raises(QuantizationError, match=message):
        quantize_layer(weight, None, None, choice, seed=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_statistics_of_an_overflow(value):
    rng = np.random.default_rng(17)
    weight, bias = layer(rng)
    good = moments(correlated(rng, 100, 48))
    bad = dataclasses.replace(good, mean=np.full_like(good.mean, value))
    with pytest.raises(QuantizationError, match="calibration samples give this layer NaN or infinite inputs"):
        quantize_layer(weight, bias, bad, PLAIN, seed=0)
    with pytest.raises(QuantizationError, match="held-out samples give"):
        quantize_layer(weight, bias, good, PLAIN, seed=0, held_out=bad)


def test_what_is_just_within_the_limits_is_quantized():
    weight = broken(0)
    assert quantize_layer(weight, None, None, Choice(4, 96), seed=0).error < 0.5
    assert quantize_layer(weight * 1e-9, None, None, Choice(4, 16, "int8"), seed=0).error < 0.6
    assert quantize_layer(weight * 1e-4, None, None, Choice(4, 16, scaled=True), seed=0).error < 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 0, "codewords": 16}, "block is 0"),
        ({"block": 4, "codewords": 1}, "codewords is 1"),
        ({"block": 4, "codewords": 65537}, "codewords is 65537"),
        ({"block": 4, "codewords": 16, "codebook_type": "int4"}, "codebook_type is 'int4'"),
    ],
)
def test_choice_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Choice(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "0 rows"),
        ({"gram": np.eye(4)}, r"gram has shape \(4, 4\)"),
        ({"mean": np.zeros((1, 5))}, r"mean has shape \(1, 5\)"),
        ({"cross": np.eye(4)[None]}, "come together"),
        ({"skip": Skip(np.zeros((1, 4, 2)), np.zeros((1, 4, 2)), np.zeros((1, 2)), 0.0)}, "needs the moments of both"),
        (
            {"cross": np.eye(5)[None], "float_mean": np.zeros((1, 4)), "float_gram": np.eye(4)[None]},
            r"cross has shape \(1, 5, 5\)",
        ),
    ],
)
def test_statistics_are_checked(change, message):
    good = {"rows": 3, "gram": np.eye(4)[None], "mean": np.zeros((1, 4))}
    Statistics(**good)
    with pytest.raises(ValueError, match=message):
        Statistics(**good | change)


def test_caller_mistakes():
    weight, bias = layer(np.random.default_rng(16))
    statistics = moments(np.ones((1, 5, 44)))
    with pytest.raises(ValueError, match="statistics of 44 inputs"):
        quantize_layer(weight, bias, statistics, PLAIN, seed=0)
    with pytest.raises(ValueError, match="method is 'lloyd'"):
        quantize_layer(weight, bias, None, PLAIN, seed=0, method="lloyd")
    with pytest.raises(ValueError, match="32 outputs cannot be split into 3 groups"):
        quantize_layer(weight, bias, moments(np.ones((3, 60, 48))), PLAIN, seed=0)


@pytest.mark.parametrize(("spoilt", "tried"), [(0, [0.3]), (1, [0.3, 1.0]), (3, [0.3, 1.0, 3.0])])
def test_stronger_damping_is_tried_where_the_sweep_does_not_beat_em(monkeypatch, spoilt, tried):
    rng = np.random.default_rng(11)
    weight, bias = layer(rng)
    fitted, judge = moments(correlated(rng, 4000, 48)), moments(correlated(rng, 2000, 48))
    seen, swept = [], []

    def damped(target, covariance, *, damping):
        seen.append(damping)
        return damped_objective(target, covariance, damping=damping)

    def sweep_and_refine(problem, objective, start):
        swept.append(objective)
        if len(swept) <= spoilt:
            return dataclasses.replace(start, indices=np.zeros_like(start.indices), codebook=0 * start.codebook)
        return _sweep_and_refine(problem, objective, start)

    monkeypatch.setattr("onnxcompress.codebook.layer.damped_objective", damped)
    monkeypatch.setattr("onnxcompress.codebook.layer._sweep_and_refine", sweep_and_refine)
    found = quantize_layer(weight, bias, fitted, Choice(4, 64), held_out=judge, seed=0)
    assert seen == [0.1, *tried]  # the first is EM's
    assert found.method == ("em" if spoilt == 3 else "sweep")
