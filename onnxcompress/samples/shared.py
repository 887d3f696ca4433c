"""Check inputs that two models accept."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from onnx import ModelProto

from onnxcompress.errors import ModelError
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.samples import Samples, check_samples
from onnxcompress.samples.sizes import input_shape
from onnxcompress.validation.equivalence import Feed, Model, read_model, run_model


def shared_samples(
    a: Model,
    b: Model,
    proto: ModelProto,
    runtime: Runtime,
    options: RunOptions,
    both: bool,
    shapes: Mapping[str, Sequence[int | str | None]] | None,
    batch: int | None,
    seed: int,
) -> Samples:
    """Inputs that ``a`` accepts, and ``b`` too where their interfaces differ and such inputs exist."""

    def run(feed: Feed) -> list[Any]:
        return run_model(runtime, a, [feed], options)[0]

    def run_both(feed: Feed) -> list[Any]:
        run_model(runtime, b, [{name: value for name, value in feed.items() if name in known}], options)
        return run(feed)

    if both:
        second = read_model(b)
        shapes = _narrowed(proto, second, shapes or {})
        known = {value.name for value in second.graph.input}
        with contextlib.suppress(ModelError):  # then b refuses them all, which the comparison reports
            return check_samples(proto, run_both, seed=seed, shapes=shapes, batch=batch)
    return check_samples(proto, run, seed=seed, shapes=shapes, batch=batch)


def _narrowed(
    a: ModelProto, b: ModelProto, shapes: Mapping[str, Sequence[int | str | None]]
) -> dict[str, Sequence[int | str | None]]:
    """Sizes that ``b`` fixes and ``a`` leaves open, beside those that were given."""
    fixed = {value.name: input_shape(value).dims for value in b.graph.input}
    sizes: dict[str, int] = {}
    found = dict(shapes)
    for shape in (input_shape(value) for value in a.graph.input):
        theirs = fixed.get(shape.name)
        if shape.dims is None or theirs is None or len(theirs) != len(shape.dims) or shape.name in shapes:
            continue
        pairs = zip(shape.dims, theirs, strict=True)
        open_axes = [(axis, ours, size) for axis, (ours, size) in enumerate(pairs) if isinstance(ours, str)]
        given: list[int | str | None] = [None] * len(shape.dims)
        for axis, ours, size in open_axes:
            if isinstance(size, int) and sizes.setdefault(ours, size) == size:
                given[axis] = size
        if any(size is not None for size in given):
            found[shape.name] = given
    return found
