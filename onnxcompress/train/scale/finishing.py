"""Make the result: the original pruned to a triple, fitted, trained, merged, and confirmed by onnxruntime."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxcompress.channels.options import Goal
from onnxcompress.errors import EquivalenceError
from onnxcompress.graph import Graph
from onnxcompress.measure import Figures, LatencyFigures, compare_latency, figures
from onnxcompress.model_io import StagedFile, save, to_proto
from onnxcompress.runtime import REFERENCE
from onnxcompress.train.checkpoint import Checkpoint, digest
from onnxcompress.train.depth.costs import merge
from onnxcompress.train.depth.given import TIMING_S
from onnxcompress.train.depth.offers import BudgetError
from onnxcompress.train.depth.preparation import copy_graph
from onnxcompress.train.loop import Progress as StepProgress
from onnxcompress.train.scale.axes import Ladders, scale, structure
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.making import Made, move_weights, prune, train_graph
from onnxcompress.train.scale.options import Decision, Point, ScaleResult
from onnxcompress.train.scale.racing import in_order
from onnxcompress.train.scale.solving import Levels
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.equivalence import Reference, for_runtime, read_model, run_model
from onnxcompress.validation.judge import METRIC_TOLERANCE
from onnxcompress.validation.signature import interface_differences

_COMPARED_BATCHES = 8
_TRAINING = "train"

StepSay = Callable[[StepProgress], None]
Shrink = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Trained:
    """A network that was trained to the end.

    Attributes:
        levels: Its triple.
        graph: With its weights.
        made: Figures of its training.
        finalists: All that were trained, this one among them.
    """

    levels: Levels
    graph: Graph
    made: Made
    finalists: list[Point]


class Finisher:
    """Makes and writes the network at a triple.

    Args:
        given: Model and samples.
        ladders: Of its prepared graph.
        limit: Of MACs or milliseconds.
        folder: For the state of the training.
        say: Told what is being done.
        steps: Called after each step of the training.
    """

    def __init__(
        self,
        given: Given,
        ladders: Ladders,
        limit: float,
        folder: Path,
        say: Callable[[str], None],
        steps: StepSay | None = None,
    ) -> None:
        assert given.options.goal is not None
        self.given, self.options, self.ladders, self.folder = given, given.options, ladders, folder
        self.goal: Goal = given.options.goal
        self.limit, self.say, self.steps = limit, say, steps
        self.start = time.monotonic()

    def make(self, chosen: Levels) -> tuple[Graph, Made]:
        """The original pruned to a triple, fitted and trained; the weights are in the graph."""
        self.say(f"pruning to {'-'.join(map(str, chosen))} and fitting")
        graph = prune(self.given, self.ladders, chosen)
        self.say("training the pruned network")
        made = train_graph(
            self.given,
            graph,
            self.options.training,
            checkpoint=lambda twin, supervision: self._checkpoint(twin, chosen),
            progress=self.steps,
        )
        made.twin.to("cpu").write_back(graph)
        return graph, made

    def _checkpoint(self, twin: TorchGraph, chosen: Levels) -> Checkpoint:
        settings = self.options.training
        # The fitted weights may differ in the last digits from run to run, and those of the checkpoint win.
        identity = self.given.identity() | {
            "levels": list(chosen),
            "trained weights": digest([("\n".join(name for name, _ in twin.named_parameters()), np.ones(1))]),
            "epochs": settings.epochs,
            "steps": settings.steps,
        }
        folder = self.folder / f"{_TRAINING}-{'-'.join(map(str, chosen))}"
        return Checkpoint(folder, identity, resume=self.options.resume)

    def race(self, finalists: Sequence[Point]) -> Trained:
        """Train the finalists, and take the one with the least loss."""
        best: Trained | None = None
        done: list[Point] = []
        for number, point in enumerate(finalists):
            start = time.monotonic()
            if len(finalists) > 1:
                self.say(f"finalist {number + 1} of {len(finalists)}")
            graph, made = self.make(point.levels)
            made.twin.to(self.given.device)
            loss = self.given.loss(made.twin, made.supervision)
            made.twin.to("cpu")
            seconds = time.monotonic() - start
            done.append(replace(point, fitted=made.fitted, figure=made.figure, loss=loss, seconds=seconds))
            metric = made.supervision.metric
            assert metric is not None
            if in_order(done, higher_is_better=metric.higher_is_better)[0] is done[-1]:
                best = Trained(point.levels, graph, made, done)
        assert best is not None
        return best

    def finish(self, output: Path, trained: Trained, decision: Decision | None) -> ScaleResult:
        """Merge, check and write what was trained."""
        given, options = self.given, self.options
        chosen, graph, made = trained.levels, trained.graph, trained.made
        metric, expected, name = made.supervision.metric, made.supervision.expected, made.supervision.output
        assert metric is not None and expected is not None
        wanted, shrink = self._interface(graph, chosen)
        self.say("merging")
        merged = merge(wanted, runtime=given.runtime)
        self.say("checking on onnxruntime")
        with self._staged(wanted) as plain, StagedFile(merged, output) as staged:
            self._check_interface(staged.path, chosen)
            error = self._merge_error(plain, staged.path, shrink)
            before = metric.measure(expected, self._outputs(given.source, name))
            after = metric.measure(expected, self._outputs(staged.path, name, shrink))
            off = abs(metric.drop(made.figure, after, expected))
            allowed = max(METRIC_TOLERANCE, 1.5 / len(given.judged.dataset))
            if not off <= allowed:
                raise EquivalenceError(
                    f"{metric.name} is {after:.6g} on onnxruntime and {made.figure:.6g} in torch, {off:.1e} apart, "
                    f"allowed {allowed:.1e}"
                )
            self.say("timing")
            result = figures(merged, staged.size_bytes)
            latency = self._latency(graph, staged.path, same=wanted is graph)
            self._check_goal(result, latency)
            staged.commit()
        if options.checkpoint is None:
            self.remove_state()
        return ScaleResult(
            source=str(given.source),
            output=str(output),
            goal=self.goal.text,
            learned_from=made.supervision.text,
            metric=metric.name,
            samples=len(given.judged.dataset),
            decision=decision,
            finalists=trained.finalists,
            deleted=[block.name for block in self.ladders.blocks[: chosen[0]]],
            channels={
                group: (len(self.ladders.orders[group]) - taken, len(self.ladders.orders[group]))
                for group, taken in self.ladders.widths[chosen[1]].items()
            },
            pixels=(self.ladders.pixels[0], self.ladders.pixels[chosen[2]]),
            native=options.native,
            before=before,
            fitted=made.fitted,
            after=after,
            figures_before=given.figures,
            figures_after=result,
            latency=latency,
            merge_error=error,
            training=made.training,
            seconds=time.monotonic() - self.start,
        )

    # -- a smaller input -----------------------------------------------------------------------------------------------

    def _interface(self, graph: Graph, chosen: Levels) -> tuple[Graph, Shrink]:
        """The graph with the input that is wished for, and what makes its feeds of those of the original."""
        if not (self.options.native and chosen[2]):
            return graph, lambda feed: dict(feed)
        native = structure(self.given.graph, self.ladders, (chosen[0], chosen[1], 0))
        move_weights(graph, native)
        ratio = self.ladders.pixels[chosen[2]] / self.ladders.pixels[0]
        name = scale(native, ratio, native=True).input_name
        image = next(tensor for tensor in graph.inputs if tensor.name == name)
        resized = str(image.outputs[0].outputs[0].name)
        twin = TorchGraph(graph, trainable=lambda name: False)

        def shrink(feed: Mapping[str, Any]) -> dict[str, Any]:
            tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in feed.items()}
            with torch.no_grad():
                return {**feed, name: twin(tensors, [resized])[resized].numpy()}

        return native, shrink

    def _check_interface(self, path: Path, chosen: Levels) -> None:
        """Raises EquivalenceError where a caller would notice more than a smaller image."""
        expected = self.given.proto
        if self.options.native and chosen[2]:
            copied = copy_graph(self.given.graph)
            scale(copied, self.ladders.pixels[chosen[2]] / self.ladders.pixels[0], native=True)
            expected = to_proto(copied)
        different = interface_differences(expected, read_model(path))
        if different:
            raise EquivalenceError(f"the interface has changed: {different[0]}")

    def _latency(self, graph: Graph, path: Path, *, same: bool) -> LatencyFigures:
        """The result and the original, timed with one feed: where theirs differ, with the Resize inside."""
        if same:
            return compare(self.given, path)
        with self._staged(merge(graph, runtime=self.given.runtime)) as resizing:
            return compare(self.given, resizing)

    @contextlib.contextmanager
    def _staged(self, graph: Graph) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
            path = Path(folder) / "model.onnx"
            save(graph, path)
            yield path

    def _outputs(self, path: Path, output: str, shrink: Shrink = dict) -> np.ndarray:
        judged = self.given.judged
        feeds = (shrink(feed) for feed, _ in judged.dataset.batches(judged.size))
        rows = run_model(self.given.runtime, path, feeds, REFERENCE, outputs=[output])
        return np.concatenate([np.atleast_1d(np.asarray(row[0], np.float32)) for row in rows])

    def _merge_error(self, unmerged: Path, merged: Path, shrink: Shrink) -> float:
        """The largest difference of an output over its range.

        Raises:
            EquivalenceError: It is above the tolerance.
        """
        judged = self.given.judged
        feeds = [shrink(feed) for feed, _ in itertools.islice(judged.dataset.batches(judged.size), _COMPARED_BATCHES)]
        reference = Reference(unmerged, feeds, self.given.runtime)
        comparison = reference.compare(merged, tolerance=self.options.tolerance, allowance=False)
        if not comparison.equivalent:
            raise EquivalenceError(
                f"merged and unmerged differ: {comparison.message()}; --tolerance allows more, the trained weights are "
                f"kept in {self.folder}"
            )
        return max((found.relative for found in comparison.outputs), default=0.0)

    def _check_goal(self, result: Figures, latency: LatencyFigures) -> None:
        """BudgetError where the written file would miss the goal."""
        if self.goal.kind == "macs":
            if result.macs > self.limit:
                raise BudgetError(f"{self.goal.text}: the result has {result.macs:,} MACs, allowed {self.limit:,.0f}")
            return
        share = self.goal.amount if self.goal.relative else self.goal.amount / latency.original_ms
        if 1 / latency.high > share:  # the interval of the measurement included
            raise BudgetError(
                f"{self.goal.text}: the result takes {latency.result_ms:.3f} ms, {1 / latency.ratio:.3f}x of the "
                f"original's {latency.original_ms:.3f} ms, allowed {share:.3f}x; its weights are kept in {self.folder}"
            )

    def remove_state(self) -> None:
        """Delete what a run that is done has no use for."""
        for folder in self.folder.glob(f"{_TRAINING}-*-*-*"):
            Checkpoint(folder, {}).remove()
        lists = (self.folder / f"{name}.json" for name in ("points", "ladders", "macs", "latency"))
        for path in (*self.folder.glob("*-*-*-*.onnx"), *lists):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else lies there
            self.folder.rmdir()


def compare(given: Given, path: Path) -> LatencyFigures:
    """A file and the original, timed in turns."""
    feed = next(given.judged.ordered(1)).feeds
    return compare_latency(
        given.runtime,
        for_runtime(given.source),
        for_runtime(path),
        {name: value.numpy() for name, value in feed.items()},
        threads=given.options.threads or 1,
        budget_s=TIMING_S,
        max_runs=1000,
    )
