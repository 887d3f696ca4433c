"""``optimize``: read a model, run the passes, prove that the result is the same and no worse, and write it.

Nothing is trusted. A result is written only when onnxruntime gives the same outputs, the interface is the same, the
file is not larger and the model not slower. Where it is, the guilty pass is found and left out, and what remains is
tried again; at the end of that road stands a copy of the original.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import onnx

from onnxcompress import pipeline
from onnxcompress.cost import CostModel, MacsAndBytes, Measured, count
from onnxcompress.errors import EquivalenceError, OutputError, PassError, RuntimeFailure
from onnxcompress.graph import Graph
from onnxcompress.interface import set_input_shapes
from onnxcompress.linear import Exactness
from onnxcompress.measure import Figures, LatencyFigures, compare_latency, figures, gzip_bytes, size_on_disk
from onnxcompress.model_io import StagedFile, check_replaceable, external_files, load, parse_proto, read_proto, to_proto
from onnxcompress.pipeline import PipelineResult
from onnxcompress.rewrite import Allowance, Settings
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.samples import check_samples
from onnxcompress.shapes import infer_shapes, skeleton
from onnxcompress.validation.comparison import Comparison
from onnxcompress.validation.equivalence import DEFAULT_TOLERANCE, Reference, for_runtime, run_model
from onnxcompress.validation.judge import data_feeds
from onnxcompress.validation.signature import interface_differences

logger = logging.getLogger(__name__)

GROWTH_LIMIT = 1.01  # times the original's bytes
NO_LIMIT = 1 << 30  # of approximate rewrites, before their error is known
TIMING_LIMIT_BYTES = 1 << 30  # timing holds both models in memory, the check only one
CHECK_SAMPLES = 4  # of the user's data
SLOWER_LIMIT = 0.97  # a ratio original / result below this, interval included, is slower
Progress = Callable[[str], None]


@dataclass(frozen=True)
class OptimizeOptions:
    """The user's wishes.

    Args:
        only: Names of the passes to run; all when empty.
        skip: Names of passes to leave out.
        level: 0 nothing, 1 cleanup, 2 also fusion and folding, 3 also merges.
        input_shapes: New shapes of inputs, by name; the interface changes accordingly, because it was asked for.
        batch: New size of the first axis of every input that has a dynamic one.
        check: Compare the result with the original on onnxruntime before it is written.
        verify_each: Compare after every pass that rewrote something, and leave out the one that breaks the model.
        tolerance: Largest max|d| / max|y| of an output.
        data: Samples for the check (see ``onnxcompress.data``) instead of seeded ones.
        max_constant_bytes: Constant folding makes no tensor larger than this.
        cost: ``estimate`` prices merges by MACs and bytes, ``measured`` times them on this machine.
        allow_approximate: Largest relative error at which approximate merges (class 4) are done; None forbids them.
        measure_latency: Time original and result, and refuse a slower result.
        measure_download: Measure the sizes after gzip as well, at about a second per 20 MB.
        threads: Threads within an operator for timing, 0 for onnxruntime's choice.
        latency_budget_s: How long the timing may take.
        custom_ops: Shared library with custom operators, for the check.
        seed: Seed of the check's inputs.
        timeout_s: Longest load or run of the model in the check.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    level: int = 3
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
    measure_download: bool = False
    threads: int = 0
    latency_budget_s: float = 0.25
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
    runtime: Runtime | None = None,
    **wishes: Any,
) -> Result:
    """Make a model smaller and faster without changing what it computes.

    Args:
        model: Path, bytes, or a ModelProto (left as it is).
        output: Where to write the result; it appears only when complete and checked. None writes nothing.
        options: The wishes; ``wishes`` are the same by keyword.
        progress: Called with a line at each step.
        runtime: Where models run; one of its own when None.

    Returns:
        Figures before and after, what each pass did, and the proof.

    Raises:
        ModelError: The model is missing, damaged, or not to be run.
        EquivalenceError: No selection of passes kept the outputs (the original's copy would not be written silently).
        OutputError: The output cannot be written.
        RecipeError: A wish that cannot be met, such as an unknown pass.
    """
    chosen = options or OptimizeOptions(**wishes)
    with contextlib.ExitStack() as stack:
        target = None if output is None else Path(output)
        runtime = runtime or stack.enter_context(Runtime(timeout_s=chosen.timeout_s))
        return _Job(model, target, chosen, stack, runtime, progress or (lambda line: None)).run()


