"""The samples of a run of ``quantize``: those to fit layers to, those that judge, and more for tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxcompress.codebook.options import (
    DEFAULT_LIMIT,
    HELD_OUT_SHARE,
    SMALL_BYTES,
    SMALL_LIMIT,
    TUNING_BYTES,
    TUNING_LIMIT,
    QuantizeOptions,
)
from onnxcompress.codebook.statistics import split_samples
from onnxcompress.data import Dataset, InputSpec, load_data
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.samples import check_samples
from onnxcompress.validation.equivalence import for_runtime, run_model
from onnxcompress.validation.judge import input_specs

BATCH = 4
SIZE_UNKNOWN = 128  # of an open axis, for an estimate
Feed = dict[str, Any]


@dataclass
class Samples:
    """Batches of the user's samples.

    Attributes:
        all: Those that layers are fitted to and judged with.
        more: Only for tuning.
        fit: Part of ``all``.
        held_out: The other part.
        notes: What the user should know about them.
    """

    all: list[Feed]
    more: list[Feed]
    fit: list[Feed]
    held_out: list[Feed]
    notes: list[str] = field(default_factory=list)


def read_samples(proto: ModelProto, options: QuantizeOptions) -> Samples:
    """What ``--data`` names, in batches, split.

    Raises:
        DataError: The samples are missing or do not fit.
        RecipeError: The wishes about inputs name none.
    """
    if options.data == "none":
        note = "without data nothing knows which weights matter: the error is several times that with 32 samples"
        return Samples([], [], [], [], [note])
    notes = []
    dataset = load_samples(proto, options, options.data, _limit(proto, options))
    size = options.batch or min(BATCH, max(1, len(dataset) // 8))
    feeds = [feed for feed, _ in dataset.batches(size)]
    if len(dataset) < 32:
        notes.append(f"{len(dataset)} samples are few to calibrate with: 32 to 1,024 are better")
    fitted = _up_to(SMALL_LIMIT, SMALL_BYTES, proto, options)
    most = len(feeds) if options.tune == "none" else max(2, fitted // size)
    order = np.random.default_rng(options.seed).permutation(len(feeds))
    chosen = [feeds[i] for i in sorted(map(int, order[:most]))]
    more = [feeds[i] for i in sorted(map(int, order[most:]))]
    numbers = split_samples(len(chosen), 1 / HELD_OUT_SHARE, options.seed)
    fit, held_out = ([chosen[i] for i in part] for part in (numbers["fit"], numbers["held_out"]))
    return Samples(chosen, more, fit, held_out, notes)


def read_labelled(proto: ModelProto, options: QuantizeOptions) -> Dataset | None:
    """What ``--val`` names; None where nothing is asked for.

    Raises:
        DataError: There are no labels.
    """
    if options.val is None:
        return None
    labelled = load_samples(proto, options, options.val, None)
    if labelled.labels is None:
        raise DataError(f"--val {options.val} has no labels: {options.metric or 'top1'} needs them")
    return labelled


def load_samples(proto: ModelProto, options: QuantizeOptions, spec: str, limit: int | None) -> Dataset:
    """Read samples for the inputs of a model, of the shapes that the user gives."""
    specs = input_specs(proto)
    unknown = set(options.input_shapes) - {one.name for one in specs}
    if unknown:
        names = ", ".join(repr(one.name) for one in specs)
        raise RecipeError(f"--input-shape names {sorted(unknown)[0]!r}; the model's inputs are {names}")
    fixed = [_with_sizes(one, options.input_shapes.get(one.name)) for one in specs]
    return load_data(spec, inputs=fixed, limit=limit, preprocess=options.preprocess, seed=options.seed)


def made_up_samples(
    proto: ModelProto, path: Path, options: QuantizeOptions, runtime: Runtime, run_options: RunOptions
) -> list[Feed]:
    """Inputs to compare files on where there are no samples."""

    def run(feed: Mapping[str, Any]) -> list[Any]:
        return run_model(runtime, for_runtime(path), [feed], run_options)[0]

    shapes = {name: [*shape] for name, shape in options.input_shapes.items()}
    return list(check_samples(proto, run, seed=options.seed, shapes=shapes))


def batch_size(feed: Mapping[str, Any]) -> int:
    """Samples in a feed; one without a batch axis counts as one."""
    return max((np.shape(value)[0] for value in feed.values() if np.ndim(value)), default=1)


def sample_count(feeds: Sequence[Mapping[str, Any]]) -> int:
    return sum(map(batch_size, feeds))


def first_samples(feeds: Sequence[Feed], count: int) -> list[Feed]:
    """So many feeds that they hold ``count`` samples."""
    few: list[Feed] = []
    for feed in feeds:
        few.append(feed)
        if sample_count(few) >= count:
            break
    return few


def _limit(proto: ModelProto, options: QuantizeOptions) -> int:
    if options.limit is not None:
        return options.limit
    if options.tune == "none":
        return _up_to(SMALL_LIMIT, SMALL_BYTES, proto, options)
    return _up_to(TUNING_LIMIT, TUNING_BYTES, proto, options)


def _up_to(most: int, size_bytes: int, proto: ModelProto, options: QuantizeOptions) -> int:
    """So many samples as take so many bytes, at most ``most``, at least ``DEFAULT_LIMIT``."""
    shapes = [options.input_shapes.get(one.name, one.shape) for one in input_specs(proto)]
    known = [[size if isinstance(size, int) and size > 0 else SIZE_UNKNOWN for size in shape[1:]] for shape in shapes]
    return max(DEFAULT_LIMIT, min(most, size_bytes // (4 * sum(map(math.prod, known)) or 1)))


def _with_sizes(spec: InputSpec, sizes: Sequence[int] | None) -> InputSpec:
    """The input with its open axes fixed; the batch axis stays open."""
    if sizes is None:
        return spec
    if len(sizes) != len(spec.shape):
        raise RecipeError(f"--input-shape {spec.name}: {len(sizes)} sizes, the input has {len(spec.shape)} axes")
    given = [size if size > 0 else None for size in sizes]
    return replace(spec, shape=(spec.shape[0], *given[1:]) if spec.shape[0] in (None, -1, 0) else tuple(given))
