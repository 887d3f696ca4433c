"""Where samples come from: arrays, folders, scikit-learn's digits, or a Python function.

    FILE.npz             arrays named like the inputs, first axis = samples; labels: array `labels`, `label` or `y`
    FILE.npy             the samples of a model with one input
    FOLDER of .npy       each file one sample or one batch; several inputs: sub-folders or stacks named like the inputs;
                         labels: `labels.npy`
    FOLDER of images     decoded when asked for; labels: the sub-folders in sorted order, their names when all are
                         integers, or `labels.npy`
    sklearn:digits       1797 images 8x8 in [0, 1]: the 599 held out; `sklearn:digits:train`, `sklearn:digits:all`
    module:function      called without arguments; gives a Dataset, or samples or batches as arrays, dicts or (x, y)

Files are taken in natural order (2.npy before 10.npy). Floats are cast to the input's float type, integers to its
integer type when every value fits, uint8 images are normalized for a float input; any other difference is an error.
"""

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.data.files import (
    LABEL_NAMES,
    Found,
    Lazy,
    Sample,
    one_line,
    open_folder,
    open_npy,
    open_npz,
    row_of,
    same_count,
)
from onnxcompress.data.inputs import InputSpec, Preprocess, Target, describe, fits
from onnxcompress.errors import DataError, OnnxCompressError, RecipeError

__all__ = ["Dataset", "InputSpec", "Preprocess", "load_data"]

logger = logging.getLogger(__name__)

FORMS = "FILE.npz, FILE.npy, a folder of .npy files or of images, sklearn:digits, or module:function"

_DIGITS_SEED = 1797
_DIGITS_HELD_OUT = 599


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and, where known, their labels.

    Args:
        samples: Each maps input names to arrays without the batch axis; may decode on access.
        labels: (n, ...) one per sample; class indices are (n,) int64.
        source: Where they come from, for messages.
        batch: The batch size when the model fixes it.
        whole: Each sample is a complete feed, its arrays have the shapes of the inputs. So it is for a model with
            inputs that share no first axis: a scalar beside an image, an initial state of another size.

    Raises:
        DataError: There is no sample, or the number of labels is not that of the samples.
    """

    samples: Sequence[Sample]
    labels: np.ndarray | None = None
    source: str = "data"
    batch: int | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if len(self.samples) == 0:
            raise DataError(f"{self.source} holds no samples")
        if self.labels is not None:
            object.__setattr__(self, "labels", _as_labels(self.labels, len(self.samples), self.source))

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]:
        """Yield feeds and their labels, in order.

        Args:
            size: Samples in a batch; a model with a fixed batch gets its own size, complete feeds come one at a time.
                A batch ends early where the next sample has another shape.

        Raises:
            DataError: A sample cannot be read, or does not fit in.
        """
        if size < 1:
            raise ValueError(f"batch size {size}: must be at least 1")
        size = self.batch or size
        start, group = 0, list[Sample]()
        for index, sample in enumerate(self.samples):
            if group and (self.whole or len(group) == size or _shapes(group[0]) != _shapes(sample)):
                yield self._feed(start, group)
                start, group = index, []
            group.append(sample)
        yield self._feed(start, group)

    def _feed(self, start: int, group: Sequence[Sample]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        labels = None if self.labels is None else self.labels[start : start + len(group)]
        if self.whole:
            return dict(group[0]), labels
        if self.batch and len(group) != self.batch:
            raise DataError(
                f"{self.source}: samples {start} to {start + len(group) - 1} are followed by one of another shape, "
                f"the model takes {self.batch} alike: bring the samples to one shape"
            )
        return {name: np.stack([sample[name] for sample in group]) for name in group[0]}, labels


def load_data(
    spec: str,
    *,
    inputs: Sequence[InputSpec],
    limit: int | None = None,
    preprocess: str | Preprocess | None = None,
    seed: int = 0,
) -> Dataset:
    """Open samples for a model.

    Args:
        spec: A source, see the top of this module. An existing path wins over ``module:function``.
        inputs: What the model takes.
        limit: At most so many samples, drawn at random but kept in order; an iterable that a function returns is read
            no further than needed.
        preprocess: How images are prepared, as in ``Preprocess.parse``.
        seed: Same seed, same draw.

    Returns:
        The samples, cast to the inputs' types. When the model fixes its batch size, the few that fill no batch are
        left out, with a warning.

    Raises:
        DataError: The data is missing, unreadable, or does not fit the inputs.
        RecipeError: ``preprocess`` or ``limit`` is malformed or contradicts the inputs.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"limit {limit}: must be at least 1 sample")
    if not inputs:
        raise DataError(f"{spec}: the model has no input to feed")
    target = Target(tuple(inputs), Preprocess.parse(preprocess) if isinstance(preprocess, str) else preprocess)
    found = _open(spec, target, limit)
    count = len(found.samples)
    keep = np.sort(_shuffled(count, seed)[:limit])
    if target.batch and count:
        used = len(keep) - len(keep) % target.batch
        if used == 0:
            raise DataError(
                f"{spec} gives {len(keep)} samples, the model's batch is fixed at {target.batch}: give more"
            )
        if used < len(keep):
            logger.warning("%s: %d of %d samples fill no batch of %d", spec, len(keep) - used, len(keep), target.batch)
        keep = keep[:used]
    labels = None if found.labels is None else _as_labels(found.labels, count, spec)[keep]
    samples: Sequence[Sample] = Lazy(len(keep), lambda i: found.samples[int(keep[i])])
    return Dataset(list(samples) if found.eager else samples, labels, spec, target.batch, target.whole)


