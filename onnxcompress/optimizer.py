"""``optimize``: read a model, run the passes, prove that the result is the same and no worse, and write it.

Nothing is trusted. A result is written only when onnxruntime gives the same outputs, the interface is the same, the
file is not larger and the model not slower. Where it is, the guilty pass is found and left out, and what remains is
tried again; at the end of that road stands a copy of the original.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from onnxcompress import pipeline
from onnxcompress.cost import Measured
from onnxcompress.errors import EquivalenceError, ModelError, OutputError, PassError, RuntimeFailure
from onnxcompress.graph import Graph
from onnxcompress.interface import set_input_shapes
from onnxcompress.measure import Figures, LatencyFigures, compare_latency, figures, gzip_bytes, size_on_disk
from onnxcompress.model_io import StagedFile, load, parse_proto, read_proto, to_proto
from onnxcompress.pipeline import PipelineResult
from onnxcompress.rewrite import Settings
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.samples import check_samples
from onnxcompress.shapes import infer_shapes, skeleton
from onnxcompress.validate import DEFAULT_TOLERANCE, Comparison, compare, for_runtime, interface_differences

logger = logging.getLogger(__name__)

GROWTH_LIMIT = 1.01  # times the original's bytes
SLOWER_LIMIT = 0.97  # a ratio original / result below this, interval included, is slower
Progress = Callable[[str], None]


@dataclass(frozen=True)
class OptimizeOptions:
    """The user's wishes.

    Args:
        only: Names of the passes to run; all when empty.
        skip: Names of passes to leave out.
        input_shapes: New shapes of inputs, by name; the model's interface changes accordingly, because it was asked for.
        batch: New size of the first axis of every input that has a dynamic one.
        check: Compare the result with the original on onnxruntime before it is written.
        verify_each: Compare after every pass that rewrote something, and leave out the one that breaks the model.
        tolerance: Largest max|d| / max|y| of an output.
        data: Samples for the check (see ``onnxcompress.data``) instead of seeded ones.
        max_constant_bytes: Constant folding makes no tensor larger than this.
        cost: ``estimate`` prices merges by MACs and bytes, ``measured`` times them on this machine.
        allow_approximate: Largest relative error at which approximate merges (class 4) are done; None forbids them.
        measure_latency: Time original and result, and refuse a slower result.
        threads: Threads within an operator for timing, 0 for onnxruntime's choice.
        latency_budget_s: How long the timing may take.
        custom_ops: Shared library with custom operators, for the check.
        seed: Seed of the check's inputs.
        timeout_s: Longest load or run of the model in the check.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    input_shapes: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    batch: int | None = None
    check: bool = True
    verify_each: bool = False
    tolerance: float = DEFAULT_TOLERANCE
    data: str | None = None
    max_constant_bytes: int = 1 << 20
    cost: str = "estimate"
    allow_approximate: float | None = None
    measure_latency: bool = True
    threads: int = 0
    latency_budget_s: float = 0.6
    custom_ops: Path | None = None
    seed: int = 0
    timeout_s: float | None = 300.0


@dataclass(frozen=True)
class Dropped:
    """A pass that was left out, or a result that was given up, and why."""

    what: str
    reason: str


@dataclass
class Result:
    """What ``optimize`` did.

    Args:
        source: Name of the input.
        output: Where the result was written; None when it was not asked for.
        before: Figures of the original.
        after: Figures of the result.
        passes: What each pass did and refused.
        dropped: Passes left out because of what they did to this model.
        comparison: Outputs of both models compared; None without the check.
        latency: Both models timed in turns; None when not measured.
        seconds: Wall time.
        unchanged: The result is a copy of the original.
    """

    source: str
    output: Path | None
    before: Figures
    after: Figures
    passes: PipelineResult
    dropped: list[Dropped]
    comparison: Comparison | None
    latency: LatencyFigures | None
    seconds: float
    unchanged: bool
    graph: Graph = field(repr=False)
    quality: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def model(self) -> onnx.ModelProto:
        """The result as a ModelProto, weights included."""
        return to_proto(self.graph)


