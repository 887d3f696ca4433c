"""Values for a model's inputs, by what each input is used for.

Floats are signed and hold ties, exact zeros and negatives: uniform [0, 1) hides a MaxPool that pads with 0. Integers
stay inside what the nodes that read them accept.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxcompress.samples.recipes import RECIPES, Case, Request
from onnxcompress.samples.roles import Role
from onnxcompress.samples.sizes import InputShape, has_word, words_of

VARIANTS = ("signed", "small", "positive", "unit", "large")  # of float values, in the order in which they are tried
WORDS = ("alpha", "beta", "gamma delta", "Hello", "x1", "zero", "alpha", "2.5")
SPECIAL_SHARE = 0.05  # of the elements are set to numbers that the model compares with
SAMPLE_RATES = (16000, 8000)

_RATE = {"sr", "samplerate", "fs"}
_LENGTHS = {"len", "lens", "length", "lengths", "seqlens"}
_IDS = {"id", "ids", "token", "tokens", "labels", "label", "index", "indices", "idx"}
_COUNTS = {"num", "k", "topk", "steps", "count", "max", "n", "times", "size"}
_POSITIONS = {"position", "positions", "pos"}


def make_value(shape: InputShape, sizes: tuple[int, ...], role: Role, request: Request) -> Any:
    """One input: an array, a list of arrays for a sequence, a dict for a map, or None for an optional left empty."""
    rng = np.random.default_rng([request.seed, request.sample, zlib.crc32(shape.name.encode())])
    wraps = list(shape.wraps)
    if wraps[:1] == ["optional"]:
        wraps.pop(0)
        if request.sample % 2 and request.attempt % 2 == 0:
            return None
    if shape.elem_type == 0:
        return _map(shape.type, rng)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(shape.elem_type))
    if shape.elem_type == TensorProto.STRING:
        dtype = np.dtype(object)
    case = Case(shape.name, sizes, dtype, role, request, rng)
    for _ in wraps[1:]:
        raise TypeError(f"input {shape.name!r}: {' of '.join(shape.wraps)} has no tensors to make")
    count = 2 + request.sample % 2 if wraps else 1
    values = [np.asarray(_array(case)) for _ in range(count)]  # NumPy turns an array without axes into a scalar
    return values if wraps else values[0]


def near(default: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tensor like an input's default: floats 1 % off, everything else as it is."""
    if default.dtype.kind not in "fV" or default.dtype.names:
        return default
    scale = 1 + 0.01 * rng.standard_normal(default.shape)
    return np.asarray((default.astype(np.float64) * scale).astype(default.dtype))


def _map(kind: onnx.TypeProto, rng: np.random.Generator) -> dict[Any, Any]:
    map_type = kind.map_type
    text = map_type.key_type == TensorProto.STRING
    dtype = onnx.helper.tensor_dtype_to_np_dtype(map_type.value_type.tensor_type.elem_type)
    keys = list("abcd") if text else [0, 1, 2, 3]
    values = np.round(rng.standard_normal(len(keys)) * 4) / 2
    return {key: value.astype(dtype).item() for key, value in zip(keys, values, strict=True)}


def _array(case: Case) -> np.ndarray:
    dtype = case.dtype
    if dtype == np.dtype(object):
        words = np.array(WORDS[: 3 + case.request.sample] + WORDS[3:], dtype=object)
        return np.asarray(case.rng.choice(words, case.shape), dtype=object).reshape(case.shape)
    if dtype.kind == "b":
        return _flags(case).astype(bool).reshape(case.shape)
    if dtype.kind == "c":
        return np.asarray(_floats(case) + 1j * _floats(case)).astype(dtype)
    special = _by_role(case)
    if special is None:
        special = _by_name(case)
    if special is None:
        special = _integers(case) if _is_integer(dtype) else _floats(case)
    return _cast(np.asarray(special), dtype).reshape(case.shape)


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iu" or dtype.name in ("int2", "uint2", "int4", "uint4")


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return int(info.min), int(info.max)
    bits = int(dtype.name[-1])  # int4, uint2: no NumPy types
    return (0, (1 << bits) - 1) if dtype.name.startswith("u") else (-(1 << bits - 1), (1 << bits - 1) - 1)


