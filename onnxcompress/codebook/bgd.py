"""The EM of BGD, as published: k-means under one metric a layer, that of the layer's input sub-vectors.

    minimize   sum over sub-vectors v of  (v - c)' M (v - c),    M = mean over positions of E[x_j x_j']

E-step: the codeword whose output on the activations is nearest. M-step: the mean, which is the minimizer under a metric
that all sub-vectors share. Codewords start as random sub-vectors; an empty one takes half of the fullest cluster, both
moved apart by a little noise. What the paper adds is distillation of the codewords.

Reference:
    Stock et al., And the bit goes down: revisiting the quantization of neural networks, ICLR 2020, section 3.
"""

import numpy as np

from onnxcompress.codebook.fitting import Clustering, codeword_norms, nearest, regularized, update_codebook

ITERATIONS = 100
NOISE = 1e-8


def shared_metric(metrics: np.ndarray) -> np.ndarray:
    """(positions, d, d): every position given the mean of all metrics."""
    return np.asarray(np.broadcast_to(metrics.mean(axis=0), metrics.shape))


def cluster_by_activations(
    vectors: np.ndarray, metrics: np.ndarray, size: int, *, seed: int, iterations: int = ITERATIONS
) -> Clustering:
    """Fit a codebook the way the paper does.

    Args:
        vectors: (positions, rows, d) float32.
        metrics: (positions, d, d): second moments of the input at each position; their mean is used.
        size: Number of codewords.
        seed: Same seed, same codebook.
        iterations: EM steps, fewer when no index changes any more.

    Returns:
        The clustering of all vectors.
    """
    positions, rows, length = vectors.shape
    generator = np.random.default_rng(seed)
    metrics = regularized(shared_metric(metrics))
    projected = vectors @ metrics
    weights = np.ones((positions, rows), np.float32)
    codebook = vectors.reshape(-1, length)[generator.choice(positions * rows, size, replace=False)].copy()
    indices, _ = nearest(projected, codeword_norms(metrics, codebook), codebook)
    for _ in range(iterations):
        codebook, counts = update_codebook(projected, metrics, weights, indices, codebook)
        _split_fullest(codebook, counts, generator)
        before = indices
        indices, _ = nearest(projected, codeword_norms(metrics, codebook), codebook)
        if np.array_equal(before, indices):
            break
    differences = vectors - codebook[indices]
    error = np.einsum("snd,snd->", differences @ metrics, differences, dtype=np.float64)
    return Clustering(codebook, indices, float(error))


def _split_fullest(codebook: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> None:
    counts = counts.copy()
    for empty in np.flatnonzero(counts == 0):
        fullest = int(counts.argmax())
        noise = NOISE * generator.standard_normal(codebook.shape[1], np.float32)
        codebook[empty] = codebook[fullest] - noise
        codebook[fullest] += noise
        counts[empty] = counts[fullest] // 2
        counts[fullest] -= counts[empty]
