"""The layers of a plan, each in its form, in execution order: on the input that those before it give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcompress.codebook.codebook import Choice, QuantizedLayer, Statistics
from onnxcompress.codebook.layer import quantize_layer
from onnxcompress.codebook.layers import Layer
from onnxcompress.codebook.narrow import Float16Layer, Int8Layer
from onnxcompress.codebook.narrowing import narrow_layer
from onnxcompress.codebook.offers import Form
from onnxcompress.codebook.planning import Plan
from onnxcompress.codebook.resuming import Checkpoint
from onnxcompress.codebook.sharing import SharedCodebook
from onnxcompress.codebook.statistics import Calibration
from onnxcompress.codebook.workers import Workers
from onnxcompress.errors import QuantizationError

Stored = QuantizedLayer | Int8Layer | Float16Layer
Made = Mapping[str, tuple[Stored, float | None]]  # layers with their errors, by name


class ImpossibleForm(Exception):
    """A form that a layer cannot have after all."""

    def __init__(self, name: str, form: Form, reason: str) -> None:
        super().__init__(name)
        self.name, self.form, self.reason = name, form, reason


def quantize_layers(
    plan: Plan,
    layers: Sequence[Layer],
    calibration: Calibration,
    workers: Workers,
    checkpoint: Checkpoint,
    *,
    method: str,
    seed: int,
    shared: Mapping[str, SharedCodebook],
    done: Callable[[Layer], None],
) -> Made:
    """Quantize what a plan does not keep.

    Args:
        plan: A form for each layer.
        layers: All of the graph, in order.
        calibration: Of those that the plan changes; sees each quantized layer.
        workers: Where layers are fitted.
        checkpoint: Layers that are there are taken from it.
        method: See ``quantize_layer``.
        seed: Same seed, same layers.
        shared: Codebooks of the layers whose forms share one, by name.
        done: Called after each layer.

    Raises:
        ImpossibleForm: A layer cannot have its form.
    """
    made: dict[str, tuple[Stored, float | None]] = {}
    numbers = {layer.name: index for index, layer in enumerate(layers)}

    def key(layer: Layer) -> str:
        return f"{plan.digest}-{numbers[layer.name]:04d}"

    for stage in calibration.stages():
        waiting = []
        for layer in stage:
            kept, error = checkpoint.load_layer(key(layer)), checkpoint.load(key(layer))
            if kept is not None and error is not None and _form_of(kept) == plan.forms[layer.name]:
                made[layer.name] = kept, error["error"]
                done(layer)
            else:
                waiting.append(layer)

        def finish(number: int, found: Any, waiting: list[Layer] = waiting) -> None:
            layer = waiting[number]
            if isinstance(found, str):
                raise ImpossibleForm(layer.name, plan.forms[layer.name], found)
            made[layer.name] = found
            checkpoint.save_layer(key(layer), found[0])
            checkpoint.save(key(layer), {"error": found[1]})
            done(layer)

        tasks = (
            (
                layer.matrix(),
                layer.bias(),
                calibration.statistics(layer),
                calibration.statistics(layer, "held_out"),
                plan.forms[layer.name],
                {
                    "seed": seed * 100_003 + numbers[layer.name],
                    "method": method,
                    "correct_bias": layer.has_bias,
                    "shared": shared.get(layer.name),
                    "kernel": layer.kernel,
                },
            )
            for layer in waiting
        )
        workers.map(_quantize_task, tasks, finish)
        for layer in stage:
            stored = made[layer.name][0]
            calibration.replace(layer, stored.decode(), stored.bias if layer.has_bias else None)
    return made


def _quantize_task(
    weight: np.ndarray,
    bias: np.ndarray | None,
    statistics: Statistics | None,
    held_out: Statistics | None,
    form: Form,
    wishes: Mapping[str, Any],
) -> tuple[Stored, float | None] | str:
    """In another process: a layer in its form with its error, or why it cannot have it."""
    try:
        if isinstance(form, Choice):
            made = quantize_layer(weight, bias, statistics, form, held_out=held_out, int8_tolerance=None, **wishes)
            return made, made.error if made.held_out_error is None else made.held_out_error
        assert form in ("int8", "float16"), "what is kept is not quantized"
        narrow = narrow_layer(
            weight,
            bias,
            statistics,
            form,
            held_out=held_out,
            correct_bias=wishes["correct_bias"] and wishes["method"] in ("sweep", "em"),
            aim=wishes["method"] in ("sweep", "em"),
        )
        return narrow.stored, narrow.error if narrow.held_out_error is None else narrow.held_out_error
    except QuantizationError as error:
        return str(error)


def _form_of(stored: Stored) -> Form:
    if isinstance(stored, QuantizedLayer):
        return stored.choice
    return "int8" if isinstance(stored, Int8Layer) else "float16"
