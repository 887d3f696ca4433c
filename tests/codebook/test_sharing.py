"""Codebooks of several layers: fitted together, chosen where they are worth their bytes, kept as they are."""

import numpy as np
import pytest

from onnxcompress.codebook.allocation import Offer, allocate, smallest_size, totals
from onnxcompress.codebook.codebook import Choice, Statistics
from onnxcompress.codebook.damage import MAX_DAMAGE
from onnxcompress.codebook.layer import quantize_layer
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.planning import Item, Menu, find_bend, hollow
from onnxcompress.codebook.pooling import NOT_ON_OFFER, Pool, choose_pools, measure_pools, with_pools
from onnxcompress.codebook.sharing import Member, fit_shared, shared_error, shared_scales
from onnxcompress.model_io import load
from onnxcompress.runtime import Runtime
from onnxcompress.testing import model

RNG = np.random.default_rng(0)
KERNELS = RNG.normal(size=(12, 9)).astype(np.float32)
POOL = Pool(9, 16, True)


def kernels(channels, size):
    """Depthwise weights that are a few kernels, larger or smaller, and little noise."""
    rows = KERNELS[RNG.integers(0, 12, channels)] * size * RNG.uniform(0.5, 2, (channels, 1))
    return (rows + 0.02 * size * RNG.normal(size=rows.shape)).astype(np.float32)


def member(weight, importance=1.0):
    return Member(weight, np.broadcast_to(np.eye(9), (len(weight), 9, 9)).copy(), importance)


def test_layers_of_very_different_weights_share_a_codebook():
    weights = [kernels(24, 1e-2), kernels(96, 1.0), kernels(48, 20.0)]
    shared = fit_shared([member(weight) for weight in weights], 9, 16, seed=0)
    assert shared.values.shape == (16, 9) and shared.values.dtype == np.int8
    for weight in weights:
        made = quantize_layer(weight, None, None, Choice(9, 16, "int8", True, True), seed=0, shared=shared)
        np.testing.assert_array_equal(made.codebook, shared.values)
        np.testing.assert_array_equal(made.codebook_scale, shared.factors)
        assert made.error < 0.06  # measured 0.035; the noise alone is 0.02
        assert made.scales is not None and made.indices.shape == (len(weight), 1)


def test_what_counts_more_is_fitted_better():
    weights = [RNG.normal(size=(40, 9)).astype(np.float32) for _ in range(2)]
    errors = []
    for importance in (1e-3, 1.0, 1e3):
        shared = fit_shared([member(weights[0], importance), member(weights[1])], 9, 8, seed=0)
        choice = Choice(9, 8, "int8", True, True)
        errors.append([quantize_layer(w, None, None, choice, seed=0, shared=shared).error for w in weights])
    first, second = np.array(errors).T
    assert first[0] > first[1] > first[2] and second[0] < second[1] < second[2]


