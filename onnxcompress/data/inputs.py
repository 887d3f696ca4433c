"""What a model's inputs take, and how an array or an image becomes one.

Floats are cast to the input's float type, integers to its integer type when every value fits, uint8 images are
normalized for a float input. Any other difference in type or shape, and any NaN, is a DataError.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxcompress.errors import DataError, RecipeError

Dim = int | str | None

CHANNEL_COUNTS = {"rgb": 3, "bgr": 3, "gray": 1}


@dataclass(frozen=True)
class InputSpec:
    """One input of a model: ``shape`` as in the file, where an open dimension is a name, None, or below 1."""

    name: str
    dtype: np.dtype
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        shape = tuple(None if isinstance(dim, int) and dim < 1 else dim for dim in self.shape)
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes an input; None is read off the input's shape.

    The image is resized (bilinear) to cover ``size`` and cut at its centre, or stretched to it; then pixels become
    ``(pixel / scale - mean) / std``, or stay as they are when the input is of an integer type.

    Args:
        size: Height and width.
        layout: "nchw" or "nhwc".
        mean: One number, or one per channel, in the order of ``channels``; likewise ``std``.
        scale: Divisor of the 8-bit pixel value.
        crop: "center" or "stretch".
        channels: "rgb", "bgr" or "gray".

    Raises:
        RecipeError: A value is not one of these.
    """

    size: tuple[int, int] | None = None
    layout: str | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0
    crop: str = "center"
    channels: str | None = None

    def __post_init__(self) -> None:
        for key, value, known in (
            ("layout", self.layout, (None, "nchw", "nhwc")),
            ("crop", self.crop, ("center", "stretch")),
            ("channels", self.channels, (None, *CHANNEL_COUNTS)),
        ):
            if value not in known:
                raise RecipeError(f"preprocess {key}={value}: must be one of {', '.join(k for k in known if k)}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise RecipeError(f"preprocess size={self.size}: height and width must be at least 1")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise RecipeError(f"preprocess scale={self.scale}: must be greater than 0")
        if not all(map(math.isfinite, self.mean)) or not all(math.isfinite(s) and s > 0 for s in self.std):
            raise RecipeError(f"preprocess mean={self.mean}, std={self.std}: mean must be finite, std greater than 0")

    @classmethod
    def parse(cls, text: str) -> "Preprocess":
        """Read ``size=224,layout=nchw,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,scale=255,crop=center``.

        ``size`` is one number or HEIGHTxWIDTH; every setting may be left out.

        Raises:
            RecipeError: A setting is unknown, given twice, or has no such value.
        """
        settings: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = (word.strip() for word in part.partition("="))
            if key not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                raise RecipeError(f"preprocess {text!r}: unknown setting {key!r}; known are {known}")
            if key in settings:
                raise RecipeError(f"preprocess {text!r}: {key} is given twice")
            try:
                settings[key] = _PREPROCESS_READERS.get(key, str)(value)
            except ValueError as error:
                raise RecipeError(f"preprocess {text!r}: {value!r} is no value for {key}") from error
        return cls(**settings)

    def for_input(self, spec: InputSpec) -> "Preprocess":
        """Fill in layout, channels, and where the input fixes it the size.

        Raises:
            RecipeError: A setting contradicts the input, or the input is no image.
        """
        if len(spec.shape) != 4:
            raise RecipeError(f"{describe(spec)} takes no images: these need (N, C, H, W) or (N, H, W, C)")
        layout = self.layout or _layout(spec.shape)
        depth, *size = (spec.shape[axis] for axis in ((1, 2, 3) if layout == "nchw" else (3, 1, 2)))
        channels = self.channels or ("gray" if depth == 1 else "rgb")
        count = CHANNEL_COUNTS[channels]
        if not fits((count,), (depth,)):
            raise RecipeError(
                f"{describe(spec)}: {depth} channels in layout {layout}, channels={channels} gives {count}"
            )
        if self.size is not None and not fits(self.size, size):
            raise RecipeError(f"{describe(spec)} does not take size={self.size[0]}x{self.size[1]}: leave size out")
        if len(self.mean) not in (1, count) or len(self.std) not in (1, count):
            raise RecipeError(
                f"preprocess mean has {len(self.mean)} values and std {len(self.std)}: "
                f"1 or {count} are needed for channels={channels}"
            )
        if spec.dtype.kind != "f" and (self.mean, self.std) != ((0.0,), (1.0,)):
            raise RecipeError(f"{describe(spec)} is {spec.dtype} and takes plain pixels: leave mean and std out")
        fixed = tuple(dim for dim in size if isinstance(dim, int))
        return replace(self, layout=layout, channels=channels, size=self.size or (fixed if len(fixed) == 2 else None))

    def normalize(self, pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Turn uint8 (C, H, W) or (H, W, C), as in ``layout``, into ``dtype``."""
        if dtype.kind != "f":
            return pixels.astype(dtype)
        shape = (-1, 1, 1) if self.layout == "nchw" else (-1,)
        mean, std = (np.asarray(v, np.float32).reshape(shape) for v in (self.mean, self.std))
        normalized: np.ndarray = (pixels.astype(np.float32) / np.float32(self.scale) - mean) / std
        return normalized.astype(dtype)


def _read_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return int(height), int(width or height)


def _read_floats(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(":"))


_PREPROCESS_READERS: dict[str, Callable[[str], Any]] = {
    "size": _read_size,
    "mean": _read_floats,
    "std": _read_floats,
    "scale": float,
}


@dataclass(frozen=True)
class Target:
    """What the model takes."""

    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess | None

    @property
    def whole(self) -> bool:
        """Whether the inputs share no batch axis, so that a sample is a complete feed."""
        if any(not spec.shape for spec in self.inputs) or all(len(spec.shape) == 1 for spec in self.inputs):
            return True
        first = {spec.shape[0] for spec in self.inputs}
        return len(first) > 1 and any(isinstance(dim, int) for dim in first)

    @property
    def batch(self) -> int | None:
        """The batch size when the model fixes it."""
        dim = None if self.whole else self.inputs[0].shape[0]
        return dim if isinstance(dim, int) else None

    def sample_shape(self, spec: InputSpec) -> tuple[Dim, ...]:
        """The shape of one sample, without the batch axis."""
        return spec.shape if self.whole else spec.shape[1:]

    def only_input(self, source: str) -> InputSpec:
        """The one input of a model that has one; ``source`` can feed no more."""
        if len(self.inputs) != 1:
            names = ", ".join(spec.name for spec in self.inputs)
            raise DataError(f"{source} feeds one input, the model has {len(self.inputs)} ({names}): use FILE.npz")
        return self.inputs[0]

    def check_type(self, spec: InputSpec, found: np.dtype, what: str) -> None:
        """Raise unless ``found`` may become the type of ``spec``; ``what`` names the array."""
        wanted, way_out = spec.dtype, f"save it as {spec.dtype}"
        if wanted.kind == "f":
            good = found.kind == "f" or (found == np.uint8 and len(spec.shape) == 4)
            way_out += ", or as uint8 images" if len(spec.shape) == 4 else ""
        elif wanted.kind in "iu":
            good = found.kind in "iub"
        else:
            good = found == wanted or (wanted.kind in "OUST" and found.kind in "UST")
        if not good:
            raise DataError(f"{what} is {found}, {describe(spec)} expects {wanted}: {way_out}")
        if self.preprocess and found.kind == "f" and (len(self.inputs) == 1 or len(spec.shape) == 4):
            raise RecipeError(f"{what} is {found}, preprocess is for images and uint8 arrays: leave it out")

    def check_shape(self, spec: InputSpec, found: tuple[int, ...], what: str, *, stack: bool = False) -> None:
        """Raise unless ``found`` is the shape of one sample, or of a stack of them, for ``spec``."""
        expected: tuple[Dim, ...] = self.sample_shape(spec)
        if stack:
            expected = ("N", *expected)
        if len(found) != len(expected) or not fits(found, expected):
            wanted = f"{'a stack of samples' if stack else 'a sample'} {shape_text(expected)}"
            raise DataError(f"{what} has shape {shape_text(found)}, input {spec.name!r} expects {wanted}: reshape it")

    def convert(self, spec: InputSpec, array: np.ndarray, what: str) -> np.ndarray:
        """Bring the values of one sample to the type of ``spec``."""
        wanted = spec.dtype
        if array.dtype == np.uint8 and wanted.kind == "f":
            return (self.preprocess or Preprocess()).for_input(spec).normalize(array, wanted)
        if array.dtype.kind == "f" and np.isnan(array).any():
            count = int(np.isnan(array).sum())
            raise DataError(f"{what} holds {count} NaN of {array.size} values: drop or mend it")
        if array.dtype.kind in "iu" and wanted.kind in "iu" and array.size:
            low, high, limits = array.min(), array.max(), np.iinfo(wanted)
            if low < limits.min or high > limits.max:
                raise DataError(
                    f"{what} has values {low} to {high}, {describe(spec)} takes {limits.min} to {limits.max}"
                )
        with np.errstate(over="ignore"):
            converted = array.astype(wanted)
        if wanted.kind == "f" and np.isinf(converted).any() and not np.isinf(array).any():
            raise DataError(f"{what} reaches {np.abs(array).max():.3g}, {wanted} ends at {np.finfo(wanted).max:.3g}")
        return converted

    def fit(self, sample: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
        """Check and convert one sample."""
        fitted = {}
        for spec in self.inputs:
            if spec.name not in sample:
                raise DataError(f"{what} has no array for {describe(spec)}; it has {', '.join(map(str, sample))}")
            array, where = np.asarray(sample[spec.name]), f"{what}, {spec.name!r}"
            self.check_shape(spec, array.shape, where)
            self.check_type(spec, array.dtype, where)
            fitted[spec.name] = self.convert(spec, array, where)
        return fitted


def _layout(shape: Sequence[Dim]) -> str:
    return "nhwc" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "nchw"


def fits(found: Iterable[int], expected: Iterable[Dim]) -> bool:
    return all(not isinstance(want, int) or want == have for have, want in zip(found, expected, strict=True))


def describe(spec: InputSpec) -> str:
    return f"input {spec.name!r} {shape_text(spec.shape)}"


def shape_text(shape: Iterable[Dim]) -> str:
    return "(" + ", ".join("?" if dim is None else str(dim) for dim in shape) + ")"
