"""``prune-width``: channels taken out of an .onnx file until it has so many MACs, or so much latency, left.

prepare      cleanup; BatchNormalization stays, for its scales rank the channels
groups       which channels go together, and which stay and why
rank         by weights, or by what the layers read on calibration samples
allocate     what goes from which group, within the budget
compensate   with samples: weights that stay make up for what goes
check        the smaller graph against the large one with the channels made zero, on onnxruntime; where a mean or a
             LayerNormalization is taken over channels, over those that stay
optimize     the ordinary passes; written, compared, renamed into place
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcompress.channels.allocation import Allocation, BudgetError, Limits, allocate
from onnxcompress.channels.checking import compare_with_zeroed
from onnxcompress.channels.compensation import Fit, compensate, rank_by_data
from onnxcompress.channels.groups import Channels, Group, MacsModel, find_channels, share
from onnxcompress.channels.options import DEFAULT_LIMIT, WidthOptions
from onnxcompress.channels.preparing import prepare
from onnxcompress.channels.ranking import Ranking, given, magnitudes
from onnxcompress.channels.removing import remove_and_zero
from onnxcompress.codebook.evaluation import Judge, Quality
from onnxcompress.codebook.statistics import split_samples
from onnxcompress.cost import count
from onnxcompress.data import load_data
from onnxcompress.errors import EquivalenceError, RecipeError
from onnxcompress.measure import LatencyFigures, compare_latency, size_on_disk
from onnxcompress.model_io import StagedFile, external_files, load, read_proto, to_proto
from onnxcompress.optimizer import OptimizeOptions, check_target, optimize
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.samples import check_samples
from onnxcompress.shapes import infer_shapes
from onnxcompress.validation.equivalence import for_runtime, run_model
from onnxcompress.validation.judge import input_specs
from onnxcompress.validation.signature import interface_differences

logger = logging.getLogger(__name__)

BATCH = 16
HELD_OUT_SHARE = 0.25
JUDGED_SAMPLES = 16
COMPARED = 4  # batches on which the pruned graph is held against the zeroed one
CONTRACT_TOLERANCE = 1e-4  # max|d| / max|y|; sums are taken in another order, deep networks were at 1e-5
LATENCY_TRIALS = 6
Say = Callable[[str], None]


@dataclass(frozen=True)
class GroupRow:
    """One group of the result.

    Attributes:
        name: Of the group.
        channels: Before.
        kept: After.
        width: Elements of the tensor's axis for each.
        frozen: Why it had to stay; "" where it did not.
        approximate: Why the graph without its channels is not the graph with zeros in what makes them.
    """

    name: str
    channels: int
    kept: int
    width: int
    frozen: str = ""
    approximate: str = ""


@dataclass
class WidthResult:
    """What ``prune_width`` did, or would do.

    Attributes:
        source: Name of the input.
        output: Where the result is; None after a dry run.
        macs: Before and after.
        exact: Whether all sizes are known; nominal ones stand for the others.
        size_bytes: Before and after; None after a dry run.
        prunable: Share of all channels that can go.
        groups: Each with what stays.
        ranking: "data" or "magnitude".
        fits: Layers with new weights.
        contract_error: Largest max|d| / max|y| of the pruned graph against the zeroed one; None after a dry run.
        quality: Against the original on held-out samples; None without data.
        latency: Original and result; None where latency was not the goal.
        seconds: Wall time.
        notes: What the user should know.
    """

    source: str
    output: Path | None
    macs: tuple[int, int]
    exact: bool
    size_bytes: tuple[int, int] | None
    prunable: float
    groups: list[GroupRow]
    ranking: str
    fits: list[Fit] = field(default_factory=list)
    contract_error: float | None = None
    quality: Quality | None = None
    latency: LatencyFigures | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "input": self.source,
            "output": None if self.output is None else str(self.output),
            "macs": list(self.macs),
            "macs_exact": self.exact,
            "macs_ratio": round(self.macs[1] / max(self.macs[0], 1), 4),
            "size_bytes": None if self.size_bytes is None else list(self.size_bytes),
            "prunable_share": round(self.prunable, 4),
            "ranking": self.ranking,
            "contract_error": self.contract_error,
            "quality": None if self.quality is None else self.quality.as_dict(),
            "latency": None if self.latency is None else asdict(self.latency),
            "seconds": round(self.seconds, 3),
            "groups": [asdict(row) for row in self.groups],
            "fits": [asdict(fit) for fit in self.fits],
            "notes": self.notes,
        }


def prune_width(
    model: str | Path,
    output: str | Path | None,
    options: WidthOptions | None = None,
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    say: Say | None = None,
    runtime: Runtime | None = None,
    **wishes: Any,
) -> WidthResult:
    """Remove channels from a model file.

    Args:
        model: Path of the model.
        output: Where to write; it appears only when complete and checked. None for a dry run, or without a goal for a
            list of the groups.
        options: The wishes; ``wishes`` are the same by keyword.
        importance: Numbers for the channels of each group that may be pruned, instead of the rankings made here.
        say: Told what is being done.
        runtime: Where models run; one of its own when None.

    Raises:
        ModelError: The model is missing, damaged, or not to be run.
        DataError: The samples are missing or do not fit.
        RecipeError: The wishes conflict.
        BudgetError: The goal cannot be reached; names the nearest.
        EquivalenceError: onnxruntime does not confirm the result.
        OutputError: The output cannot be written.
    """
    chosen = options or WidthOptions(**wishes)
    with contextlib.ExitStack() as stack:
        runtime = runtime or stack.enter_context(Runtime(timeout_s=600.0))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxcompress-")))
        target = None if output is None else Path(output)
        return _Job(Path(model), target, chosen, importance, runtime, work, say or (lambda line: None)).run()


class _Job:
    """One model on its way; holds what the steps share."""

    def __init__(
        self,
        path: Path,
        output: Path | None,
        options: WidthOptions,
        importance: Mapping[str, np.ndarray] | None,
        runtime: Runtime,
        work: Path,
        say: Say,
    ) -> None:
        self.started = time.monotonic()
        self.path, self.output, self.options, self.runtime, self.say = path, output, options, runtime, say
        self.importance, self.work = importance, work
        self.notes: list[str] = []
        self.proto = read_proto(path)
        if output is not None:
            check_target(output, list(external_files(self.proto, path.parent)))
        self.say("preparing")
        original = load(path)
        infer_shapes(original)
        self.original_macs = count(original)
        self.original_bytes = size_on_disk(path, original)
        self.base = to_proto(prepare(original, runtime))  # cleaned up, with its weights
        self.run_options = RunOptions("off", custom_ops=options.custom_ops)

    def run(self) -> WidthResult:
        channels = self._channels(self.base)
        samples, held_out = self._samples()
        allowed = self._allowed(channels)
        if self.options.goal is None:
            return self._result(channels, {}, self.original_macs.macs, None, "")
        rankings = self._rankings(channels, allowed, samples, held_out)
        if self.options.goal.kind == "latency":
            allocation, latency = self._within_latency(channels, rankings, samples)
        else:
            budget = self.options.goal.limit(self.original_macs.macs)
            allocation, latency = self._allocate(channels, rankings, budget), None
        kind = "data" if self.options.ranks_by_data else "magnitude"
        if self.output is None:
            return self._result(channels, allocation.removed, allocation.macs, latency, kind)
        fits: list[Fit] = []
        base = self.base
        if samples and self.options.compensate:
            base, fits = self._compensated(allocation.removed, samples)
        error = self._check(base, allocation.removed, held_out or samples)
        result = self._result(channels, allocation.removed, allocation.macs, latency, kind)
        result.fits, result.contract_error = fits, error
        self._write(result, held_out or samples)
        return result

    # -- reading -----------------------------------------------------------------------------------------------------

    def _channels(self, proto: onnx.ModelProto) -> Channels:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        graph = load(copy)
        infer_shapes(graph)
        return find_channels(graph)

    def _samples(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if self.options.data is None or self.options.goal is None:
            return [], []
        self.say("reading samples")
        limit = self.options.limit or DEFAULT_LIMIT
        specs = input_specs(self.proto)
        data = load_data(
            self.options.data, inputs=specs, limit=limit, preprocess=self.options.preprocess, seed=self.options.seed
        )
        if len(data) < 32:
            self.notes.append(f"{len(data)} samples are few to calibrate with: 64 to 1,024 are better")
        size = self.options.batch or min(BATCH, max(1, len(data) // 8))
        feeds = [feed for feed, _ in data.batches(size)]
        numbers = split_samples(len(feeds), HELD_OUT_SHARE, self.options.seed)
        return [feeds[i] for i in numbers["fit"]], [feeds[i] for i in numbers["held_out"]]

    def _allowed(self, channels: Channels) -> set[str]:
        """Names of the groups that may be pruned."""
        free = [group for group in channels.groups if not group.frozen]
        for pattern in (*self.options.skip, *self.options.only):
            if not any(_named(group, pattern) for group in channels.groups):
                raise RecipeError(f"{pattern!r} names no channel group of {self.path}; --list-groups shows them")
        allowed = {g.name for g in free if not any(_named(g, pattern) for pattern in self.options.skip)}
        if self.options.only:
            return allowed & {g.name for g in free if any(_named(g, pattern) for pattern in self.options.only)}
        # Rankings see one layer at a time, and little of what a stream under LayerNormalizations is to all of them.
        near = {g.name: g.approximate for g in free if g.approximate and g.name not in (self.importance or {})}
        if near:
            name, why = next(iter(near.items()))
            self.notes.append(f"{len(near)} groups stay that only --only prunes, {name} among them: {why}")
        return allowed - near.keys()

    def _rankings(
        self,
        channels: Channels,
        allowed: set[str],
        samples: Sequence[Mapping[str, Any]],
        held_out: Sequence[Mapping[str, Any]],
    ) -> dict[str, Ranking]:
        if self.importance is not None:
            found = given(channels, self.importance)
        elif self.options.ranks_by_data:
            judged = _first(held_out or samples, JUDGED_SAMPLES)
            found = rank_by_data(channels, samples, self.runtime, judged=judged, seed=self.options.seed, say=self.say)
            silent = sorted(allowed - set(found))
            if silent:
                self.notes.append(
                    f"{len(silent)} groups stay, as no layer with statistics reads them: {silent[0]}, ..."
                )
        else:
            found = magnitudes(channels)
            if self.options.data is None:
                self.notes.append("ranked by weights alone: --data D ranks and compensates by what the layers read")
        return {name: ranking for name, ranking in found.items() if name in allowed}

    # -- deciding ----------------------------------------------------------------------------------------------------

    def _allocate(self, channels: Channels, rankings: Mapping[str, Ranking], budget: float) -> Allocation:
        # The cleaned graph may have fewer MACs than the file; both count the same otherwise.
        limits = Limits(self.options.round_to, self.options.min_keep)
        return allocate(channels, rankings, budget, limits)

    def _within_latency(
        self, channels: Channels, rankings: Mapping[str, Ranking], samples: Sequence[Mapping[str, Any]]
    ) -> tuple[Allocation, LatencyFigures]:
        """Look for the most MACs that are fast enough; each trial is pruned and timed beside the original."""
        goal = self.options.goal
        assert goal is not None
        feed = samples[0] if samples else next(iter(self._made_up()))
        start = MacsModel(channels).macs({})
        low, high = 0.0, 1.0
        best: tuple[Allocation, LatencyFigures] | None = None
        nearest = 1.0
        guess = goal.amount if goal.relative else 0.7
        for _ in range(LATENCY_TRIALS):
            try:
                allocation = self._allocate(channels, rankings, guess * start)
            except BudgetError:
                low = guess
                guess = (low + high) / 2
                continue
            pruned, _zeroed = remove_and_zero(self.base, allocation.removed)
            figures = self._timed(pruned, feed)
            self.say(f"{guess:.3f}x MACs: {1 / figures.ratio:.3f}x latency")
            wanted = goal.limit(figures.original_ms)
            nearest = min(nearest, 1 / figures.ratio)
            if figures.original_ms / figures.ratio <= wanted:
                low = guess
                if best is None or allocation.macs > best[0].macs:
                    best = (allocation, figures)
            else:
                high = guess
            guess = (low + high) / 2 if low else guess * 0.7
        if best is None:
            raise BudgetError(f"{goal.text} was not reached in {LATENCY_TRIALS} trials: {nearest:.3f}x is the nearest")
        return best

    def _timed(self, pruned: onnx.ModelProto, feed: Mapping[str, Any]) -> LatencyFigures:
        return compare_latency(
            self.runtime,
            for_runtime(self.path),
            for_runtime(pruned.SerializeToString()),
            feed,
            threads=self.options.threads,
            custom_ops=self.options.custom_ops,
        )

    def _compensated(
        self, removed: Mapping[str, Sequence[int]], samples: Sequence[Mapping[str, Any]]
    ) -> tuple[onnx.ModelProto, list[Fit]]:
        channels = self._channels(self.base)
        fits = compensate(channels, removed, samples, self.runtime, seed=self.options.seed, say=self.say)
        return to_proto(channels.graph), fits

    # -- the result --------------------------------------------------------------------------------------------------

    def _check(
        self, base: onnx.ModelProto, removed: Mapping[str, Sequence[int]], feeds: Sequence[Mapping[str, Any]]
    ) -> float:
        """Stage the pruned graph, and hold it against the zeroed one."""
        self.say("checking on onnxruntime")
        pruned, zeroed = remove_and_zero(base, removed)
        with StagedFile(load(pruned), self.work / "pruned.onnx") as staged:
            staged.commit()
        given_feeds = list(feeds[:COMPARED]) or list(self._made_up())
        comparison = compare_with_zeroed(
            pruned,
            zeroed,
            given_feeds,
            self.runtime,
            self.work,
            tolerance=CONTRACT_TOLERANCE,
            options=self.run_options,
        )
        if not comparison.equivalent:
            raise EquivalenceError(f"without its channels the graph is another than with zeros: {comparison.message()}")
        return comparison.relative

    def _made_up(self) -> Sequence[Mapping[str, Any]]:
        def run(feed: Mapping[str, Any]) -> list[Any]:
            return run_model(self.runtime, for_runtime(self.path), [feed], self.run_options)[0]

        return list(check_samples(self.proto, run, seed=self.options.seed))

    def _write(self, result: WidthResult, feeds: Sequence[Mapping[str, Any]]) -> None:
        assert self.output is not None
        staged_path = self.work / "pruned.onnx"
        if self.options.optimize:
            self.say("optimizing")
            wishes = OptimizeOptions(measure_latency=False, custom_ops=self.options.custom_ops, seed=self.options.seed)
            staged_path = self.work / "optimized.onnx"
            optimize(self.work / "pruned.onnx", staged_path, options=wishes, runtime=self.runtime)
        different = interface_differences(self.proto, read_proto(staged_path))
        if different:
            raise EquivalenceError(f"the interface has changed: {different[0]}")
        graph = load(staged_path)
        infer_shapes(graph)
        macs = count(graph).macs
        goal = self.options.goal
        if goal is not None and goal.kind == "macs" and macs > goal.limit(self.original_macs.macs):
            raise BudgetError(f"the file has {macs:,} MACs, allowed {goal.limit(self.original_macs.macs):,.0f}")
        result.macs = (self.original_macs.macs, macs)
        with StagedFile(graph, self.output) as staged:
            if feeds:
                self.say("measuring")
                result.quality = self._quality(staged.path, feeds)
            result.size_bytes = (self.original_bytes, staged.size_bytes)
            staged.commit()
        result.output = self.output
        result.seconds = time.monotonic() - self.started

    def _quality(self, path: Path, feeds: Sequence[Mapping[str, Any]]) -> Quality:
        labelled = None
        if self.options.val is not None:
            specs = input_specs(self.proto)
            labelled = load_data(self.options.val, inputs=specs, preprocess=self.options.preprocess)
        metric = None if labelled is None else self.options.metric or "top1"
        judge = Judge(
            self.path, feeds, self.runtime, metric=metric, labelled=labelled, custom_ops=self.options.custom_ops
        )
        return judge.judge(path)

    def _result(
        self,
        channels: Channels,
        removed: Mapping[str, Sequence[int]],
        macs: int,
        latency: LatencyFigures | None,
        ranking: str,
    ) -> WidthResult:
        rows = [
            GroupRow(g.name, g.size, g.size - len(removed.get(g.name, ())), g.width, g.frozen, g.approximate)
            for g in channels.groups
        ]
        near = [row for row in rows if row.approximate and row.kept < row.channels]
        if near:
            more = f", and so do {len(near) - 1} other groups" if len(near) > 1 else ""
            self.notes.append(f"{near[0].name} counts otherwise than with zeros, {near[0].approximate}{more}")
        return WidthResult(
            source=str(self.path),
            output=None,
            macs=(self.original_macs.macs, macs),
            exact=self.original_macs.exact,
            size_bytes=None,
            prunable=share(channels),
            groups=rows,
            ranking=ranking,
            latency=latency,
            seconds=time.monotonic() - self.started,
            notes=self.notes,
        )


def _named(group: Group, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (group.name, *group.producers))


def _first(feeds: Sequence[Mapping[str, Any]], samples: int) -> list[Mapping[str, Any]]:
    """Feeds with about so many samples."""
    found: list[Mapping[str, Any]] = []
    total = 0
    for feed in feeds:
        if total >= samples:
            break
        found.append(feed)
        total += max((np.shape(value)[0] for value in feed.values() if np.ndim(value)), default=1)
    return found
