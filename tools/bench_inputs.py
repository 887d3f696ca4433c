"""Seeded model inputs: from the specs of a corpus manifest, or made up from the model's own input types.

A spec is ``{"shape": [...], "dtype": "float32", "dist": NAME, ...}``:

    normal   mean, std, optional clip to low / high      randint  low (included) to high (excluded)
    const    value                                       audio    decaying tones plus noise, amplitude amp
    halved   value or half of it, drawn per element; half of it when there is one element only
    image    smooth 1/f picture scaled to low / high, layout "nchw" or "nhwc"
    text     dark glyph-like boxes on a light page, scaled to low / high, NCHW
    grid     multiples of 1/64 around zero: signed, with ties and exact zeros (for models without a spec)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Spec = Mapping[str, Any]
Specs = Mapping[str, Spec]
Dims = Sequence[int | str | None]
Array = np.ndarray[Any, Any]

SAMPLE_RATE_HZ = 16000
# Sizes that a symbolic dimension gets when nothing is known about it.
DEFAULT_BATCH, DEFAULT_PIXELS, DEFAULT_LENGTH = 1, 224, 16
GENERIC_INTEGER_HIGH = 8  # small enough to be an index into most tables
INTEGER_TYPES = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
FLOAT_TYPES = {"float": "float32", "double": "float64", "float16": "float16"}


def _normal(rng: np.random.Generator, spec: Spec, shape: Sequence[int]) -> Array:
    values: Array = rng.normal(spec.get("mean", 0.0), spec.get("std", 1.0), shape)
    return values.clip(spec.get("low", -np.inf), spec.get("high", np.inf))


def _randint(rng: np.random.Generator, spec: Spec, shape: Sequence[int]) -> Array:
    return rng.integers(spec.get("low", 0), spec["high"], shape)


def _const(rng: np.random.Generator, spec: Spec, shape: Sequence[int]) -> Array:
    return np.full(shape, spec["value"])


def _halved(rng: np.random.Generator, spec: Spec, shape: Sequence[int]) -> Array:
    half = spec["value"] // 2
    return np.full(shape, half) if np.prod(shape) == 1 else rng.choice([spec["value"], half], shape)


def _grid(rng: np.random.Generator, spec: Spec, shape: Sequence[int]) -> Array:
    return np.round(rng.normal(0, 1, shape) * 64) / 64


def _rescale(values: Array, spec: Spec) -> Array:
    """Stretch every sample (the leading axis) over the spec's range, [0, 1] by default."""
    low, high = float(spec.get("low", 0.0)), float(spec.get("high", 1.0))
    axes = tuple(range(1, values.ndim))
    floor, span = values.min(axes, keepdims=True), np.ptp(values, axes, keepdims=True)
    return low + (values - floor) / np.maximum(span, 1e-12) * (high - low)


def _image(rng: np.random.Generator, spec: Spec, shape: Sequence[int]) -> Array:
    """White noise through a 1/f filter, the spectrum of natural pictures, with channels that resemble each other."""
    nhwc = spec.get("layout", "nchw") == "nhwc"
    count, channels, height, width = (shape[i] for i in ((0, 3, 1, 2) if nhwc else (0, 1, 2, 3)))
    noise = rng.normal(size=(count, 1, height, width)) + 0.5 * rng.normal(size=(count, channels, height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # the mean comes from the rescaling
    picture: Array = _rescale(np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width)), spec)
    return picture.transpose(0, 2, 3, 1) if nhwc else picture


def _text(rng: np.random.Generator, spec: Spec, shape: Sequence[int]) -> Array:
    """Lines of words of random 7 x 5 dot patterns; a low picture holds one line that fills its height."""
    count, _, height, width = shape
    page = np.ones((count, height, width))
    dot = max(1, min(height // 9, 4))
    for ink in page:
        for top in range(dot, height - 7 * dot + 1, 11 * dot):
            for left in range(2 * dot, width - 5 * dot + 1, 6 * dot):
                if rng.random() < 0.15:
                    continue  # between two words
                glyph = np.kron(rng.random((7, 5)) < 0.5, np.ones((dot, dot)))
                ink[top : top + 7 * dot, left : left + 5 * dot] -= glyph * rng.uniform(0.7, 1.0)
    grainy = page[:, None] + rng.normal(0, 0.01, shape)
    low, high = float(spec.get("low", 0.0)), float(spec.get("high", 1.0))
    return low + np.clip(grainy, 0, 1) * (high - low)


def _audio(rng: np.random.Generator, spec: Spec, shape: Sequence[int]) -> Array:
    """Along the last axis: four tones between 80 and 1,800 Hz, each fading at its own pace, under noise at -30 dB."""
    rows = int(np.prod(shape[:-1]))
    time_s = np.arange(shape[-1]) / SAMPLE_RATE_HZ
    tone, fade = rng.uniform(80, 1800, (rows, 4, 1)), rng.uniform(0, 2, (rows, 4, 1))
    phase, level = rng.uniform(0, 2 * np.pi, (rows, 4, 1)), rng.uniform(0.1, 0.5, (rows, 4, 1))
    sound = (level * np.sin(2 * np.pi * tone * time_s + phase) * np.exp(-fade * time_s)).sum(axis=1)
    sound += rng.normal(0, 0.03 * np.abs(sound).max(), sound.shape)
    sound *= float(spec.get("amp", 0.5)) / np.abs(sound).max()
    return sound.reshape(shape)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, Spec, Sequence[int]], Array]] = {
    "normal": _normal,
    "randint": _randint,
    "const": _const,
    "halved": _halved,
    "image": _image,
    "text": _text,
    "audio": _audio,
    "grid": _grid,
}