def test_same_seed_same_codebook():
    members = [member(kernels(24, 1.0)), member(kernels(40, 3.0))]
    first, second = (fit_shared(members, 9, 16, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.factors, second.factors)


def test_a_swept_layer_keeps_the_codebook():
    weight = RNG.normal(size=(12, 24)).astype(np.float32)
    x = RNG.normal(size=(500, 24)) @ RNG.normal(size=(24, 24))
    statistics = Statistics(500, (x.T @ x)[None], x.mean(axis=0)[None])
    shared = fit_shared([Member(weight, np.eye(24)[None], 1.0)], 4, 32, seed=0)
    choice = Choice(4, 32, "int8", True, True)  # more codewords than its 72 sub-vectors allow of its own
    made = quantize_layer(weight, None, statistics, choice, seed=0, shared=shared)
    np.testing.assert_array_equal(made.codebook, shared.values)
    plain = quantize_layer(weight, None, statistics, choice, seed=0, shared=shared, method="em")
    assert made.error <= plain.error and made.method == "sweep"


@pytest.mark.parametrize("swept", [True, False])
def test_the_error_is_that_of_the_layer_as_it_will_be(swept):
    weight = RNG.normal(size=(40, 24)).astype(np.float32)
    x = RNG.normal(size=(500, 24)) @ RNG.normal(size=(24, 24))
    moments = (x - x.mean(axis=0)).T @ (x - x.mean(axis=0)) / 500
    shared = fit_shared([Member(weight, moments[None], 1.0)], 4, 16, seed=0)
    error = shared_error(Member(weight, moments[None], 1.0), shared, swept=swept)
    statistics = Statistics(500, (x.T @ x)[None], x.mean(axis=0)[None])
    choice = Choice(4, 16, "int8", True, True)
    method = "sweep" if swept else "em"
    made = quantize_layer(weight, np.zeros(40), statistics, choice, seed=0, shared=shared, method=method, damping=0.1)
    lost = made.decode().reshape(weight.shape) - weight.astype(np.float64)
    real = np.einsum("od,de,oe->", lost, moments, lost) / np.einsum("od,de,oe->", weight, moments, weight)
    # measured 1 to 15 digits without a sweep, 0.82 of it with one: rounds of refinement follow
    assert real <= error * (1 + 1e-5) and (error < 1.5 * real if swept else error == pytest.approx(real, rel=1e-5))


def test_every_layer_gets_the_errors_of_what_it_is_offered(tmp_path):
    """Rows of twelve kernels and noise: the one is stored well by few codewords, the other is not."""
    weights = {"A": np.tile(kernels(48, 1.0), (1, 2)), "B": RNG.normal(size=(48, 18)).astype(np.float32)}
    text = "g (float[N,18] x) => (float[N,48] y, float[N,48] z) { y = Gemm<transB=1>(x, A) z = Gemm<transB=1>(x, B) }"
    path = tmp_path / "m.onnx"
    path.write_bytes(model(text, **weights).SerializeToString())
    graph = load(path)
    layers = find_layers(graph)[0]
    forms = [Choice(9, size, "int8", True, True) for size in (16, 64, 256)]
    offered = {"A": forms, "B": forms[:2]}
    samples = [{"x": RNG.normal(size=(64, 18)).astype(np.float32)}]
    with Runtime() as runtime:
        found, again = (
            measure_pools(graph, layers, offered, {"A": 1.0, "B": 1.0}, samples, swept=True, seed=0, runtime=runtime)
            for _ in range(2)
        )
    assert found == again
    assert {name: list(errors) for name, errors in found.items()} == offered
    assert all(list(errors.values()) == sorted(errors.values(), reverse=True) for errors in found.values())
    assert found["B"][forms[0]] > 5 * found["A"][forms[0]]


@pytest.mark.parametrize(("rows", "interpolated"), [(64, False), (3200, True)])
def test_a_codebook_that_knows_all_sub_vectors_says_nothing_about_smaller_ones(tmp_path, rows, interpolated):
    """256 sub-vectors for 256 codewords leave no error; from there to 16 codewords no line goes through 64."""
    weights = {name: RNG.normal(size=(rows, 18)).astype(np.float32) for name in "AB"}
    text = f"g (float[N,18] x) => (float[N,{rows}] y, float[N,{rows}] z)"
    body = "{ y = Gemm<transB=1>(x, A) z = Gemm<transB=1>(x, B) }"
    path = tmp_path / "m.onnx"
    path.write_bytes(model(f"{text} {body}", **weights).SerializeToString())
    graph = load(path)
    layers = find_layers(graph)[0]
    forms = [Choice(9, size, "int8", True, True) for size in (16, 64, 256)]
    samples = [{"x": RNG.normal(size=(64, 18)).astype(np.float32)}]
    both = {"A": 1.0, "B": 1.0}
    with Runtime() as runtime:
        wishes = {"swept": False, "seed": 0, "runtime": runtime}
        found = measure_pools(graph, layers, dict.fromkeys(both, forms), both, samples, **wishes)["A"]
    few, middle, many = (found[form] for form in forms)
    assert (middle == pytest.approx(np.sqrt(few * many))) == interpolated  # 64 is half-way from 16 to 256
    if not interpolated:
        assert many < 1e-3 and middle > 0.2  # measured 3e-5 and 0.49


def test_a_menu_takes_what_was_measured():
    shared, own = Choice(9, 16, "int8", True, True), Choice(9, 16)
    menu = Menu("A", [], sensitivity=0.5)
    menu.items = [menu.item(shared, 60, 0.04), menu.item(own, 400, 0.04)]
    assert menu.items[0] == Item(shared, 60, pytest.approx(0.02), pytest.approx(0.2))
    menu.correct({shared: 0.36})
    assert menu.items == [
        Item(shared, 60, pytest.approx(0.18), pytest.approx(0.6)),
        Item(own, 400, pytest.approx(0.02), pytest.approx(0.2)),
    ]
    assert [item.offer.damage for item in menu.items] == pytest.approx([0.18 / 0.64, 0.02 / 0.96])
    assert [item.importance for item in menu.items] == pytest.approx([0.5 / 0.64, 0.5 / 0.96])


def test_damage_beyond_a_bend_grows_as_it_was_measured():
    menu = Menu("A", [], sensitivity=0.5, bend=(0.04, 2.0))
    assert [menu.damage(squared) for squared in (0.01, 0.04, 0.08, 0.4)] == pytest.approx([0.005, 0.02, 0.08, 2.0])
    assert menu.damage(0.9) == MAX_DAMAGE
    menu.items = [menu.item(Choice(9, 16), 400, 0.08)]
    assert menu.items[0].damage == pytest.approx(0.08)
    assert menu.straight().items[0].damage == pytest.approx(0.04) and menu.straight().bend is None


@pytest.mark.parametrize(
    ("tried", "bend"),
    [
        ([[0.04, 0.02], [0.16, 0.32]], (0.04, 2.0)),
        ([[0.04, 0.02], [0.16, 0.04]], (0.04, 0.5)),
        ([[0.04, 0.02], [0.16, 0.021]], (0.04, 0.5)),  # never flatter
        ([[0.04, 0.001], [0.16, 3.9]], (0.04, 4.0)),  # never steeper
        ([[0.04, 0.02], [0.16, MAX_DAMAGE]], None),  # more than can be told
        ([[0.04, 0.02], [0.05, 0.04]], None),  # too near to each other
        ([[0.04, 0.02], [0.16, None]], None),
        ([[0.04, 0.0], [0.16, 0.1]], None),
        ([[0.04, 0.02]], None),
    ],
)
def test_the_bend_is_where_two_forms_say_it_is(tried, bend):
    assert find_bend(tried) == (bend if bend is None else pytest.approx(bend))


def test_a_choice_and_its_codebook_come_together():
    weight = kernels(24, 1.0)
    with pytest.raises(ValueError, match="come together"):
        quantize_layer(weight, None, None, Choice(9, 4, "int8", True, True), seed=0)


def test_factors_are_the_size_of_rows():
    target = np.array([[[3.0, 4.0], [0.0, 0.0]]])
    np.testing.assert_array_equal(shared_scales(target), np.float32([[np.float16(np.sqrt(12.5)), 0]]))


# -- which -----------------------------------------------------------------------------------------------------------


def menus(layers):
    """Keep, int8, or a part in a shared codebook."""
    offers = [[Offer(1000, 0.0), Offer(300, 0.01), Offer(60, 0.2), Offer(90, 0.05)] for _ in range(layers)]
    return offers, [[None, None, POOL, Pool(9, 256, True)] for _ in range(layers)]


@pytest.mark.parametrize(("layers", "chosen"), [(1, set()), (12, {POOL})])
def test_a_codebook_pays_where_many_share_it(layers, chosen):
    offers, pools = menus(layers)
    room = 305 * layers if layers == 1 else 150 * layers
    found = choose_pools(offers, pools, room)
    assert (POOL in found) == bool(chosen)
    allowed, fixed = with_pools(offers, pools, found), sum(pool.size_bytes for pool in found)
    assert totals(allowed, allocate(allowed, room - fixed)).size_bytes + fixed <= room


def test_only_codebooks_that_are_chosen_are_on_offer():
    offers, pools = menus(3)
    allowed = with_pools(offers, pools, {POOL})
    assert all(of_layer[3] is NOT_ON_OFFER and of_layer[2] == offers[0][2] for of_layer in allowed)
    assert smallest_size(allowed) == 180


def test_as_few_bytes_as_possible():
    offers, pools = menus(12)
    found = choose_pools(offers, pools, None)
    assert found == {POOL}  # 12 * (300 - 60) bytes saved for 310 of the codebook


def test_hollow_layers_have_the_size_of_real_ones():
    class Shape:
        outputs, length = 24, 9

    choice = Choice(9, 16, "int8", True, True)
    empty = hollow(Shape(), choice)
    shared = fit_shared([member(kernels(24, 1.0))], 9, 16, seed=0)
    made = quantize_layer(kernels(24, 1.0), None, None, choice, seed=0, shared=shared)
    assert empty.size_bytes() == made.size_bytes()
