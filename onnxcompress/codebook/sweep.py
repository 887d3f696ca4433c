"""Choose the indices of a row block after block, each block making up for the error of those before it.

With H = R R', R upper triangular, the error of a row is

    (t - w) H (t - w)'  =  sum over blocks j of  | (t_j - w_j) R_jj  +  sum_{i<j} (t_i - w_i) R_ij |^2

and block j's term holds no later block. So the blocks are chosen in order, each the codeword that makes its own term
least: what the earlier ones left over is carried along. This is the nearest-plane algorithm, of which GPTQ is the case
of blocks of one number; R_jj R_jj' is what remains of the Hessian of block j once the later blocks have made up for it
as well as they can. Blocks with the largest trace go first, when most are left to make up for them.

References:
    Babai, On Lovasz' lattice reduction and the nearest lattice point problem, Combinatorica 1986.
    Frantar et al., GPTQ: accurate post-training quantization for generative pre-trained transformers, ICLR 2023.
"""

import numpy as np

from onnxcompress.codebook.fitting import codeword_norms, nearest, regularized
from onnxcompress.codebook.objective import Assignment, Objective, from_positions

PANEL = 256  # columns that are brought up to date by one matrix product


def block_order(hessian: np.ndarray, block: int) -> np.ndarray:
    """(groups, D) intp: the columns, whole blocks by falling trace."""
    groups, length, _ = hessian.shape
    traces = np.einsum("gdd->gd", hessian).reshape(groups, length // block, block).sum(axis=2)
    order = np.argsort(-traces, axis=1, kind="stable")
    return np.asarray((order[:, :, None] * block + np.arange(block)).reshape(groups, length))


def upper_factor(hessian: np.ndarray) -> np.ndarray:
    """R with R R' = H and R upper triangular, (groups, D, D) float64: a Cholesky factor read backwards."""
    return np.ascontiguousarray(np.linalg.cholesky(hessian[:, ::-1, ::-1])[:, ::-1, ::-1])


def sweep(objective: Objective, codebook: np.ndarray, scales: np.ndarray) -> Assignment:
    """Choose all indices under the full Hessian, codebook and factors given.

    Args:
        objective: Target and Hessian.
        codebook: (k, d) float32.
        scales: (groups, outputs / group) float32, not negative.

    Returns:
        The assignment.
    """
    groups, rows, length = objective.target.shape
    block = codebook.shape[1]
    columns = block_order(objective.hessian, block)
    permuted = np.take_along_axis(
        np.take_along_axis(objective.hessian, columns[:, :, None], axis=1), columns[:, None, :], axis=2
    )
    factor = upper_factor(permuted).astype(np.float32)
    target = np.take_along_axis(objective.target, columns[:, None, :], axis=2)
    errors = np.zeros_like(target)  # t - w of the blocks chosen so far
    chosen = np.empty((groups, rows, length // block), np.intp)
    step = max(block, PANEL // block * block)
    for start in range(0, length, step):
        stop = min(start + step, length)
        carried = errors[:, :, :start] @ factor[:, :start, start:stop]
        for at in range(start, stop, block):
            own = factor[:, at : at + block, at : at + block]
            here = slice(at, at + block)
            within = carried[:, :, at - start : at - start + block]
            wanted = target[:, :, here] @ own + within
            picked = _nearest_scaled(wanted @ own.transpose(0, 2, 1), own @ own.transpose(0, 2, 1), codebook, scales)
            errors[:, :, here] = target[:, :, here] - scales[:, :, None] * codebook[picked]
            chosen[:, :, at // block] = picked
            if at + block < stop:
                carried[:, :, at - start + block :] += errors[:, :, here] @ factor[:, here, at + block : stop]
    indices = np.empty_like(chosen)
    np.put_along_axis(indices, (columns[:, None, ::block] // block).repeat(rows, axis=1), chosen, axis=2)
    return Assignment(codebook, indices, scales)


def _nearest_scaled(projected: np.ndarray, metric: np.ndarray, codebook: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The codeword c that minimizes s c' M c - 2 p' c: (groups, rows) intp."""
    norms = codeword_norms(metric, codebook)  # (groups, k)
    scores = np.matmul(projected, -2 * codebook.T)
    scores += scales[:, :, None] * norms[:, None, :]
    return np.asarray(scores.argmin(axis=2))


def nearest_blockwise(objective: Objective, codebook: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(groups, rows, D / d) intp: each sub-vector's nearest codeword under the metric of its position alone."""
    block = codebook.shape[1]
    metrics = regularized(objective.positions(block))
    projected = objective.vectors(block, scales) @ metrics
    indices, _ = nearest(projected, codeword_norms(metrics, codebook), codebook)
    return from_positions(indices, len(objective.hessian))