def make_inputs(specs: Specs, seed: int) -> dict[str, Array]:
    """Arrays for every spec. Each input has a stream of its own, so that one more input does not move the others."""
    arrays = {}
    for name, spec in specs.items():
        kind = spec.get("dist", "normal")
        if kind not in DISTRIBUTIONS:
            raise ValueError(f"input {name!r}: unknown distribution {kind!r}, known are {', '.join(DISTRIBUTIONS)}")
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = DISTRIBUTIONS[kind](rng, spec, list(spec["shape"]))
        values = np.ascontiguousarray(values.astype(spec.get("dtype", "float32")))
        arrays[name] = values.reshape(spec["shape"])  # last, because ascontiguousarray gives a scalar an axis
    return arrays


def generic_specs(inputs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Specs for a model without a manifest entry, from ``interface_of(model)["inputs"]``."""
    specs: dict[str, dict[str, Any]] = {}
    for value in inputs:
        dims, kind = value["dims"], value["type"]
        if dims is None:
            raise ValueError(f"input {value['name']!r} ({kind}) states no shape; give the model an entry in a manifest")
        pixels = len(dims) == 4
        shape = []
        for axis, dim in enumerate(dims):
            default = DEFAULT_BATCH if axis == 0 else (DEFAULT_PIXELS if pixels and axis >= 2 else DEFAULT_LENGTH)
            shape.append(dim if isinstance(dim, int) else default)
        if kind in FLOAT_TYPES:
            specs[value["name"]] = {"shape": shape, "dtype": FLOAT_TYPES[kind], "dist": "grid"}
        elif kind in INTEGER_TYPES or kind == "bool":
            high = 2 if kind == "bool" else GENERIC_INTEGER_HIGH
            specs[value["name"]] = {"shape": shape, "dtype": kind, "dist": "randint", "high": high}
        else:
            raise ValueError(
                f"input {value['name']!r}: no values for type {kind}; give the model an entry in a manifest"
            )
    return specs


def _with_other_constants(specs: Specs) -> dict[str, Spec]:
    return {
        name: {**spec, "dist": "halved"} if spec.get("dist") == "const" and "int" in spec.get("dtype", "") else spec
        for name, spec in specs.items()
    }


def _resized(specs: Specs, dims: Mapping[str, Dims], grow: Callable[[str, int], int | None]) -> dict[str, Spec]:
    """Specs with ``grow(key, size)`` at each axis that is not fixed.

    ``key`` is the symbol of the axis; unstated axes of equal size are taken for the same thing.
    """
    resized: dict[str, Spec] = {}
    for name, spec in specs.items():
        shape = list(spec["shape"])
        stated = dims.get(name) or [None] * len(shape)
        for axis, (dim, size) in enumerate(zip(stated, shape, strict=True)):
            if not isinstance(dim, int):
                shape[axis] = grow(dim or f"unstated {size}", size) or size
        resized[name] = {**spec, "shape": shape}
    return resized


def cases(specs: Specs, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs that judge a model: two seeds, a larger batch, larger other sizes, half of them with other constants.

    Constant integers are switches and masks, so that one value of them shows one branch of the model. A case that the
    original cannot run (a symbol that stands for one size only) is dropped later, by trying it.
    """
    dims: dict[str, Dims] = {value["name"]: value["dims"] or () for value in inputs}
    batch = {
        own[0] or f"unstated {specs[name]['shape'][0]}"
        for name, own in dims.items()
        if name in specs and own and not isinstance(own[0], int)
    }

    def larger_batch(key: str, size: int) -> int | None:
        return size + 1 if key in batch else None

    def larger_rest(key: str, size: int) -> int | None:
        # Stay on the network's grid: the largest power of two in the size, 32 at most.
        return None if key in batch else size + min(size & -size, 32)

    def half_rest(key: str, size: int) -> int | None:
        return None if key in batch or size % 2 else size // 2

    variants = [("seed 0", 0, dict(specs)), ("seed 1", 1, dict(specs))]
    for label, seed, own, grow in [
        ("larger batch", 2, specs, larger_batch),
        ("larger size", 3, specs, larger_rest),
        ("half", 4, _with_other_constants(specs), half_rest),
    ]:
        resized = _resized(own, dims, grow)
        if resized != specs:
            variants.append((label, seed, resized))
    return [{"label": label, "seed": seed, "specs": own} for label, seed, own in variants]
