"""Improve an assignment under the full Hessian: indices one block at a time, codebook and factors by least squares.

Every step minimizes the same quadratic in one kind of variable with the others fixed, so none can raise it; each is
checked in float64 and undone where rounding made it do so.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from onnxcompress.codebook.fitting import codeword_norms
from onnxcompress.codebook.objective import Assignment, Objective, to_positions

PANEL = 256  # columns whose gradients are kept up to date together


def descend_indices(objective: Objective, assignment: Assignment) -> Assignment:
    """Visit each block once and take the codeword that is best with all other blocks as they are.

    With e = t - w, block j's error as a function of its codeword c is, up to a constant,
    s^2 c' H_jj c - 2 s c' (H_jj w_j + (e H)_j).
    """
    codebook, scales = assignment.codebook, assignment.scales
    block = codebook.shape[1]
    length = objective.target.shape[2]
    hessian = objective.hessian32
    indices = assignment.indices.copy()
    weight = assignment.weight()
    errors = objective.target - weight
    step = max(block, PANEL // block * block)
    for start in range(0, length, step):
        stop = min(start + step, length)
        gradient = errors @ hessian[:, :, start:stop]
        for at in range(start, stop, block):
            here = slice(at, at + block)
            own = hessian[:, here, here]
            old = weight[:, :, here]
            projected = old @ own + gradient[:, :, at - start : at - start + block]
            scores = np.matmul(projected, -2 * codebook.T)
            scores += scales[:, :, None] * codeword_norms(own, codebook)[:, None, :]
            picked = scores.argmin(axis=2)
            new = scales[:, :, None] * codebook[picked]
            if at + block < stop:
                gradient[:, :, at - start + block :] -= (new - old) @ hessian[:, here, at + block : stop]
            errors[:, :, here] = objective.target[:, :, here] - new
            weight[:, :, here] = new
            indices[:, :, at // block] = picked
    return replace(assignment, indices=indices)


def solve_codebook(objective: Objective, assignment: Assignment, *, iterations: int = 4) -> Assignment:
    """Least-squares codewords for given indices and factors, by preconditioned conjugate gradients.

    The normal matrix is (k d)^2 and never formed: one product with it is a gather, a product with H, and a sum over the
    sub-vectors of each codeword. The preconditioner is the M-step's d x d matrix of each codeword.
    """
    size, block = assignment.codebook.shape
    flat = assignment.indices.reshape(-1)

    def collect(rows: np.ndarray) -> np.ndarray:
        """Sum the sub-vectors of each codeword: the adjoint of the gather."""
        scaled = (rows * assignment.scales[:, :, None]).reshape(-1, block)
        return np.stack([np.bincount(flat, weights=scaled[:, e], minlength=size) for e in range(block)], 1)

    def normal(codebook: np.ndarray) -> np.ndarray:
        weight = replace(assignment, codebook=codebook.astype(np.float32)).weight()
        return collect(weight @ objective.hessian32)

    inverse = _codeword_inverses(objective, assignment)
    solution = assignment.codebook.astype(np.float64)
    residual = collect((objective.target - assignment.weight()) @ objective.hessian32)
    direction = preconditioned = np.einsum("kde,ke->kd", inverse, residual)
    power = float((residual * preconditioned).sum())
    limit = 1e-8 * power
    for _ in range(iterations):
        if power <= limit:
            break
        image = normal(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        step = power / curvature
        solution = solution + step * direction
        residual = residual - step * image
        preconditioned = np.einsum("kde,ke->kd", inverse, residual)
        power, before = float((residual * preconditioned).sum()), power
        direction = preconditioned + power / before * direction
    return replace(assignment, codebook=solution.astype(np.float32))


def _codeword_inverses(objective: Objective, assignment: Assignment) -> np.ndarray:
    """(k, d, d) float64: inverse of the sum of s^2 H_jj over a codeword's sub-vectors, 0 for an unused one."""
    size, block = assignment.codebook.shape
    metrics = objective.positions(block)
    keys = to_positions(assignment.indices) + size * np.arange(len(metrics))[:, None]
    squares = np.repeat(assignment.scales.astype(np.float64) ** 2, len(metrics) // len(assignment.scales), axis=0)
    per_position = np.bincount(keys.reshape(-1), weights=squares.reshape(-1), minlength=size * len(metrics))
    sums = per_position.reshape(len(metrics), size).T @ metrics.reshape(len(metrics), -1)
    normal = sums.reshape(size, block, block)
    used = np.einsum("kdd->k", normal) > 0
    inverse = np.zeros_like(normal)
    inverse[used] = np.linalg.inv(normal[used])
    return np.asarray(inverse)


def solve_scales(objective: Objective, assignment: Assignment) -> Assignment:
    """Least-squares factor of each row for given codewords and indices, where it is positive."""
    bare = replace(assignment, scales=np.ones_like(assignment.scales)).weight()
    image = bare @ objective.hessian32
    own = np.einsum("god,god->go", image, bare, dtype=np.float64)
    wanted = np.einsum("god,god->go", image, objective.target, dtype=np.float64)
    better = (own > 0) & (wanted > 0) & (assignment.scales > 0)
    solved = np.divide(wanted, own, out=assignment.scales.astype(np.float64), where=better)
    return replace(assignment, scales=solved.astype(np.float32))


def refine(
    objective: Objective, assignment: Assignment, *, rounds: int, scaled: bool, fixed: bool = False
) -> Assignment:
    """Codebook (unless it is ``fixed``), factors and indices in turn; what does not lower the error is dropped."""
    steps: list[Callable[[Objective, Assignment], Assignment]] = [descend_indices]
    if scaled:
        steps.insert(0, solve_scales)
    if not fixed:
        steps.insert(0, solve_codebook)
    error = objective.error(assignment)
    for _ in range(rounds):
        before = error
        for step in steps:
            tried = step(objective, assignment)
            reached = objective.error(tried)
            if reached < error:
                assignment, error = tried, reached
        if error > before * (1 - 1e-3):
            break
    return assignment