class _Job:
    """One model on its way through; holds what the steps share."""

    def __init__(
        self,
        model: str | Path | onnx.ModelProto | bytes,
        output: Path | None,
        options: OptimizeOptions,
        stack: contextlib.ExitStack,
        runtime: Runtime,
        progress: Progress,
    ) -> None:
        self.started = time.monotonic()
        self.options = options
        self.stack = stack
        self.runtime = runtime
        self.helper: Runtime | None = None  # evaluates constants while the first one is looking for inputs
        self.progress = progress
        self.output = output
        self.dropped: list[Dropped] = []
        self.selected = pipeline.select(options.only, options.skip, options.level)
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
            check_target(output, external_files(self.proto, self.folder) if self.folder is not None else ())
        self.reshaped = set_input_shapes(self.proto, options.input_shapes, options.batch)
        self._reference: _Later[Reference] | None = None
        self.approximations = NO_LIMIT if options.allow_approximate is not None else 0
        self.cost: CostModel = MacsAndBytes()
        if options.cost == "measured":
            self.cost = Measured(self.runtime, threads=options.threads)

    def run(self) -> Result:
        graph = self._load()
        infer_shapes(graph)
        original_bytes = size_on_disk(self.path, graph) if self.path is not None else self.proto.ByteSize()
        download_bytes = gzip_bytes(self.path) if self.options.measure_download and self.path is not None else None
        before = figures(graph, original_bytes, download_bytes=download_bytes)
        with contextlib.ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxcompress-")))
            if self.options.check or self.options.verify_each or self.options.measure_latency:
                self.progress("finding inputs that the model accepts")
                self._reference = _Later(self._find_reference)
                if self.options.cost == "measured" or self.options.verify_each:
                    self._reference.result()  # nothing else may run while candidates are timed
            while True:
                graph, passes = self._passes(work)
                staged = stack.enter_context(StagedFile(graph, self.output or work / "result.onnx"))
                grown = staged.size_bytes > original_bytes * GROWTH_LIMIT
                if grown and _clear_stamps(graph):
                    staged.discard()
                    staged = stack.enter_context(StagedFile(graph, self.output or work / "result.onnx"))
                    grown = staged.size_bytes > original_bytes * GROWTH_LIMIT
                unchanged = not passes.rewrites and not self.reshaped
                if grown and passes.rewrites:  # a shape that the user asked for may cost its bytes
                    self._retreat(f"the file would grow from {original_bytes} to {staged.size_bytes} bytes")
                    staged.discard()
                    continue
                comparison = None
                if self.options.check:
                    self.progress("checking")
                    comparison = self._check(graph, staged)
                    if not comparison.equivalent:
                        staged.discard()
                        if not self._fewer_approximations(passes, comparison):
                            self._blame(work, comparison)
                        continue
                latency = None if unchanged else self._latency(staged)
                if latency is not None and latency.high < SLOWER_LIMIT and passes.rewrites:
                    latency = self._latency(staged, budget_s=4 * self.options.latency_budget_s)
                    if latency is not None and latency.high < SLOWER_LIMIT:
                        self._retreat(f"it would be slower: {latency.original_ms:.3f} -> {latency.result_ms:.3f} ms")
                        staged.discard()
                        continue
                return self._finish(graph, passes, before, comparison, latency, staged, unchanged)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _load(self) -> Graph:
        return load(self.proto, folder=self.folder)

    @property
    def reference(self) -> Reference | None:
        """The original on inputs that it accepts; waits until they are found."""
        return None if self._reference is None else self._reference.result()

    def _find_reference(self) -> Reference:
        model: str | Path | onnx.ModelProto | bytes
        if self.path is not None:
            model = self.path
        elif self.folder is None:
            model = self.proto
        run_options = RunOptions(custom_ops=self.options.custom_ops)
        if self.options.data is not None:
            feeds = data_feeds(self.options.data, self.proto, limit=CHECK_SAMPLES, seed=self.options.seed)
            return Reference(model, feeds, self.runtime, options=run_options)
        source = for_runtime(model)

        def run(feed: Mapping[str, Any]) -> list[Any]:
            return run_model(self.runtime, source, [feed], run_options)[0]

        shapes = {
            name: [size if isinstance(size, int) and size >= 0 else None for size in shape]
            for name, shape in self.options.input_shapes.items()
        }
        found = check_samples(self.proto, run, seed=self.options.seed, shapes=shapes, batch=self.options.batch)
        return Reference(model, found, self.runtime, options=run_options, outputs=found.outputs)

    def _passes(self, work: Path) -> tuple[Graph, PipelineResult]:
        graph = self._load()

        while True:
            try:
                outcome = pipeline.run(
                    graph,
                    self.selected,
                    self._settings(),
                    after_pass=self._verifier(work) if self.options.verify_each else None,
                    progress=lambda name, number: self.progress(f"round {number}: {name}"),
                )
                return graph, outcome
            except _Guilty as guilty:
                self._drop(guilty.name, guilty.comparison.message())
                graph = self._load()
            except PassError:
                _ = self.reference  # a model that onnxruntime refuses is the better reason
                raise

    def _verifier(self, work: Path) -> Callable[[str, Graph], None]:
        def verify(name: str, current: Graph) -> None:
            with StagedFile(current, work / "step.onnx") as staged:
                comparison = self._compare(staged.path)
            if not comparison.equivalent:
                raise _Guilty(name, comparison)

        return verify

    def _check(self, graph: Graph, staged: StagedFile) -> Comparison:
        changes = interface_differences(self.proto, read_proto(staged.path))
        if changes:
            raise PassError(f"the interface of {self.label} changed: {changes[0]}")
        self._check_structure(graph)
        return self._compare(staged.path)

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
            raise PassError(
                f"the result of {self.label} does not pass the ONNX checker: {_first_line(error)}"
            ) from error

    def _compare(self, candidate: Path) -> Comparison:
        assert self.reference is not None
        options = RunOptions(custom_ops=self.options.custom_ops)
        tolerance = max(self.options.tolerance, self.options.allow_approximate or 0.0)
        return self.reference.compare(candidate, tolerance=tolerance, options=options)

    def _latency(self, staged: StagedFile, budget_s: float | None = None) -> LatencyFigures | None:
        if not self.options.measure_latency or self.reference is None:
            return None
        if staged.size_bytes > TIMING_LIMIT_BYTES:
            logger.info("latency is not measured: two models of %s bytes would be held at once", staged.size_bytes)
            return None
        self.progress("timing")
        try:
            return compare_latency(
                self.runtime,
                for_runtime(self.reference.model),
                for_runtime(staged.path),
                min(self.reference.feeds, key=_feed_bytes),
                threads=self.options.threads,
                custom_ops=self.options.custom_ops,
                budget_s=budget_s or self.options.latency_budget_s,
            )
        except RuntimeFailure as failure:
            logger.warning("latency was not measured: %s", failure)
            return None

    def _evaluate(self, model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
        if self.helper is None:
            self.helper = self.stack.enter_context(Runtime(timeout_s=self.options.timeout_s))
        return self.helper.run(model.SerializeToString(), [feeds])[0]

    def _settings(self) -> Settings:
        return Settings(
            max_constant_bytes=self.options.max_constant_bytes,
            cost=self.cost,
            approximate=Allowance(self.approximations),
            evaluate=self._evaluate,
        )

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

    def _fewer_approximations(self, passes: PipelineResult, comparison: Comparison) -> bool:
        """Halve the number of approximate rewrites; False when there were none."""
        done = sum(
            rewrite.exactness is Exactness.APPROXIMATE for one in passes.results.values() for rewrite in one.done
        )
        if not done:
            return False
        self.approximations = done // 2
        self.dropped.append(Dropped(f"{done - self.approximations} of {done} approximate merges", comparison.message()))
        return True

    def _blame(self, work: Path, comparison: Comparison) -> None:
        """Find the pass that broke the model by checking after each, and leave it out.

        Raises:
            EquivalenceError: No single pass can be blamed, and nothing is left to leave out.
        """
        self.progress("the result differs; looking for the pass that did it")
        try:
            pipeline.run(self._load(), self.selected, self._settings(), after_pass=self._verifier(work))
        except _Guilty as guilty:
            self._drop(guilty.name, guilty.comparison.message())
            return
        if not self.selected:
            raise EquivalenceError(comparison.message())
        self._retreat(comparison.message())

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
        before = self._with_known_sizes(before, graph)
        download_bytes = gzip_bytes(staged.path) if self.options.measure_download else None
        after = figures(graph, staged.size_bytes, download_bytes=download_bytes)
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

    def _with_known_sizes(self, before: Figures, result: Graph) -> Figures:
        """MACs of the original again, where the result shows sizes that its shape arithmetic hid."""
        if before.macs_exact:
            return before
        original = self._load()
        infer_shapes(original, known={t.name: t for node in result.nodes for t in node.outputs if t.shape is not None})
        counted = count(original)
        return replace(before, macs=counted.macs, macs_exact=counted.exact)


T = TypeVar("T")


class _Later(Generic[T]):
    """A result that another thread is working on. A daemon: an interrupt does not wait for it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._found.append(work())
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

    def result(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]


class _Guilty(Exception):
    def __init__(self, name: str, comparison: Comparison) -> None:
        super().__init__(name)
        self.name = name
        self.comparison = comparison


def _feed_bytes(feed: Mapping[str, Any]) -> int:
    return sum(getattr(value, "nbytes", 0) for value in feed.values())


def _clear_stamps(graph: Graph) -> bool:
    """Forget which pass made which node; returns whether there was anything to forget."""
    stamped = [node for inner in graph.walk() for node in inner.nodes if getattr(node, "made_by", "")]
    for node in stamped:
        node.made_by = ""
    return bool(stamped)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_target(output: Path, sources: Iterable[Path] = ()) -> None:
    """Refuse, before the work, a target that cannot be written.

    Args:
        output: The target.
        sources: Data files of the input.

    Raises:
        OutputError: The folder is missing or not writable, or the target must not be replaced.
    """
    folder = output.parent
    check_replaceable(output, set(sources))
    if not folder.is_dir():
        raise OutputError(f"cannot write {output}: the folder {folder} does not exist")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}") from error
