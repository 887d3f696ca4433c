"""The pieces of the fit: EM, the sweep, the refinements, each against a plain computation and against doing nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.codebook.bgd import cluster_by_activations
from onnxcompress.codebook.fitting import cluster, codeword_norms, nearest, regularized
from onnxcompress.codebook.objective import Assignment, Objective, damped_objective, from_positions, to_positions
from onnxcompress.codebook.refining import descend_indices, refine, solve_codebook, solve_scales
from onnxcompress.codebook.scaling import row_scales, store_codebook
from onnxcompress.codebook.sweep import block_order, sweep, upper_factor

# A step computed in float32 may raise an objective that it cannot lower by this part: measured 3e-7 at most.
ROUNDING = 1e-6


def positive(rng, count, length, rows=None):
    """(count, length, length) moments of random rows that share a few directions."""
    factor = rng.standard_normal((count, length, length)) * np.exp(rng.standard_normal(length))
    x = rng.standard_normal((count, rows or 4 * length, length)) @ factor
    return x.transpose(0, 2, 1) @ x / x.shape[1]


def problem(rng, groups=1, rows=6, length=24, block=3, size=8, scaled=True):
    target = rng.standard_normal((groups * rows, length)) * np.exp(rng.standard_normal((groups * rows, 1)))
    objective = damped_objective(target, positive(rng, groups, length), damping=0.1)
    scales = row_scales(objective.target) if scaled else np.ones((groups, rows), np.float32)
    vectors = objective.vectors(block, scales).reshape(-1, block)
    codebook = vectors[rng.choice(len(vectors), size, replace=False)]
    return objective, codebook, scales


def explicit_error(objective, assignment):
    return sum(
        float((t - w) @ h @ (t - w))
        for target, weight, h in zip(
            objective.target.astype(np.float64), assignment.weight(), objective.hessian, strict=True
        )
        for t, w in zip(target, weight, strict=True)
    )


def test_nearest_is_the_exhaustive_search():
    rng = np.random.default_rng(0)
    vectors, codebook = rng.standard_normal((5, 7, 3)).astype("f4"), rng.standard_normal((9, 3)).astype("f4")
    metrics = regularized(positive(rng, 5, 3))
    indices, least = nearest(vectors @ metrics, codeword_norms(metrics, codebook), codebook)
    for s, n in itertools.product(range(5), range(7)):
        errors = [(vectors[s, n] - c) @ metrics[s] @ (vectors[s, n] - c) for c in codebook]
        assert indices[s, n] == np.argmin(errors)
        own = vectors[s, n] @ metrics[s] @ vectors[s, n]
        assert own + least[s, n] == pytest.approx(min(errors), abs=1e-5)  # measured 1e-6


def test_clusters_that_are_apart_are_found():
    rng = np.random.default_rng(1)
    centres = 10 * rng.standard_normal((12, 4))
    truth = rng.integers(12, size=(6, 50))
    vectors = (centres[truth] + 0.01 * rng.standard_normal((6, 50, 4))).astype(np.float32)
    found = cluster(vectors, positive(rng, 6, 4), 12, seed=0)
    assert np.abs(vectors - found.codebook[found.indices]).max() < 0.1
    for k in range(12):
        assert len(np.unique(found.indices[truth == k])) == 1


@pytest.mark.parametrize("seed", range(4))
def test_em_leaves_no_codeword_unused_and_beats_a_random_start(seed):
    rng = np.random.default_rng(seed)
    vectors, metrics = rng.standard_normal((8, 64, 4)).astype(np.float32), positive(rng, 8, 4)
    found = cluster(vectors, metrics, 32, seed=seed)
    assert len(np.unique(found.indices)) == 32
    first = vectors.reshape(-1, 4)[:32]
    assert found.error < 0.8 * cluster(vectors, metrics, 32, seed=seed, start=first, iterations=1).error


def test_em_reports_the_error_it_leaves():
    rng = np.random.default_rng(2)
    vectors, metrics = rng.standard_normal((4, 40, 3)).astype(np.float32), positive(rng, 4, 3)
    weights = rng.random((4, 40)).astype(np.float32)
    found = cluster(vectors, metrics, 8, seed=0, weights=weights)
    d = vectors - found.codebook[found.indices]
    explicit = np.einsum("sn,snd,sde,sne->", weights, d, regularized(metrics), d)
    assert found.error == pytest.approx(explicit, rel=1e-5)  # measured 2e-7


def test_a_large_layer_is_fitted_to_a_part_of_it():
    rng = np.random.default_rng(3)
    vectors, metrics = rng.standard_normal((4, 4000, 2)).astype(np.float32), positive(rng, 4, 2)
    whole, part = cluster(vectors, metrics, 16, seed=0), cluster(vectors, metrics, 16, seed=0, sample=2000)
    assert part.indices.shape == whole.indices.shape
    assert part.error < 1.1 * whole.error  # measured 1.03


def test_bgd_is_kmeans_under_the_mean_metric():
    rng = np.random.default_rng(4)
    vectors, metrics = rng.standard_normal((6, 30, 3)).astype(np.float32), positive(rng, 6, 3)
    found = cluster_by_activations(vectors, metrics, 8, seed=0)
    shared = regularized(np.broadcast_to(metrics.mean(axis=0), metrics.shape))[0]
    for k in range(8):
        assert np.allclose(found.codebook[k], vectors[found.indices == k].mean(axis=0), rtol=0, atol=1e-4)
    for s, n in itertools.product(range(6), range(30)):
        d = vectors[s, n] - found.codebook
        assert found.indices[s, n] == np.einsum("kd,de,ke->k", d, shared, d).argmin()


def test_bgd_splits_the_fullest_cluster_for_an_empty_one():
    vectors = np.zeros((2, 20, 2), np.float32)
    vectors[0, :3] = [[5, 0], [0, 5], [5, 5]]
    metrics = np.broadcast_to(np.eye(2), (2, 2, 2))
    for seed in range(5):
        found = cluster_by_activations(vectors, metrics, 4, seed=seed)
        assert np.isfinite(found.codebook).all() and len(np.unique(found.indices)) > 1


def test_positions_and_vectors_are_the_blocks_of_rows_and_hessian():
    rng = np.random.default_rng(5)
    objective, _, scales = problem(rng, groups=2)
    positions, vectors = objective.positions(3), objective.vectors(3, scales)
    for g, j in itertools.product(range(2), range(8)):
        part = slice(3 * j, 3 * j + 3)
        assert np.array_equal(positions[8 * g + j], objective.hessian[g, part, part])
        assert np.allclose(vectors[8 * g + j] * scales[g][:, None], objective.target[g, :, part], rtol=1e-6)
    indices = rng.integers(9, size=(2, 6, 8))
    assert np.array_equal(from_positions(to_positions(indices), 2), indices)


def test_upper_factor():
    hessian = positive(np.random.default_rng(6), 2, 10)
    factor = upper_factor(hessian)
    assert np.array_equal(factor, np.triu(factor))
    assert np.allclose(factor @ factor.transpose(0, 2, 1), hessian, rtol=0, atol=1e-12 * hessian.max())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("panel", [3, 6, 256])
def test_sweep_is_the_nearest_plane(scaled, panel, monkeypatch):
    """Against the textbook form: each block in turn, all later ones moved by the inverse Hessian to make up for it."""
    monkeypatch.setattr("onnxcompress.codebook.sweep.PANEL", panel)
    rng = np.random.default_rng(7)
    objective, codebook, scales = problem(rng, groups=2, scaled=scaled)
    found = sweep(objective, codebook, scales)
    for g in range(2):
        order = block_order(objective.hessian, 3)[g]
        for o in range(6):
            row, left = objective.target[g, o].astype(np.float64), list(order)
            while left:
                here, left = left[:3], left[3:]
                inverse = np.linalg.inv(objective.hessian[g][np.ix_(here + left, here + left)])
                metric = np.linalg.inv(inverse[:3, :3])
                candidates = scales[g, o] * codebook
                differences = row[here] - candidates
                best = np.einsum("kd,de,ke->k", differences, metric, differences).argmin()
                assert found.indices[g, o, here[0] // 3] == best
                row[left] -= differences[best] @ metric @ inverse[:3, 3:]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4, 6]), st.booleans())
def test_no_refinement_raises_the_error(seed, groups, block, scaled):
    rng = np.random.default_rng(seed)
    objective, codebook, scales = problem(rng, groups=groups, block=block, scaled=scaled)
    indices = rng.integers(8, size=(groups, 6, 24 // block))
    assignment = Assignment(codebook, indices, scales)
    error = explicit_error(objective, assignment)
    assert objective.error(assignment) == pytest.approx(error, rel=1e-5)
    for step in (descend_indices, solve_codebook, solve_scales, descend_indices, solve_codebook):
        assignment = step(objective, assignment)
        reached = explicit_error(objective, assignment)
        assert reached <= error * (1 + ROUNDING)
        error = reached
    refined = refine(objective, assignment, rounds=3, scaled=scaled)
    assert explicit_error(objective, refined) <= error * (1 + ROUNDING)


@pytest.mark.parametrize("panel", [2, 256])
def test_descent_ends_where_no_single_index_helps(panel, monkeypatch):
    monkeypatch.setattr("onnxcompress.codebook.refining.PANEL", panel)
    rng = np.random.default_rng(8)
    objective, codebook, scales = problem(rng, block=2)
    assignment = Assignment(codebook, rng.integers(8, size=(1, 6, 12)), scales)
    for _ in range(30):
        assignment = descend_indices(objective, assignment)
    error = explicit_error(objective, assignment)
    for o, j, k in itertools.product(range(6), range(12), range(8)):
        indices = assignment.indices.copy()
        indices[0, o, j] = k
        assert explicit_error(objective, Assignment(codebook, indices, scales)) >= error * (1 - 1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_solved_codebook_and_scales_are_least_squares(groups):
    rng = np.random.default_rng(9)
    objective, codebook, scales = problem(rng, groups=groups, rows=12)
    assignment = Assignment(codebook, rng.integers(8, size=(groups, 12, 8)), scales)
    solved = solve_codebook(objective, assignment, iterations=60)
    # The codebook enters linearly: stack sqrt(H) (t - s G c) over rows and solve.
    design, wanted = [], []
    for g, o in itertools.product(range(groups), range(12)):
        gather = np.zeros((24, 8 * 3))
        for j, e in itertools.product(range(8), range(3)):
            gather[3 * j + e, 3 * assignment.indices[g, o, j] + e] = scales[g, o]
        root = np.linalg.cholesky(objective.hessian[g]).T
        design.append(root @ gather)
        wanted.append(root @ objective.target[g, o])
    explicit = np.linalg.lstsq(np.concatenate(design), np.concatenate(wanted), rcond=None)[0].reshape(8, 3)
    best = explicit_error(objective, Assignment(explicit, assignment.indices, scales))
    assert explicit_error(objective, solved) == pytest.approx(best, rel=1e-5)


def test_solved_scales_are_least_squares_and_stay_positive():
    rng = np.random.default_rng(10)
    objective, codebook, scales = problem(rng, rows=12)
    scales = scales * rng.uniform(0.8, 1.2, scales.shape).astype(np.float32)
    swept = sweep(objective, codebook, scales)
    rescaled = solve_scales(objective, swept)
    error = explicit_error(objective, rescaled)
    assert error < 0.99 * explicit_error(objective, swept)
    for factor in (0.999, 1.001):
        moved = Assignment(codebook, rescaled.indices, rescaled.scales * np.float32(factor))
        assert explicit_error(objective, moved) > error
    backwards = Assignment(-codebook, swept.indices, scales)  # would need factors below 0
    assert np.array_equal(solve_scales(objective, backwards).scales, scales)


def test_row_scales_fit_float16():
    target = np.array([[[0, 0]], [[3, 4]], [[3e-7, 4e-7]], [[30, 40]]], np.float32)
    scales = row_scales(target)
    assert scales[0, 0] == 0 and np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
    assert scales[3, 0] / scales[1, 0] == pytest.approx(10, rel=1e-3)
    assert not row_scales(np.zeros((1, 3, 4), np.float32)).any()


def test_int8_codebook_has_a_factor_for_each_position():
    codebook = np.array([[1, 100, 0], [-0.5, -3, 0]], np.float32)
    stored, factors = store_codebook(codebook, "int8")
    assert stored.dtype == np.int8 and np.abs(stored).max() == 127
    assert (np.abs(stored * factors - codebook) <= factors / 2).all()


def test_objective_of_a_dead_layer_is_the_weight_itself():
    objective = damped_objective(np.ones((2, 4)), np.zeros((1, 4, 4)), damping=0.1)
    assert isinstance(objective, Objective) and np.array_equal(objective.hessian[0], np.eye(4))