def _shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation that every NumPy draws alike: bit generators are frozen, ``Generator.permutation`` is not."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _open(spec: str, target: Target, limit: int | None) -> Found:
    if spec.startswith("sklearn:"):
        return _open_sklearn(spec, target)
    if not spec:
        raise DataError(f"no source of data is named; expected {FORMS}")
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return open_folder(path, target)
    suffix = path.suffix.lower()
    if suffix == ".npz" and path.exists():
        return open_npz(path, target)
    if suffix == ".npy" and path.exists():
        return open_npy({target.only_input(spec).name: [path]}, None, target)
    if path.exists():
        raise DataError(f"{spec} is no data that can be read; expected {FORMS}")
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", spec):
        return _open_function(spec, target, limit)
    raise DataError(f"{spec}: no such file or folder (from {os.getcwd()}); expected {FORMS}")


def _open_sklearn(spec: str, target: Target) -> Found:
    _, name, part = (*spec.split(":", 2), "held-out")[:3]
    if name != "digits" or part not in ("held-out", "train", "all"):
        raise DataError(f"{spec}: no such data set; there are sklearn:digits, sklearn:digits:train, sklearn:digits:all")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"{spec} needs scikit-learn, which is not installed: pip install scikit-learn") from error
    model_input = target.only_input(spec)
    expected = target.sample_shape(model_input)
    shape = next(
        (s for s in ((1, 8, 8), (8, 8, 1), (64,), (8, 8)) if len(s) == len(expected) and fits(s, expected)), None
    )
    if shape is None:
        raise DataError(f"{spec} has images of 8x8 in one channel, {describe(model_input)} does not take them")
    digits = load_digits()
    order = _shuffled(len(digits.target), _DIGITS_SEED)
    parts = {"held-out": order[:_DIGITS_HELD_OUT], "train": order[_DIGITS_HELD_OUT:], "all": order}
    chosen = np.sort(parts[part])
    images = (digits.images[chosen] / 16).astype(np.float32).reshape(-1, *shape)  # grey levels are 0 to 16
    samples = Lazy(len(images), lambda i: row_of({model_input.name: images}, i, target, spec))
    return Found(samples, digits.target[chosen], eager=True)


def _open_function(spec: str, target: Target, limit: int | None) -> Found:
    with _working_directory_on_path(), _user_code(spec):
        module, _, name = spec.partition(":")
        result = getattr(importlib.import_module(module), name)()
        if not isinstance(result, Dataset):
            return _collect(spec, result, target, limit)

    def read(index: int) -> Sample:
        what = f"{spec}: sample {index}"
        with _user_code(what):
            return target.fit(result.samples[index], what)

    return Found(Lazy(len(result), read), result.labels, eager=False)


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _user_code(what: str) -> Iterator[None]:
    try:
        yield
    except OnnxCompressError:
        raise
    except Exception as error:  # whatever it may raise
        raise DataError(f"{what}: {type(error).__name__}: {one_line(error)}") from error


def _collect(spec: str, result: Any, target: Target, limit: int | None) -> Found:
    """Read what a function returned: one item or an iterable of them."""
    single = isinstance(result, Mapping | np.ndarray) or (isinstance(result, tuple) and _is_pair(result))
    items: Iterable[Any] = [result] if single else result
    samples: list[Sample] = []
    labels: list[Any] = []
    for number, item in enumerate(items):
        what = f"{spec}: item {number}"
        rows, row_labels = _read_item(item, target, what)
        samples += rows
        labels += [] if row_labels is None else list(row_labels)
        if labels and len(labels) != len(samples):
            raise DataError(f"{what}: {len(labels)} labels for {len(samples)} samples: give all labels, or none")
        if limit is not None and len(samples) >= limit:
            break
    return Found(samples, np.asarray(labels) if labels else None, eager=True)


def _read_item(item: Any, target: Target, what: str) -> tuple[list[Sample], np.ndarray | None]:
    """Read a sample or a batch: an array, a dict, or (x, y) with x one of these."""
    feeds, labels = item if _is_pair(item) else (item, None)
    if not isinstance(feeds, Mapping):
        feeds = {target.only_input(what).name: feeds}
    names = [spec.name for spec in target.inputs]
    label_name = next((name for name in LABEL_NAMES if name in feeds and name not in names), None)
    if labels is None and label_name is not None:
        labels = feeds[label_name]
    arrays = {name: np.asarray(array) for name, array in feeds.items() if name in names}
    if any(s.name not in arrays or arrays[s.name].ndim <= len(target.sample_shape(s)) for s in target.inputs):
        return [target.fit(feeds, what)], None if labels is None else _as_labels(np.asarray(labels)[None], 1, what)
    for spec in target.inputs:
        target.check_shape(spec, arrays[spec.name].shape, f"{what}, {spec.name!r}", stack=True)
    count = same_count({name: len(array) for name, array in arrays.items()}, what)
    rows = [row_of(arrays, index, target, what) for index in range(count)]
    return rows, None if labels is None else _as_labels(np.asarray(labels), count, what)


def _is_pair(item: Any) -> bool:
    """Whether it is (x, y), as a tuple or, as torch's DataLoader gives it, a list."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    return isinstance(item[0], Mapping) or hasattr(item[0], "shape")


def _as_labels(labels: np.ndarray, count: int, source: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim == 0 or len(labels) != count:
        raise DataError(f"{source}: {labels.size if labels.ndim == 0 else len(labels)} labels for {count} samples")
    if labels.dtype.kind in "iub":
        return labels.astype(np.int64).reshape(count) if labels.size == count else labels.astype(np.int64)
    if labels.dtype.kind != "f" or np.isnan(labels).any():
        problem = "hold NaN" if labels.dtype.kind == "f" else f"are {labels.dtype}"
        raise DataError(
            f"{source}: labels {problem}, numbers are expected: class indices as integers, or targets as floats"
        )
    return labels


def _shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in sample.items()}
