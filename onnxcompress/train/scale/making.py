"""Make one pruned network: its structure, the fits that regain most of what that cost, and a training.

Blocks go first, then channels, then pixels, and each time the weights that stay are fitted to what the network gave
before: blocks as in ``depth.fitting``, channels as in ``channels.compensation``, and in the end the statistics of
BatchNormalization and the last linear operator, to what the original gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.channels.compensation import compensate
from onnxcompress.channels.groups import find_channels
from onnxcompress.errors import ModelError
from onnxcompress.graph import Constant, Graph
from onnxcompress.model_io import load, to_proto
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.cached_runs import CachedRuns
from onnxcompress.train.checkpoint import Checkpoint
from onnxcompress.train.depth.blocks import after_deletions
from onnxcompress.train.depth.fitting import fit_blocks, fit_outputs
from onnxcompress.train.depth.given import file_digest
from onnxcompress.train.depth.preparation import copy_graph
from onnxcompress.train.depth.supernet import build_pruned, build_supernet
from onnxcompress.train.depth.training import Lambdas, settled
from onnxcompress.train.loop import Evaluation, TrainResult, train
from onnxcompress.train.loop import Progress as StepProgress
from onnxcompress.train.scale.axes import Ladders, in_order, remove, scale, structure
from onnxcompress.train.scale.given import Given, one_thread
from onnxcompress.train.scale.options import ScaleOptions
from onnxcompress.train.scale.solving import Levels
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.supervision import Supervision
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.train.weights import held_values, is_float, weight_tensors

NOTHING: Levels = (0, 0, 0)
Step = Callable[[StepProgress], None]
Outcome = tuple[np.ndarray, float, float, float, float]


@dataclass(frozen=True, eq=False)
class Made:
    """A pruned network, trained.

    Attributes:
        twin: With its graph.
        supervision: What it learned from.
        fitted: Validation figure before training.
        figure: After it.
        training: Figures of the run.
    """

    twin: TorchGraph
    supervision: Supervision
    fitted: float
    figure: float
    training: TrainResult


def prune(given: Given, ladders: Ladders, target: Levels, *, held: Graph | None = None, at: Levels = NOTHING) -> Graph:
    """A graph at a triple of levels, with fitted weights.

    Args:
        given: Model and samples.
        ladders: Of its prepared graph.
        target: Levels.
        held: Where to go on from; the prepared graph when None, and not changed.
        at: Its levels, none of which is beyond the target.
    """
    graph = copy_graph(held or given.graph)
    if held is not None and at[2]:
        # Sizes inside are made from those of the file: the trained numbers move into a graph of its resolution.
        graph = structure(given.graph, ladders, (at[0], at[1], 0))
        move_weights(held, graph)
    graph = _delete(given, graph, ladders, at[0], target[0])
    graph = _narrow(given, graph, ladders, at[1], target[1])
    if target[2]:
        scale(graph, ladders.pixels[target[2]] / ladders.pixels[0])
    twin = TorchGraph(graph).to(given.device)
    runs = CachedRuns(twin, given.calibration, settle=given.settles)
    fit_outputs(runs, given.original_runs)
    runs.settle()
    twin.to("cpu").write_back(graph)
    return graph


def move_weights(source: Graph, target: Graph) -> None:
    """Give the float initializers of a graph the values of those of the same name and shape in another."""
    held = {name: values for name, tensor in weight_tensors(source) if (values := held_values(tensor)) is not None}
    for name, tensor in weight_tensors(target):
        values = held.get(name)
        if not isinstance(tensor, Constant) or values is None or not is_float(values.dtype):
            continue
        if tuple(tensor.shape) == values.shape:
            tensor.values = values


def _delete(given: Given, graph: Graph, ladders: Ladders, start: int, end: int) -> Graph:
    blocks = [after_deletions(graph, block) for block in in_order(graph, ladders.blocks[start:end])]
    if not blocks:
        return graph
    supernet = build_supernet(graph, blocks)
    twin = TorchGraph(supernet.graph).to(given.device)
    lambdas = Lambdas(twin, supernet.lambdas)
    before = TorchGraph(graph, trainable=lambda name: False).to(given.device)
    fit_blocks(twin, supernet, before, given.calibration, lambdas=lambdas, settle=given.settles)
    pruned = build_pruned(supernet, blocks, [block.name for block in blocks])
    twin.to("cpu").write_back(pruned)
    return pruned


def _narrow(given: Given, graph: Graph, ladders: Ladders, start: int, end: int) -> Graph:
    channels = find_channels(graph)
    gone = {name: chosen for name, chosen in ladders.gone(start, end).items() if name in channels.by_name}
    if not gone:
        return graph
    compensate(channels, gone, given.samples, given.runtime, seed=given.options.training.seed)
    fitted = load(to_proto(channels.graph))
    infer_shapes(fitted)
    remove(fitted, gone)
    return fitted


def train_graph(
    given: Given,
    graph: Graph,
    settings: TrainSettings,
    *,
    checkpoint: Callable[[TorchGraph, Supervision], Checkpoint] | None = None,
    progress: Step | None = None,
) -> Made:
    """Train the twin of a graph; the graph itself is not changed."""
    settings = replace(settings, freeze_statistics=not given.settles)
    twin = TorchGraph(graph)
    supervision = given.supervise(twin)
    assert supervision.metric is not None and supervision.objective is not None
    held = None if checkpoint is None else checkpoint(twin, supervision)
    evaluation = Evaluation(
        lambda model: supervision.figure(model, given.judged, given.device),
        supervision.metric.name,
        supervision.metric.higher_is_better,
    )
    if not settings.freeze_statistics:
        evaluation = settled(evaluation, given.calibration)
    twin.to(given.device)
    run = train(
        twin,
        given.batches,
        supervision.objective,
        settings=settings,
        evaluation=evaluation,
        checkpoint=held,
        progress=progress,
    )
    assert run.figures is not None
    return Made(twin, supervision, *run.figures, run)


def point_settings(options: ScaleOptions, epochs: float) -> TrainSettings:
    """How the network at a point is trained: as the result, for so many epochs."""
    return replace(options.training, epochs=epochs, steps=None, patience=None, eval_every=None)


def make_at(given: Given, ladders: Ladders, target: Levels, at: Levels, epochs: float, model: np.ndarray) -> Outcome:
    """Prune and train one network, with one thread.

    Args:
        given: Model and samples.
        ladders: Of its prepared graph.
        target: Levels.
        at: Levels to go on from.
        epochs: Of the training.
        model: (n,) uint8, the network to go on from, serialized; empty for the original.

    Returns:
        (n,) uint8 the network, serialized; its figures before and after training; its loss on the validation samples;
        and the seconds that it took.
    """
    start = time.monotonic()
    with one_thread():
        held = load(model.tobytes()) if len(model) else None
        if held is not None:
            infer_shapes(held)
        graph = prune(given, ladders, target, held=held, at=at)
        made = train_graph(given, graph, point_settings(given.options, epochs))
        loss = given.loss(made.twin, made.supervision)
        made.twin.to("cpu").write_back(graph)
    if not math.isfinite(made.figure):
        raise ModelError(f"{given.source}, pruned to levels {target}: the figure is {made.figure:g}")
    packed = np.frombuffer(to_proto(graph).SerializeToString(), np.uint8)
    return packed, made.fitted, made.figure, loss, time.monotonic() - start


_held: dict[str, Given] = {}  # the last one of this process: points of a run share it


def make_point(
    source: str,
    options: ScaleOptions,
    ladders: dict[str, Any],
    target: Levels,
    at: Levels,
    epochs: float,
    model: np.ndarray,
) -> Outcome:
    """``make_at`` in a process of its own, which reads model and samples itself."""
    key = f"{file_digest(Path(source))} {source} {options}"
    if key not in _held:
        for other in _held.values():
            other.runtime.close()
        _held.clear()
        _held[key] = Given(Path(source), options)
    return make_at(_held[key], Ladders.from_dict(ladders), target, at, epochs, model)
