"""What storing a layer in each possible form would cost: bytes, and the error of its output.

    keep              as it is
    float16           rounded; for weights of more than 16 bits
    int8              one factor for each output channel
    Choice(d, k)      codewords and indices, see ``codebook.py``

Errors are relative and squared,  tr(E C E') / tr(W C W'),  C the covariance of the layer's input (the bias takes up the
mean). Of the codebook forms only some are fitted, on some of the rows, by a few steps of EM; between them the logarithm
of the error is linear in that of the number of codewords. Only ratios of these errors are used, see ``damage.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from onnxcompress.codebook.codebook import Choice, Statistics, indices_size_bytes, size_bytes
from onnxcompress.codebook.fitting import cluster, regularized
from onnxcompress.codebook.narrow import to_float16, to_int8
from onnxcompress.codebook.objective import Assignment, damped_objective, from_positions
from onnxcompress.codebook.permuting import columns_of, find_order, is_permutable
from onnxcompress.codebook.scaling import row_scales
from onnxcompress.codebook.sweep import sweep
from onnxcompress.codebook.target import covariance, energy

Form = Choice | Literal["keep", "float16", "int8"]

BLOCKS = (2, 3, 4, 6, 8, 9, 12, 16, 18)
CODEWORDS = (16, 32, 64, 128, 256, 512, 1024)
FITTED = (16, 256)  # the others lie between and beyond on a line
VECTORS_PER_CODEWORD = 48  # in a fit; with few of them a codebook knows its sample by heart
MIN_VECTORS = 4  # per codeword in the layer itself
SAMPLE = 12_288
ITERATIONS = 8
DAMPING = 0.1
RANDOM_START = 4  # block length from which on k-means++ gains little
MIDDLE_BITS = 1.4  # a weight: where damage is measured, and
COARSE_BITS = 0.4  # where it is measured again: it may grow much faster than the squared error of a layer's output
MOST_ORDER_BITS = 0.06  # a weight, for an order of the channels: what it gains is worth as many
SHARED_CODEWORDS = (16, 64, 128, 256)
# Squared error with a codebook for many layers over that with one of its own of as many codewords: a guess, where
# ``pooling.measure_pools`` does not find out.
SHARED_LOSS = 1.15
SHARED_BYTES = 80  # a layer: Reshape, Mul, and its places in two Splits
DEPTHWISE_BLOCKS = (1, 3, 5, 7, 9, 25, 49)
SHORT_ROW = 32  # up to which numbers one by one are on offer


@dataclass(frozen=True)
class Estimate:
    """A form of a layer with what it is expected to cost.

    Attributes:
        form: See the module's text.
        size_bytes: Arrays in the file, without nodes and names.
        error: Relative squared error of the layer's output.
    """

    form: Form
    size_bytes: int
    error: float


@dataclass(frozen=True, eq=False)
class Tried:
    """A form of a layer carried out by a quick fit.

    Attributes:
        form: See the module's text.
        error: Relative squared error of the layer's output.
        decoded: (outputs, D) float32.
    """

    form: Form
    error: float
    decoded: np.ndarray


@dataclass(frozen=True, eq=False)
class Curve:
    """The forms of one layer, and some of them carried out.

    Attributes:
        estimates: "keep" first.
        middle: A form of about ``MIDDLE_BITS`` a weight.
        coarse: One of about ``COARSE_BITS``, where there is one that is well below.
    """

    estimates: list[Estimate]
    middle: Tried
    coarse: Tried | None = None


def form_text(form: Form) -> str:
    """A form as a table shows it."""
    if not isinstance(form, Choice):
        return form
    parts = [f"d={form.block} k={form.codewords}", "" if form.codebook_type == "float16" else form.codebook_type]
    parts += [name for name in ("scaled", "shared", "permuted") if getattr(form, name)]
    return " ".join(filter(None, parts))


def blocks_for(length: int, kernel: int = 1, *, depthwise: bool = False) -> list[int]:
    """The sub-vector lengths on offer for rows of D numbers; ``kernel`` is how many of them one input channel has."""
    if depthwise:
        return [block for block in (*DEPTHWISE_BLOCKS, length) if length % block == 0]
    found = {block for block in (*BLOCKS, kernel, 2 * kernel) if 2 <= block <= 32 and length % block == 0}
    if {6, 9, 18} <= found:
        found -= {8, 12, 16}  # rates that lie between those of their neighbours, which keep to whole kernels
    return sorted(found)


def codeword_counts(vectors: int) -> list[int]:
    """The codebook sizes on offer for so many sub-vectors."""
    return [size for size in CODEWORDS if MIN_VECTORS * size <= vectors]


def plain_estimates(weight: np.ndarray, moments: np.ndarray, stored_bytes: int) -> list[Estimate]:
    """Keep, float16 and int8, as far as they are smaller than what is stored."""
    found = [Estimate("keep", stored_bytes, 0.0)]
    spread = _spread(weight, moments)
    half = 2 * weight.size
    if half < stored_bytes:
        found.append(Estimate("float16", half, _energy(weight - to_float16(weight).decode(), moments) / spread))
    byte = weight.size + 4 * len(weight)
    if byte < stored_bytes:
        found.append(Estimate("int8", byte, _energy(weight - to_int8(weight).decode(), moments) / spread))
    return found


def estimate_forms(
    weight: np.ndarray,
    statistics: Statistics | None,
    *,
    stored_bytes: int,
    has_bias: bool,
    kernel: int = 1,
    depthwise: bool = False,
    swept: bool = True,
    scalable: bool = True,
    permutable: bool = False,
    seed: int = 0,
) -> Curve:
    """Estimate every form of a layer.

    Args:
        weight: (outputs, D) float32.
        statistics: Moments of its input in the float net; None where there are none.
        stored_bytes: What it takes now.
        has_bias: A bias comes with a codebook.
        kernel: Numbers of a row that belong to one input channel.
        depthwise: It is a kernel for each channel.
        swept: Whether the layer will be swept with error feedback.
        scalable: Whether factors of the output channels are on offer.
        permutable: Whether other orders of the input channels are.
        seed: Same seed, same estimates.

    Returns:
        The estimates and the middle form carried out.
    """
    moments = np.eye(weight.shape[1])[None] if statistics is None else covariance(statistics)
    estimates = plain_estimates(weight, moments, stored_bytes)
    fits = _Fits(weight, moments, seed)
    blocks = list(dict.fromkeys(blocks_for(weight.shape[1], kernel, depthwise=depthwise)))
    choices = [
        Choice(block, size)
        for block in blocks
        for size in codeword_counts(weight.size // block)
        if size_bytes(weight.shape, Choice(block, size), has_bias=has_bias) < estimates[-1].size_bytes
    ]
    if not choices:
        last = estimates[-1]
        return Curve(estimates, Tried(last.form, last.error, _plain_decoded(weight, last.form)))
    middle_choice = min(choices, key=lambda one: (abs(_bits(weight, one) - MIDDLE_BITS), one.block))
    kinds = (False, True) if scalable else (False,)
    tried = {kind: fits.whole(middle_choice, scaled=kind) for kind in kinds}
    lost = {kind: fits.lost(tried[kind]) for kind in kinds}
    gains = {kind: lost[kind][0] / lost[False][0] if lost[False][0] > 0 else 1.0 for kind in kinds}
    for fitted in _on_line(fits, choices, SHARED_CODEWORDS if scalable else ()):
        if fitted.form.shared:
            estimates.append(_shared_form(weight.shape, fitted, gains[True], has_bias))
            continue
        for kind in kinds:
            estimates.extend(_stored_forms(weight.shape, fitted, gains[kind], kind, has_bias))
    scaled = min(kinds, key=lambda kind: lost[kind][0]) if scalable else False
    form = replace(middle_choice, scaled=scaled)
    own = [one for one in estimates if isinstance(one.form, Choice) and not one.form.shared]
    finest = min(own, key=lambda one: one.error).form
    assert isinstance(finest, Choice), "filtered so"
    forms = [replace(finest, codebook_type="float16", scaled=scaled), form]
    coarse = min(choices, key=lambda one: (abs(_bits(weight, one) - COARSE_BITS), one.block))
    if _bits(weight, coarse) < _bits(weight, middle_choice) / 2:
        forms.append(replace(coarse, scaled=scaled))
    points, carried_out = [], {}
    for wanted in dict.fromkeys(forms):
        made = tried[scaled] if wanted == form else fits.whole(wanted, scaled=scaled)
        reached, decoded = fits.lost(made)
        if swept:
            reached, decoded = min((fits.lost(fits.swept(made)), (reached, decoded)), key=lambda one: one[0])
        on_line = next(one.error for one in estimates if one.form == wanted)
        points.append((on_line, reached / _spread(weight, moments)))
        carried_out[wanted] = Tried(wanted, points[-1][1], decoded)
    estimates = [
        replace(one, error=_corrected(one.error, points)) if isinstance(one.form, Choice) else one for one in estimates
    ]
    if permutable:
        estimates += _permuted_forms(fits, estimates, kernel, has_bias=has_bias, swept=swept)
    return Curve(estimates, carried_out[form], carried_out[forms[2]] if len(forms) > 2 else None)


def _permuted_forms(
    fits: _Fits, estimates: Sequence[Estimate], kernel: int, *, has_bias: bool, swept: bool
) -> list[Estimate]:
    """The forms with whole channels in a block, in an order found for one of them: what that gains, all are to gain."""
    shape = fits.weight.shape
    channels = shape[1] // kernel
    forms = [
        (one, one.form)
        for one in estimates
        if isinstance(one.form, Choice) and not one.form.shared and is_permutable(shape[1], kernel, one.form.block)
    ]
    if not forms or 8 * channels > MOST_ORDER_BITS * fits.weight.size:
        return []
    tried = min((form for _, form in forms), key=lambda form: (abs(_bits(fits.weight, form) - MIDDLE_BITS), form.block))
    columns = columns_of(find_order(fits.objective, tried.block, kernel), kernel)
    others = _Fits(fits.weight[:, columns], fits.moments[:, columns[:, None], columns], fits.seed)
    before, after = (
        each.lost(each.swept(made) if swept else made)[0]
        for each in (fits, others)
        for made in [each.whole(tried, scaled=tried.scaled)]
    )
    if not after < before:
        return []
    found = []
    for one, form in forms:
        asked = replace(form, permuted=True)
        size = size_bytes(shape, asked, has_bias=has_bias, kernel=kernel)
        found.append(Estimate(asked, size, one.error * after / before))
    return found


def _corrected(error: float, points: Sequence[tuple[float, float]]) -> float:
    """An error under block metrics as one under the full covariance: their ratio is log-linear between two points.

    Error feedback gains more where codewords are fine.

    Args:
        error: Under block metrics.
        points: (under block metrics, reached), of the forms that were carried out.
    """
    known = sorted(
        {math.log(line): math.log(reached / line) for line, reached in points if line > 0 and reached > 0}.items()
    )
    if error <= 0 or not known:
        return error
    x = math.log(error)
    if len(known) == 1:
        return error * math.exp(known[0][1])
    upper = next((i for i in range(1, len(known) - 1) if x < known[i][0]), len(known) - 1)
    (x0, y0), (x1, y1) = known[upper - 1], known[upper]
    return max(error * math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0)), 1e-3 * error)


@dataclass(frozen=True)
class _Fitted:
    """A codebook form under its block metrics."""

    form: Choice
    error: float  # relative, squared
    step: float  # what int8 codewords would add


def _stored_forms(
    shape: Sequence[int], fitted: _Fitted, gain: float, scaled: bool, has_bias: bool
) -> Iterable[Estimate]:
    for kind, added in (("float16", 0.0), ("int8", fitted.step)):
        choice = fitted.form
        form = Choice(choice.block, choice.codewords, kind, scaled)  # type: ignore[arg-type]  # both are literals
        yield Estimate(form, size_bytes(shape, form, has_bias=has_bias), fitted.error * gain + added)


def _shared_form(shape: Sequence[int], fitted: _Fitted, gain: float, has_bias: bool) -> Estimate:
    """A layer's part of a codebook for many: indices, factors, and what it adds to the file; not the codebook."""
    form = Choice(fitted.form.block, fitted.form.codewords, "int8", scaled=True, shared=True)
    outputs, length = shape
    indices = indices_size_bytes(outputs * (length // form.block), form.codewords)
    error = SHARED_LOSS * fitted.error * gain + fitted.step
    return Estimate(form, indices + outputs + 4 * outputs * has_bias, error)


def _on_line(fits: _Fits, choices: Sequence[Choice], shared: Sequence[int]) -> Iterable[_Fitted]:
    """Fit two codebook sizes for each block; the others, and those of shared codebooks, by log-linear interpolation."""
    for block in sorted({choice.block for choice in choices}):
        sizes = [choice.codewords for choice in choices if choice.block == block]
        small, large = (min(sizes, key=lambda size: abs(math.log(size / wanted))) for wanted in FITTED)
        ends = {size: fits.error(Choice(block, size)) for size in {small, large}}
        slope = -2.0 / block  # of a smooth density, where only one size could be fitted
        if small != large and min(ends[small][0], ends[large][0]) > 0:
            slope = math.log(ends[large][0] / ends[small][0]) / math.log(large / small)
        for size in sizes:
            error = ends[large][0] * (size / large) ** slope
            yield _Fitted(Choice(block, size), error, ends[large][1])
        for size in (
            shared if block > 1 else ()
        ):  # of few vectors, a codebook knows many by heart: no steeper than of a smooth density
            error = ends[large][0] * (size / large) ** max(slope, -2.0 / block)
            yield _Fitted(Choice(block, size, shared=True), error, ends[large][1])


class _Fits:
    """Quick fits on some rows of a layer."""

    def __init__(self, weight: np.ndarray, moments: np.ndarray, seed: int) -> None:
        self.weight, self.moments, self.seed = weight, moments, seed
        self.groups = len(moments)
        self.objective = damped_objective(weight, moments, damping=DAMPING)

    def _rows(self, choice: Choice) -> slice | np.ndarray:
        """Rows, the same number of every group, that give enough sub-vectors."""
        rows = self.objective.target.shape[1]
        wanted = max(SAMPLE, VECTORS_PER_CODEWORD * choice.codewords)
        count = -(-wanted * choice.block // (self.groups * self.objective.target.shape[2]))
        if count >= rows:
            return slice(None)
        return np.sort(np.argsort(np.random.PCG64(self.seed).random_raw(rows), kind="stable")[:count])

    def _start(self, vectors: np.ndarray, size: int) -> np.ndarray:
        """(size, d) of the vectors, drawn at random: as good as k-means++ for a ratio of errors, and free."""
        flat = vectors.reshape(-1, vectors.shape[2])
        return flat[np.argsort(np.random.PCG64(self.seed).random_raw(len(flat)), kind="stable")[:size]]

    def error(self, choice: Choice) -> tuple[float, float]:
        """Relative squared error under block metrics, and what int8 codewords would add to it."""
        ones = np.ones(self.objective.target.shape[:2], np.float32)
        metrics = self.objective.positions(choice.block)
        vectors = self.objective.vectors(choice.block, ones)[:, self._rows(choice)]
        found = cluster(
            vectors,
            metrics,
            choice.codewords,
            seed=self.seed,
            start=None if choice.block < RANDOM_START else self._start(vectors, choice.codewords),
            iterations=ITERATIONS,
            sample=1 << 30,
        )
        even = regularized(metrics)
        spread = float(np.einsum("snd,sde,sne->", vectors, even, vectors, optimize=True))
        steps = np.abs(found.codebook).max(axis=0) / 127
        rounding = vectors.shape[1] * float(np.einsum("sdd,d->", even, steps**2)) / 12
        if spread <= 0:
            return 0.0, 0.0
        return max(found.error, 0.0) / spread, rounding / spread

    def whole(self, choice: Choice, *, scaled: bool) -> Assignment:
        """A fit of all rows."""
        target = self.objective.target
        scales = row_scales(target) if scaled else np.ones(target.shape[:2], np.float32)
        weights = np.repeat(scales**2, target.shape[2] // choice.block, axis=0)
        vectors = self.objective.vectors(choice.block, scales)
        found = cluster(
            vectors,
            self.objective.positions(choice.block),
            choice.codewords,
            seed=self.seed,
            weights=weights,
            start=None if choice.block < RANDOM_START else self._start(vectors, choice.codewords),
            iterations=ITERATIONS,
            sample=max(SAMPLE, VECTORS_PER_CODEWORD * choice.codewords),
        )
        return Assignment(found.codebook, from_positions(found.indices, self.groups), scales)

    def swept(self, assignment: Assignment) -> Assignment:
        """The same codebook with indices chosen block after block, as the layer will have them in the end."""
        return sweep(self.objective, assignment.codebook, assignment.scales)

    def lost(self, assignment: Assignment) -> tuple[float, np.ndarray]:
        """The error under the full covariance, and the weight."""
        decoded = assignment.weight().reshape(self.weight.shape)
        return _energy(self.weight - decoded, self.moments), decoded


def _bits(weight: np.ndarray, choice: Choice) -> float:
    return 8 * size_bytes(weight.shape, choice, has_bias=False) / weight.size


def _plain_decoded(weight: np.ndarray, form: Form) -> np.ndarray:
    if form == "int8":
        return to_int8(weight).decode()
    return to_float16(weight).decode() if form == "float16" else weight


def _energy(lost: np.ndarray, moments: np.ndarray) -> float:
    """tr(E C E') of rows (outputs, D), group by group."""
    groups = len(moments)
    return max(energy(lost.astype(np.float64).reshape(groups, -1, lost.shape[1]), moments), 0.0)


def _spread(weight: np.ndarray, moments: np.ndarray) -> float:
    """tr(W C W'), 1 where it is 0: nothing is lost by a layer that gives nothing."""
    found = _energy(weight, moments)
    return found if found > 0 else 1.0