def _cast(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    return np.clip(values, *_limits(dtype)).astype(dtype) if _is_integer(dtype) else values.astype(dtype)


def _floats(case: Case) -> np.ndarray:
    """Normal values, half of them rounded to multiples of 0.5, so that there are ties and zeros.

    Every other sample leans to the negative side, where the maximum of a small window is below 0 now and then.
    """
    rng, variant = case.rng, case.request.variant
    values = rng.standard_normal(case.shape) - 0.5 * (case.request.sample % 2)
    if variant == "unit":
        return rng.random(case.shape)
    values = np.where(rng.random(case.shape) < 0.5, np.round(values * 2) / 2, values) + 0.0  # + 0.0: no -0.0
    flat = values.reshape(-1)
    if flat.size >= 4:
        flat[rng.choice(flat.size, 4, replace=False)] = (0.0, -1.0, -1.0, 1.5)
    _sprinkle(case, flat)
    if variant in ("small", "large"):
        values = values * (0.1 if variant == "small" else 10)
    return np.abs(values) + 0.1 if variant == "positive" else values


def _sprinkle(case: Case, flat: np.ndarray) -> None:
    """Put in some of the numbers that the model compares with: there, Less and LessOrEqual differ."""
    specials = case.role.specials
    if specials and flat.size:
        places = np.flatnonzero(case.rng.random(flat.size) < SPECIAL_SHARE)
        if places.size == 0:
            places = case.rng.integers(0, flat.size, 1)
        flat[places] = case.rng.choice(specials, places.size)


def _special(case: Case) -> float:
    """One of the numbers that the model compares with, or one that is none of them: by sample."""
    specials = list(dict.fromkeys(case.role.specials))
    choices = [*specials, max(specials) + 1]
    return choices[case.request.sample % len(choices)]


def _integers(case: Case) -> np.ndarray:
    """Whole numbers without a restriction: all of an 8-bit type, a few signed ones of a wider type."""
    low, high = _limits(case.dtype)
    if high - low < 256 and case.request.attempt % 4 == 0:
        return case.rng.integers(low, high + 1, case.shape)
    if case.count == 1 and case.role.specials:
        return np.full(case.shape, _special(case))
    plain = has_word(case.name, _IDS) or case.role.opaque
    bottom, top = ((0, 9) if plain else (-4, 5), (0, 4), (0, 1), (1, 1))[case.request.attempt % 4]
    values = case.rng.integers(max(bottom, low), top + 1, case.shape)
    _sprinkle(case, values.reshape(-1))
    return values


def _flags(case: Case) -> np.ndarray:
    if case.role.kind == "inference":
        return np.zeros(case.shape)
    if case.count == 1:
        return np.full(case.shape, case.request.sample % 2 == 0)
    if has_word(case.name, {"mask"}):
        return _mask(case)
    return np.asarray(case.rng.permutation(np.arange(case.count) % 2 == 0))


def _mask(case: Case) -> np.ndarray:
    """Ones; zeros at the end of every row but the first, and of a single row from the second sample on."""
    mask = np.ones(case.shape)
    length = case.shape[-1] if case.shape else 1
    rows = mask.reshape(-1, length) if mask.size else mask
    if length >= 2 and mask.size:
        padded = max(1, length // 4)
        rows[1 if len(rows) > 1 or case.request.sample == 0 else 0 :, length - padded :] = 0
    return mask


def _by_name(case: Case) -> np.ndarray | None:
    """What the name says, where no node says more."""
    words = words_of(case.name)
    integer = _is_integer(case.dtype)
    if "mask" in words and _POSITIONS.isdisjoint(words) and (integer or len(case.shape) <= 2):
        return _mask(case)
    if case.count == 1 and (not _RATE.isdisjoint(words) or {"sample", "rate"} <= set(words) or "sampling" in words):
        rates = [rate for rate in SAMPLE_RATES if not integer or rate <= _limits(case.dtype)[1]] or [8]
        return np.full(case.shape, rates[case.request.sample % len(rates)])
    if not integer:
        return None
    if words[-1:] and words[-1] in _LENGTHS:
        return _lengths(case, max(1, case.request.length))
    if {"token", "type"} <= set(words) or "segment" in words:
        return np.zeros(case.shape)
    if not _POSITIONS.isdisjoint(words) and case.shape:
        return np.broadcast_to(np.arange(case.shape[-1]), case.shape)
    if case.count == 1 and not _COUNTS.isdisjoint(words) and not case.role.specials:
        return np.full(case.shape, 2 + case.request.sample)
    return None


def _by_role(case: Case) -> np.ndarray | None:
    """What the nodes that read the input accept; None where they accept anything."""
    role = case.role
    if role.kind == "index":
        return _indices(case)
    if role.kind == "length":
        sizes = [d for d in case.dims(tuple(role.lengths)) or [] if d > 0]
        return _lengths(case, min(sizes, default=max(1, case.request.length)))
    recipe = _divisor if role.kind == "divisor" else RECIPES.get(role.kind)
    values = None if recipe is None else recipe(case)
    interval = role.interval(case.request.sizes)
    return values if values is None or interval is None else np.clip(values, *interval)


def _indices(case: Case) -> np.ndarray:
    low, high = case.role.interval(case.request.sizes) or (0, 1)
    words = set(words_of(case.name))
    if "mask" in words and words.isdisjoint(_POSITIONS):
        return np.asarray(np.clip(_mask(case), low, high))
    kinds = "segment" in words or {"token", "type"} <= words
    if kinds and (case.request.sample == 0 or high < 1):
        return np.full(case.shape, low)
    if not words.isdisjoint(_POSITIONS) and case.shape:
        return low + np.broadcast_to(np.arange(case.shape[-1]), case.shape) % (high - low + 1)
    values: np.ndarray = case.rng.integers(low, high + 1, case.shape)
    if values.size >= 2:
        values.reshape(-1)[case.rng.choice(values.size, 2, replace=False)] = (high, low)  # both ends occur
    elif case.role.specials:
        values[...] = np.clip(_special(case), low, high)
    return values


def _lengths(case: Case, longest: int) -> np.ndarray:
    """Full length first, shorter ones after it; a single length is shorter from the second sample on."""
    values = case.rng.integers(max(1, longest // 2), longest + 1, case.shape)
    if values.size:
        values.reshape(-1)[0] = longest if case.request.sample == 0 or values.size > 1 else max(1, longest // 2)
    return values


def _divisor(case: Case) -> np.ndarray:
    """Signed, and nowhere 0."""
    values = _integers(case) if _is_integer(case.dtype) else _floats(case)
    return np.where(values == 0, 2, values)
