"""Fit one codebook to the sub-vectors of a layer: k-means++ and EM, each position under its own metric.

    minimize   sum over positions j and rows o of   w_jo (v_jo - c)' M_j (v_jo - c),   c the codeword of v_jo

M_j is the d x d diagonal block of the layer's covariance at position j: an input that never moves costs nothing, and
two that move together are weighed together. The E-step takes the nearest codeword, the M-step solves d linear equations
a codeword:  (sum w M_j) c = sum w M_j v.  With every M_j the identity it is k-means.

References:
    Arthur & Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.
    van Baalen et al., GPTVQ: the blessing of dimensionality for LLM quantization, 2024.
"""

from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 18  # scores held at once: 1 MB of float32 stays in the second-level cache
RIDGE = 1e-6  # of a metric's mean diagonal: keeps a codeword defined along directions that no input takes
TRIALS = 4  # candidates of a k-means++ step


@dataclass(frozen=True, eq=False)
class Clustering:
    """Codewords, indices, and the weighted error they leave.

    Attributes:
        codebook: (k, d) float32.
        indices: (positions, rows) intp.
        error: sum of w (v - c)' M (v - c).
    """

    codebook: np.ndarray
    indices: np.ndarray
    error: float


def regularized(metrics: np.ndarray) -> np.ndarray:
    """(positions, d, d) float32 metrics with a small ridge, scaled to a mean diagonal of 1."""
    length = metrics.shape[-1]
    mean_diagonal = float(np.einsum("sdd->", metrics)) / (len(metrics) * length)
    if mean_diagonal <= 0:  # every input is dead: any metric will do
        return np.asarray(np.broadcast_to(np.eye(length), metrics.shape), np.float32)
    return np.asarray(metrics / mean_diagonal + RIDGE * np.eye(length), np.float32)


