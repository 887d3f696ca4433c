"""How far the outputs of two models are apart.

Floats by max|d| / max|y|, one number for each output; integers, booleans and strings by the share of elements that
differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

PERTURBATION = 1e-6
MAX_CLASSES = 1_000_000  # a last axis longer than this is no list of classes


@dataclass(frozen=True)
class Difference:
    """One output of two models, over all feeds the worst.

    Attributes:
        name: The output.
        max_abs: max|d| over finite elements.
        relative: max|d| / max|y| of one feed; max|d| where every y is 0.
        mismatches: Share of integers, booleans or strings that differ.
        cosine: Cosine similarity of the flattened floats, the smallest; None where it is not defined.
        agreement: Share of rows along the last axis with their maximum at the same place; None without such rows.
        problem: What no tolerance covers; None when there is nothing of the kind.
        problem_kind: "type", "shape" (also the length of a sequence, the keys of a map), or "values": NaN and infinity
            at other places.
        ulp: Relative step of the output's float type, when that is coarse: float16 cannot be compared more finely.
        allowed: Limit for ``relative`` and ``mismatches``.
        reason: Where ``allowed`` comes from, when it is not the tolerance.
        unchecked: Why the values were not compared (the model is random); None when they were.
    """

    name: str
    max_abs: float = 0.0
    relative: float = 0.0
    mismatches: float = 0.0
    cosine: float | None = None
    agreement: float | None = None
    problem: str | None = None
    problem_kind: str | None = None
    ulp: float = 0.0
    allowed: float = 0.0
    reason: str | None = None
    unchecked: str | None = None

    @property
    def error(self) -> float:
        """The figure that is compared with ``allowed``."""
        return max(self.relative, self.mismatches)

    @property
    def equivalent(self) -> bool:
        """Whether the output is as it should be."""
        return self.problem is None and (self.unchecked is not None or self.error <= self.allowed)

    def text(self) -> str:
        """The figure with its limit, as a message has it."""
        if self.problem is not None:
            return f"output {self.name!r}: {self.problem}"
        figure = f"max|d| / max|y| = {self.relative:.1e}"
        if self.mismatches > self.relative:
            figure = f"{self.mismatches:.2%} of the elements differ"
        limit = f"{self.allowed:.2%}" if self.mismatches > self.relative else f"{self.allowed:.0e}"
        return f"output {self.name!r}: {figure}, allowed {limit}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Comparison:
    """All outputs of two models.

    Attributes:
        outputs: One entry for each output of the reference.
        tolerance: What was asked for.
        feeds: How many inputs were compared.
        failure: Why the candidate gave no outputs; None when it did.
    """

    outputs: list[Difference] = field(default_factory=list)
    tolerance: float = 0.0
    feeds: int = 0
    failure: str | None = None

    @property
    def equivalent(self) -> bool:
        """Whether every output is within what is allowed."""
        return self.failure is None and all(output.equivalent for output in self.outputs)

    @property
    def worst(self) -> Difference | None:
        """The output that says most: one with a problem, or the one nearest to its limit or furthest beyond it."""
        return max(self.outputs, key=lambda o: (not o.equivalent, o.problem is not None, o.error), default=None)

    @property
    def relative(self) -> float:
        """The largest max|d| / max|y| of any output."""
        return max((output.relative for output in self.outputs), default=0.0)

    def message(self) -> str:
        """One line: the worst output against its limit."""
        if self.failure is not None:
            return self.failure
        worst = self.worst
        if worst is None:
            return "no outputs to compare"
        wrong = sum(not output.equivalent for output in self.outputs)
        if wrong:
            return worst.text() + (f"; {wrong - 1} more of {len(self.outputs)} outputs differ" if wrong > 1 else "")
        inputs = f"{self.feeds} input{'s' if self.feeds != 1 else ''}"
        unchecked = [output for output in self.outputs if output.unchecked is not None]
        note = f"; {len(unchecked)} compared by shape only: {unchecked[0].unchecked}" if unchecked else ""
        if len(unchecked) == len(self.outputs):
            return f"equivalent over {inputs}, by shape only: {unchecked[0].unchecked}"
        return f"equivalent over {inputs}: {worst.text()}{note}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "equivalent": self.equivalent,
            "summary": self.message(),
            "tolerance": self.tolerance,
            "feeds": self.feeds,
            "failure": self.failure,
            "outputs": [{**asdict(output), "equivalent": output.equivalent} for output in self.outputs],
        }


def difference(name: str, reference: Any, candidate: Any) -> Difference:
    """Compare one output of one run: a tensor, a sequence, a map, a scalar of these, or an empty optional."""
    if isinstance(reference, Mapping) and isinstance(candidate, Mapping):
        if list(reference) != list(candidate):
            return _problem(name, "shape", f"keys {_few(candidate)}, expected {_few(reference)}")
        return worse([difference(name, reference[key], candidate[key]) for key in reference], name)
    if isinstance(reference, (list, tuple)) and isinstance(candidate, (list, tuple)):
        if len(reference) != len(candidate):
            return _problem(name, "shape", f"a sequence of {len(candidate)}, expected {len(reference)}")
        return worse([difference(name, a, b) for a, b in zip(reference, candidate, strict=True)], name)
    if reference is None and candidate is None:
        return Difference(name)
    if _kind(reference) != "a tensor" or _kind(candidate) != "a tensor":
        return _problem(name, "type", f"{_kind(candidate)}, expected {_kind(reference)}")
    return _tensors(name, _array(reference), _array(candidate))


def _problem(name: str, kind: str, text: str) -> Difference:
    return Difference(name, problem=text, problem_kind=kind)


def _array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(object) if array.dtype.kind in "US" else array


def _few(keys: Mapping[Any, Any]) -> str:
    shown = [repr(key) for key in keys]
    return ", ".join([*shown[:3], f"... ({len(shown)})"] if len(shown) > 3 else shown)


def _kind(value: Any) -> str:
    if value is None:
        return "an empty optional"
    return "a map" if isinstance(value, Mapping) else "a sequence" if isinstance(value, (list, tuple)) else "a tensor"


def worse(differences: Sequence[Difference], name: str) -> Difference:
    """The worst of every figure: over the items of a sequence, or over feeds."""
    found = [d.cosine for d in differences if d.cosine is not None]
    agreements = [d.agreement for d in differences if d.agreement is not None]
    broken = next((d for d in differences if d.problem is not None), Difference(name))
    return Difference(
        name,
        max((d.max_abs for d in differences), default=0.0),
        max((d.relative for d in differences), default=0.0),
        max((d.mismatches for d in differences), default=0.0),
        min(found, default=None),
        min(agreements, default=None),
        broken.problem,
        broken.problem_kind,
        max((d.ulp for d in differences), default=0.0),
    )


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a type is compared with a tolerance: NumPy's floats and complex numbers, bfloat16, float8, float4."""
    return dtype.kind in "fc" or (dtype.kind == "V" and "float" in dtype.name)