def optimize(
    model: str | Path | onnx.ModelProto | bytes,
    output: str | Path | None = None,
    *,
    options: OptimizeOptions | None = None,
    progress: Progress | None = None,
    **wishes: Any,
) -> Result:
    """Make a model smaller and faster without changing what it computes.

    Args:
        model: Path, bytes, or a ModelProto (left as it is).
        output: Where to write the result; it appears only when complete and checked. None writes nothing.
        options: The wishes; ``wishes`` are the same by keyword.
        progress: Called with a line at each step.

    Returns:
        Figures before and after, what each pass did, and the proof.

    Raises:
        ModelError: The model is missing, damaged, or not to be run.
        EquivalenceError: No selection of passes kept the outputs (the original's copy would not be written silently).
        OutputError: The output cannot be written.
        RecipeError: A wish that cannot be met, such as an unknown pass.
    """
    chosen = options or OptimizeOptions(**wishes)
    with Runtime(timeout_s=chosen.timeout_s) as runtime:
        return _Job(model, None if output is None else Path(output), chosen, runtime, progress or (lambda line: None)).run()


class _Job:
    """One model on its way through; holds what the steps share."""

    def __init__(
        self,
        model: str | Path | onnx.ModelProto | bytes,
        output: Path | None,
        options: OptimizeOptions,
        runtime: Runtime,
        progress: Progress,
    ) -> None:
        self.started = time.monotonic()
        self.options = options
        self.runtime = runtime
        self.progress = progress
        self.output = output
        self.dropped: list[Dropped] = []
        self.selected = pipeline.select(options.only, options.skip)
        self.path: Path | None = None
        self.folder: Path | None = None
        if isinstance(model, onnx.ModelProto):
            self.label = model.graph.name or "model"
            self.proto = onnx.ModelProto()
            self.proto.CopyFrom(model)
        elif isinstance(model, bytes):
            self.label = "model"
            self.proto = parse_proto(model, "the given bytes")
        else:
            self.path = Path(model)
            self.label = str(model)
            self.proto = read_proto(self.path)
            self.folder = self.path.parent
        if output is not None:
            check_target(output)
        self.reshaped = set_input_shapes(self.proto, options.input_shapes, options.batch)
        self.reference: bytes | Path | None = None
        self.settings = Settings(
            max_constant_bytes=options.max_constant_bytes,
            allow_approximate=options.allow_approximate,
            evaluate=self._evaluate,
            **({"cost": Measured(runtime, threads=options.threads)} if options.cost == "measured" else {}),
        )

    def run(self) -> Result:
        graph = self._load()
        infer_shapes(graph)
        original_bytes = size_on_disk(self.path, graph) if self.path is not None else self.proto.ByteSize()
        before = figures(graph, original_bytes, download_bytes=None if self.path is None else gzip_bytes(self.path))
        with contextlib.ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxcompress-")))
            self.reference = self._reference(work)
            feeds = self._feeds() if self.options.check or self.options.verify_each or self._times else []
            while True:
                graph, passes = self._passes(feeds, work)
                staged = stack.enter_context(StagedFile(graph, self.output or work / "result.onnx"))
                grown = staged.size_bytes > original_bytes * GROWTH_LIMIT
                if grown and _clear_stamps(graph):
                    staged.discard()
                    staged = stack.enter_context(StagedFile(graph, self.output or work / "result.onnx"))
                    grown = staged.size_bytes > original_bytes * GROWTH_LIMIT
                unchanged = not passes.rewrites and not self.reshaped
                if grown and not unchanged:
                    self._retreat(f"the file would grow from {original_bytes} to {staged.size_bytes} bytes")
                    staged.discard()
                    continue
                comparison = None
                if self.options.check:
                    self.progress("checking")
                    comparison = self._check(graph, staged, feeds)
                    if not comparison.equivalent:
                        staged.discard()
                        self._blame(feeds, work, comparison)
                        continue
                latency = None if unchanged else self._latency(staged, feeds)
                if latency is not None and latency.high < SLOWER_LIMIT:
                    latency = self._latency(staged, feeds, budget_s=4 * self.options.latency_budget_s)
                    if latency is not None and latency.high < SLOWER_LIMIT:
                        self._retreat(f"it would be slower: {latency.original_ms:.3f} -> {latency.result_ms:.3f} ms")
                        staged.discard()
                        continue
                return self._finish(graph, passes, before, comparison, latency, staged, unchanged)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _load(self) -> Graph:
        return load(self.proto, folder=self.folder)

    @property
    def _times(self) -> bool:
        return self.options.measure_latency

    def _reference(self, work: Path) -> bytes | Path:
        """What onnxruntime is given as the original."""
        if self.path is not None:
            return for_runtime(self.path)
        if self.folder is None:
            return for_runtime(self.proto)
        raise ModelError("a model with external data must be given as a path")

    def _feeds(self) -> list[dict[str, Any]]:
        self.progress("finding inputs that the model accepts")
        reference = self.reference
        assert reference is not None
        if self.options.data is not None:
            from onnxcompress.validate import data_feeds

            return data_feeds(self.options.data, self.proto, limit=4, seed=self.options.seed)
        run_options = RunOptions(custom_ops=self.options.custom_ops)

        def run(feeds: Mapping[str, Any]) -> list[Any]:
            return self.runtime.run(reference, [feeds], options=run_options)[0]

        shapes = {name: tuple(shape) for name, shape in self.options.input_shapes.items()}
        return check_samples(self.proto, run, seed=self.options.seed, shapes=shapes, batch=self.options.batch)

    def _passes(self, feeds: list[dict[str, Any]], work: Path) -> tuple[Graph, PipelineResult]:
        graph = self._load()

        def verify(name: str, current: Graph) -> None:
            with StagedFile(current, work / "step.onnx") as staged:
                comparison = self._compare(staged.path, feeds)
            if not comparison.equivalent:
                raise _Guilty(name, comparison)

        while True:
            try:
                outcome = pipeline.run(
                    graph,
                    self.selected,
                    self.settings,
                    after_pass=verify if self.options.verify_each else None,
                    progress=lambda name, number: self.progress(f"round {number}: {name}"),
                )
                return graph, outcome
            except _Guilty as guilty:
                self._drop(guilty.name, guilty.comparison.message())
                graph = self._load()

    def _check(self, graph: Graph, staged: StagedFile, feeds: list[dict[str, Any]]) -> Comparison:
        changes = interface_differences(self.proto, skeleton(graph), initializers=False)
        if changes:
            raise PassError(f"the interface of {self.label} changed: {changes[0]}")
        self._check_structure(graph)
        return self._compare(staged.path, feeds)

    def _check_structure(self, graph: Graph) -> None:
        """The ONNX checker on the result, unless the original did not pass it either."""
        try:
            onnx.checker.check_model(skeleton(graph))
        except onnx.checker.ValidationError as error:
            try:
                onnx.checker.check_model(skeleton(self._load()))
            except onnx.checker.ValidationError:
                logger.info("%s does not pass the ONNX checker, before as after", self.label)
                return
            raise PassError(f"the result of {self.label} does not pass the ONNX checker: {_first_line(error)}") from error

    def _compare(self, candidate: Path, feeds: list[dict[str, Any]]) -> Comparison:
        assert self.reference is not None
        options = RunOptions(custom_ops=self.options.custom_ops)
        return compare(
            self.reference,
            for_runtime(candidate),
            feeds,
            self.runtime,
            tolerance=self.options.tolerance,
            options_reference=options,
            options_candidate=options,
        )

    def _latency(
        self, staged: StagedFile, feeds: list[dict[str, Any]], budget_s: float | None = None
    ) -> LatencyFigures | None:
        if not self._times or not feeds:
            return None
        assert self.reference is not None
        self.progress("timing")
        try:
            return compare_latency(
                self.runtime,
                self.reference,
                for_runtime(staged.path),
                feeds[0],
                threads=self.options.threads,
                custom_ops=self.options.custom_ops,
                budget_s=budget_s or self.options.latency_budget_s,
            )
        except RuntimeFailure as failure:
            logger.warning("latency was not measured: %s", failure)
            return None

    def _evaluate(self, model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
        return self.runtime.run(model.SerializeToString(), [feeds])[0]

    # -- going back --------------------------------------------------------------------------------------------------

    def _drop(self, name: str, reason: str) -> None:
        logger.warning("pass %s is left out: %s", name, reason)
        self.dropped.append(Dropped(name, reason))
        self.selected.discard(name)

    def _retreat(self, reason: str) -> None:
        """Leave out all merges, and if they were out already, everything."""
        merges = {cls.name for cls in pipeline.all_passes() if cls.is_merge} & self.selected
        self.dropped.append(Dropped("merges" if merges else "all passes", reason))
        self.selected = self.selected - merges if merges else set()

    def _blame(self, feeds: list[dict[str, Any]], work: Path, comparison: Comparison) -> None:
        """Find the pass that broke the model by checking after each, and leave it out.

        Raises:
            EquivalenceError: No single pass can be blamed, and nothing is left to leave out.
        """
        self.progress("the result differs; looking for the pass that did it")
        graph = self._load()
        guilty: list[_Guilty] = []

        def verify(name: str, current: Graph) -> None:
            with StagedFile(current, work / "step.onnx") as staged:
                found = self._compare(staged.path, feeds)
            if not found.equivalent:
                raise _Guilty(name, found)

        try:
            pipeline.run(graph, self.selected, self.settings, after_pass=verify)
        except _Guilty as found:
            guilty.append(found)
        if guilty:
            self._drop(guilty[0].name, guilty[0].comparison.message())
        elif self.selected:
            self._retreat(comparison.message())
        else:
            raise EquivalenceError(comparison.message())

    # -- the end -----------------------------------------------------------------------------------------------------

    def _finish(
        self,
        graph: Graph,
        passes: PipelineResult,
        before: Figures,
        comparison: Comparison | None,
        latency: LatencyFigures | None,
        staged: StagedFile,
        unchanged: bool,
    ) -> Result:
        infer_shapes(graph)
        after = figures(graph, staged.size_bytes, download_bytes=gzip_bytes(staged.path))
        if self.output is not None:
            staged.commit()
        return Result(
            source=self.label,
            output=self.output,
            before=before,
            after=after,
            passes=passes,
            dropped=self.dropped,
            comparison=comparison,
            latency=latency,
            seconds=time.monotonic() - self.started,
            unchanged=unchanged,
            graph=graph,
        )


class _Guilty(Exception):
    def __init__(self, name: str, comparison: Comparison) -> None:
        super().__init__(name)
        self.name = name
        self.comparison = comparison


def _clear_stamps(graph: Graph) -> bool:
    """Forget which pass made which node; returns whether there was anything to forget."""
    stamped = [node for inner in graph.walk() for node in inner.nodes if getattr(node, "made_by", "")]
    for node in stamped:
        node.made_by = ""
    return bool(stamped)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_target(output: Path) -> None:
    """Refuse, before the work, a target that cannot be written.

    Raises:
        OutputError: The folder is missing or not writable, or the target is a folder.
    """
    folder = output.parent
    if output.is_dir():
        raise OutputError(f"cannot write {output}: it is a folder")
    if not folder.is_dir():
        raise OutputError(f"cannot write {output}: the folder {folder} does not exist")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}") from error