def codeword_norms(metrics: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """(positions, k) float32: c' M_j c."""
    positions, length, _ = metrics.shape
    squares = (codebook[:, :, None] * codebook[:, None, :]).reshape(len(codebook), length * length)
    return np.asarray(metrics.reshape(positions, -1) @ squares.T)


def nearest(projected: np.ndarray, norms: np.ndarray, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the codeword that minimizes c' M_j c - 2 (M_j v)' c.

    Args:
        projected: (positions, rows, d) float32, M_j v.
        norms: (positions, k) float32 from ``codeword_norms``.
        codebook: (k, d) float32.

    Returns:
        Indices (positions, rows) intp, and that minimum (positions, rows) float32.
    """
    positions, rows, length = projected.shape
    indices = np.empty((positions, rows), np.intp)
    least = np.empty((positions, rows), np.float32)
    twice = np.ascontiguousarray(-2 * codebook.T)
    step = max(1, CHUNK // (rows * len(codebook)))
    for start in range(0, positions, step):
        part = projected[start : start + step]
        scores = (part.reshape(-1, length) @ twice).reshape(len(part), rows, -1)
        scores += norms[start : start + step, None, :]
        found = scores.argmin(axis=2)
        indices[start : start + step] = found
        least[start : start + step] = np.take_along_axis(scores, found[..., None], axis=2)[..., 0]
    return indices, least


def seed_codebook(
    vectors: np.ndarray, metrics: np.ndarray, weights: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw codewords far from each other: k-means++, the best of a few candidates at each step.

    Args:
        vectors: (positions, rows, d) float32.
        metrics: (positions, d, d) float32.
        weights: (positions, rows) float32, not negative.
        size: Number of codewords.
        generator: Source of the draws.

    Returns:
        (size, d) float32, rows of ``vectors``.
    """
    positions, rows, length = vectors.shape
    count = min(positions * rows, max(8192, 32 * size))
    sample = np.sort(generator.choice(positions * rows, count, replace=False))
    position = sample // rows
    points = vectors.reshape(-1, length)[sample]
    weight = weights.reshape(-1)[sample].astype(np.float64)
    projected = np.einsum("nd,nde->ne", points, metrics[position])
    own = np.einsum("nd,nd->n", projected, points)

    def distances(candidates: np.ndarray) -> np.ndarray:
        norms = codeword_norms(metrics, candidates)[position]
        return np.asarray(np.maximum(own[:, None] - 2 * projected @ candidates.T + norms, 0))

    codebook = np.empty((size, length), np.float32)
    codebook[0] = points[generator.integers(count)]
    least = distances(codebook[:1])[:, 0]
    for k in range(1, size):
        cumulative = np.cumsum(least * weight)
        draws = generator.random(TRIALS)
        if cumulative[-1] <= 0:  # fewer distinct vectors than codewords: the rest may repeat
            codebook[k:] = codebook[0]
            break
        chosen = np.minimum(np.searchsorted(cumulative, draws * cumulative[-1], side="right"), count - 1)
        tried = np.minimum(distances(points[chosen]), least[:, None])
        best = int((weight @ tried).argmin())
        codebook[k], least = points[chosen[best]], tried[:, best]
    return codebook


def update_codebook(
    projected: np.ndarray, metrics: np.ndarray, weights: np.ndarray, indices: np.ndarray, codebook: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The M-step: each codeword where the weighted error of its sub-vectors is least.

    Returns:
        Codebook (k, d) float32, an empty codeword left as it was; and how many sub-vectors each has, (k,).
    """
    size, length = codebook.shape
    positions = len(indices)
    flat = indices.reshape(-1)
    counts = np.bincount(flat, minlength=size)
    keyed = (indices + size * np.arange(positions)[:, None]).reshape(-1)
    per_position = np.bincount(keyed, weights=weights.reshape(-1), minlength=size * positions).reshape(positions, size)
    normal = (per_position.T @ metrics.reshape(positions, -1).astype(np.float64)).reshape(size, length, length)
    moments = np.stack(
        [np.bincount(flat, weights=(projected[..., e] * weights).reshape(-1), minlength=size) for e in range(length)], 1
    )
    used = np.einsum("kdd->k", normal) > 0
    updated = codebook.copy()
    updated[used] = np.linalg.solve(normal[used], moments[used][..., None])[..., 0]
    return updated, counts


def cluster(
    vectors: np.ndarray,
    metrics: np.ndarray,
    size: int,
    *,
    seed: int,
    weights: np.ndarray | None = None,
    start: np.ndarray | None = None,
    iterations: int = 30,
    tolerance: float = 2e-4,
    sample: int = 1 << 18,
) -> Clustering:
    """Fit a codebook by EM.

    Args:
        vectors: (positions, rows, d) float32.
        metrics: (positions, d, d), symmetric and not negative.
        size: Number of codewords.
        seed: Same seed, same codebook.
        weights: (positions, rows), not negative; 1 where None.
        start: (size, d) codewords to begin with; k-means++ where None.
        iterations: At most that many.
        tolerance: Stop when the error falls by less than this part.
        sample: Fit to about so many sub-vectors of a larger layer; all are assigned at the end.

    Returns:
        The clustering of all vectors.
    """
    positions, rows, _ = vectors.shape
    metrics = regularized(metrics)
    weights = np.ones((positions, rows), np.float32) if weights is None else weights
    generator = np.random.default_rng(seed)
    part, part_weights = vectors, weights
    if positions * rows > sample:  # whole rows, so that every position and its metric stays
        keep = np.sort(generator.choice(rows, max(1, sample // positions), replace=False))
        part, part_weights = vectors[:, keep], weights[:, keep]
    codebook = seed_codebook(part, metrics, part_weights, size, generator) if start is None else start
    codebook = _iterate(part, metrics, part_weights, codebook.astype(np.float32), iterations, tolerance)
    projected = vectors @ metrics
    indices, least = nearest(projected, codeword_norms(metrics, codebook), codebook)
    own = np.einsum("snd,snd->sn", projected, vectors)
    return Clustering(codebook, indices, float(((own + least) * weights).sum(dtype=np.float64)))


def _iterate(
    vectors: np.ndarray,
    metrics: np.ndarray,
    weights: np.ndarray,
    codebook: np.ndarray,
    iterations: int,
    tolerance: float,
) -> np.ndarray:
    projected = vectors @ metrics
    own = np.einsum("snd,snd->sn", projected, vectors)
    before = np.inf
    best, least_error = codebook, np.inf
    for _ in range(iterations):
        indices, least = nearest(projected, codeword_norms(metrics, codebook), codebook)
        errors = np.maximum(own + least, 0) * weights
        error = float(errors.sum(dtype=np.float64))
        if error < least_error:
            best, least_error = codebook, error
        if error >= before * (1 - tolerance):
            break
        before = error
        codebook, counts = update_codebook(projected, metrics, weights, indices, codebook)
        _refill(codebook, counts, errors, vectors)
    return best


def _refill(codebook: np.ndarray, counts: np.ndarray, errors: np.ndarray, vectors: np.ndarray) -> None:
    """Move the codewords nobody uses onto the sub-vectors that are served worst."""
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        flat = errors.reshape(-1)
        take = min(len(empty), len(flat))
        worst = np.argpartition(flat, len(flat) - take)[len(flat) - take :]
        worst = worst[np.argsort(-flat[worst], kind="stable")]
        codebook[empty[:take]] = vectors.reshape(-1, vectors.shape[-1])[worst]