def coarse_ulp(dtype: np.dtype[Any]) -> float:
    """The relative step of a float type with less than 32 bits; 0 for finer types."""
    finfo: Any = ml_dtypes.finfo  # without annotations
    return float(finfo(dtype).eps) if is_float(dtype) and dtype.itemsize < 4 else 0.0


def weakness(outputs: Sequence[Any]) -> str | None:
    """Why a comparison of these outputs would say little: nothing finite, or nothing that varies."""
    arrays = [array for array in arrays_of(outputs) if array.dtype != object and array.dtype.kind != "c"]
    if not arrays:
        return None
    if all(array.size == 0 for array in arrays):
        return "every output is empty"
    floats = [array.astype(np.float64) for array in arrays if array.dtype.kind in "fV"]
    if floats and not any(np.isfinite(array).all() and array.size for array in floats):
        return "no output is finite"
    varied = [array for array in arrays if array.size > 1]
    if varied and all((array == array.reshape(-1)[0]).all() for array in varied):
        return "every output is constant"
    return None


def arrays_of(values: Any) -> Iterator[np.ndarray]:
    """The tensors in a value, also of sequences and maps."""
    if isinstance(values, np.ndarray):
        yield values
    elif isinstance(values, dict):
        yield from arrays_of([np.array(list(values.values()))])
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from arrays_of(value)


def perturbed(feed: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A feed with every float off by 1e-6 of itself, up or down, or by one step where its type is coarser."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if not isinstance(value, np.ndarray) or not is_float(value.dtype) or value.dtype.kind == "c":
            return value
        step = max(PERTURBATION, coarse_ulp(value.dtype))
        signs = rng.choice([-1.0, 1.0], value.shape)
        return np.asarray((value.astype(np.float64) * (1 + step * signs)).astype(value.dtype))

    return {name: move(value) for name, value in feed.items()}


def _tensors(name: str, reference: np.ndarray, candidate: np.ndarray) -> Difference:
    if reference.dtype != candidate.dtype:
        return _problem(name, "type", f"type {_type(candidate)}, expected {_type(reference)}")
    if reference.shape != candidate.shape:
        return _problem(name, "shape", f"shape {_sizes(candidate)}, expected {_sizes(reference)}")
    if not is_float(reference.dtype):
        differing = reference != candidate
        return Difference(name, mismatches=float(np.mean(differing)) if reference.size else 0.0)
    wide = np.complex128 if reference.dtype.kind == "c" else np.float64
    return _floats(Difference(name, ulp=coarse_ulp(reference.dtype)), reference.astype(wide), candidate.astype(wide))


def _floats(base: Difference, y: np.ndarray, other: np.ndarray) -> Difference:
    finite = np.isfinite(y) & np.isfinite(other)
    if not finite.all():
        # NaN equals NaN, and infinity the infinity of the same sign.
        same = (np.isnan(y) & np.isnan(other)) | (y == other) | finite
        if not same.all():
            place = np.unravel_index(int(np.argmin(same)), same.shape)
            count, at = int((~same).sum()), [int(i) for i in place]
            text = f"{count} of {y.size} elements: {other[place]} at {at}, expected {y[place]}"
            return replace(base, problem=text, problem_kind="values")
    agreement = _agreement(y, other)
    if not finite.all():
        y, other = y[finite], other[finite]
    if y.size == 0:
        return replace(base, agreement=agreement)
    largest = float(np.max(np.abs(y - other)))
    scale = float(np.max(np.abs(y)))
    norms = float(np.linalg.norm(y) * np.linalg.norm(other))
    cosine = float(np.abs(np.vdot(y, other)) if y.dtype.kind == "c" else np.vdot(y, other)) / norms if norms else None
    relative = largest / scale if scale else largest
    return replace(base, max_abs=largest, relative=relative, cosine=cosine, agreement=agreement)


def _agreement(y: np.ndarray, other: np.ndarray) -> float | None:
    if y.ndim < 2 or not 2 <= y.shape[-1] <= MAX_CLASSES or y.size == 0 or y.dtype.kind == "c":
        return None
    return float(np.mean(np.argmax(y, axis=-1) == np.argmax(other, axis=-1)))


def _type(array: np.ndarray) -> str:
    return "string" if array.dtype == object else array.dtype.name


def _sizes(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape)) or "scalar"
