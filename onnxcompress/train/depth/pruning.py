"""``prune-depth``: make whole blocks of an .onnx file one operator each, or nothing, and keep its accuracy.

    plan       blocks are found; what each would save is counted, and measured where latency is the goal
    supernet   one network of all subnets: its pruned flows are fitted, or it is trained by the sandwich rule
    search     subnets are scored in it within the goal, BatchNormalization estimated anew before each
    train      the chosen blocks are fitted and trained, or fade from the original weights (progressive training)
    merge      the ordinary passes merge what is linear now; onnxruntime confirms the result

Each stage keeps its state in the checkpoint folder: a run that was stopped goes on with the same command.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnxcompress.errors import EquivalenceError
from onnxcompress.graph import Graph
from onnxcompress.measure import Figures, LatencyFigures, figures
from onnxcompress.model_io import StagedFile, load
from onnxcompress.runtime import REFERENCE, Runtime
from onnxcompress.train.checkpoint import Checkpoint, digest
from onnxcompress.train.depth.blocks import Block, Refusal
from onnxcompress.train.depth.compacting import compact
from onnxcompress.train.depth.costs import merge
from onnxcompress.train.depth.fitting import BlockFit, fit_blocks, fit_supernet
from onnxcompress.train.depth.given import RUNTIME_TIMEOUT_S, Given, Say, file_digest
from onnxcompress.train.depth.offers import Base, BudgetError, GoalKind, Offer, choose_blocks, measure_offers
from onnxcompress.train.depth.options import DepthOptions, DepthPlan, DepthResult
from onnxcompress.train.depth.planning import Planner, amount_text
from onnxcompress.train.depth.preparation import prepare
from onnxcompress.train.depth.scoring import Judge
from onnxcompress.train.depth.search import Budget, Evaluate, ScoreCache, SearchResult, search, shortlist
from onnxcompress.train.depth.supernet import Supernet, build_pruned
from onnxcompress.train.depth.training import Lambdas, settled, train_progressively, train_supernet
from onnxcompress.train.loop import Evaluation, Progress, TrainResult
from onnxcompress.train.supervision import Supervision
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.equivalence import Reference, read_model, run_model
from onnxcompress.validation.judge import METRIC_TOLERANCE
from onnxcompress.validation.signature import interface_differences

logger = logging.getLogger(__name__)

_COMPARED_BATCHES = 8
_PLANNED = 4096  # candidates whose figures a plan looks at
_ROUNDS = 6  # of searches under a budget that gets tighter, as the sum over blocks was too optimistic
_MARGIN = 0.02  # of latency: the structure that is trained has to meet the goal in a later measurement, too
_TIMINGS = 3  # of a result that seems to miss its goal
_SAFETY = 0.1  # of what was missing, in a tighter budget


def list_blocks(
    source: Path, options: DepthOptions, *, timed: bool = True, say: Say | None = None
) -> tuple[list[Offer], list[Refusal]]:
    """The blocks of a model with what pruning each would change, and what is no block and why."""
    with Runtime(timeout_s=RUNTIME_TIMEOUT_S) as runtime:
        graph = prepare(load(source), runtime=runtime)
        blocks, refusals = choose_blocks(
            graph, named_runs=options.named_runs, only=options.only, skip=options.skip, delete=options.delete
        )
        offers = measure_offers(
            graph,
            blocks,
            runtime,
            timed=timed,
            flows=options.flows,
            threads=options.threads or 1,
            say=say or (lambda line: None),
        )
    return offers, refusals


def plan_depth(source: Path, options: DepthOptions, *, say: Say | None = None) -> DepthPlan:
    """What ``prune_depth`` would do; nothing is written."""
    with (
        tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder,
        Given(source, None, options, say or (lambda line: None), Path(folder)) as given,
    ):
        return _Job(given).plan()


def prune_depth(
    source: Path,
    output: Path,
    options: DepthOptions,
    *,
    progress: Callable[[Progress], None] | None = None,
    say: Say | None = None,
) -> DepthResult:
    """Prune blocks of a model file.

    Args:
        source: The model.
        output: Where the result goes; may be ``source``.
        options: How.
        progress: Called after each step of a training.
        say: Told what is being done.

    Raises:
        RecipeError: The settings conflict with each other, the model or a checkpoint.
        DataError: The data does not fit the model, or there is none.
        ModelError: The model cannot be read, or holds an operator that cannot be trained through.
        BudgetError: The goal is out of reach.
        TrainingError: The loss is no number any more.
        EquivalenceError: onnxruntime does not confirm the result.
    """
    with Given(source, output, options, say or (lambda line: None)) as given:
        return _Job(given, progress).run()


@dataclass(frozen=True, eq=False)
class _Trained:
    """The chosen blocks pruned, in a twin."""

    twin: TorchGraph
    graph: Graph  # with the numbers of the twin
    supervision: Supervision
    fits: list[BlockFit]
    training: TrainResult | None


def _written(twin: TorchGraph, supernet: Supernet, blocks: Sequence[Block]) -> Graph:
    """The pruned graph with the numbers of a supernet's twin."""
    graph = build_pruned(supernet, blocks, [block.name for block in blocks])
    twin.to("cpu").write_back(graph)
    return graph


class _Job:
    """One model on its way."""

    def __init__(self, given: Given, progress: Callable[[Progress], None] | None = None) -> None:
        self.given, self.progress = given, progress
        self.planner = Planner(given)

    def run(self) -> DepthResult:
        assert self.given.output is not None
        options = self.given.options
        self.given.read()
        offers, base = self.planner.offers(timed=self._is_timed)
        names = [offer.name for offer in offers]
        supernet_run = found = None
        chosen = names
        if "search" in options.stages:
            budget = self.planner.budget(offers, base)
            supernet_run, found = self._search(offers, base, budget)
            chosen = [name for name, bit in zip(names, found.bits, strict=True) if bit == "1"]
        logger.info("pruning %s", ", ".join(chosen))
        blocks = [offer.block for offer in offers if offer.name in chosen]
        trained = self._train(blocks)
        return self._write(offers, blocks, trained, supernet_run, found)

    def plan(self) -> DepthPlan:
        options = self.given.options
        self.given.read()
        offers, base = self.planner.offers(timed=True)
        method, candidates = "", 0
        ends = ["1" * len(offers)]
        if options.goal is not None:
            budget = self.planner.budget(offers, base)
            method, candidates = options.search.method_for(budget), options.search.most_evaluations(budget)
            ends = list(itertools.islice(budget.candidates(), _PLANNED))

        def span(kind: GoalKind) -> tuple[float, float]:
            savings = [offer.saving(kind) for offer in offers]
            expected = [
                base.expected(kind, sum(saving for saving, bit in zip(savings, bits, strict=True) if bit == "1"))
                for bits in ends
            ]
            return min(expected), max(expected)

        return DepthPlan(
            source=str(self.given.source),
            goal=options.goal.text if options.goal is not None else "",
            offers=offers,
            refusals=self.given.refusals,
            base=base,
            method=method,
            candidates=candidates,
            macs=span("macs"),
            latency_ms=None if base.merged_ms is None else span("latency"),
            seconds=self.planner.expected_seconds(offers, candidates),
        )

    @property
    def _is_timed(self) -> bool:
        return self.given.options.goal is not None and self.given.options.goal.kind == "latency"

    def _search(self, offers: Sequence[Offer], base: Base, budget: Budget) -> tuple[TrainResult | None, SearchResult]:
        options = self.given.options
        blocks = [offer.block for offer in offers]
        supernet = self.given.build(blocks)
        twin = TorchGraph(supernet.graph)
        weights = digest(sorted(twin.state_dict().items()))  # a fit gives the same to some bits only
        trained = None
        if "supernet" in options.stages and options.supernet == "fitted":
            self.given.say("fitting the supernet")
            given = self.given
            supernet, _ = fit_supernet(supernet, given.original(), given.calibration, device=given.device)
            twin = TorchGraph(supernet.graph)
        supervision = self.given.supervise(twin)
        if "supernet" in options.stages and options.supernet == "trained":
            trained = self._train_supernet(twin, supernet, supervision, blocks)
            weights = digest(sorted(twin.state_dict().items()))
        twin.to(self.given.device)
        assert supervision.metric is not None
        self.given.say("searching")
        identity = {
            "supernet": weights,
            "supernet made": options.supernet if "supernet" in options.stages else "as it is",
            "model": file_digest(self.given.source),
            "blocks": [f"{block.name} {block.kind}" for block in blocks],
            "validation data": self.given.judged.identity(),
            "calibration": digest(
                (f"{number} {name}", value)
                for number, feeds in enumerate(self.given.calibration)
                for name, value in feeds.items()
            ),
            "metric": supervision.metric.name,
        }
        # Searches with and without a shortlist judge by other samples, and may share a folder.
        name, ranked = ("ranks.json", {"ranking": options.ranking}) if options.shortlists else ("scores.json", {})
        cache = ScoreCache(self.given.folder / name, identity | ranked, resume=options.resume)
        fitted: Evaluate | None = None
        if options.shortlists:
            whole = ScoreCache(self.given.folder / "fits.json", identity, resume=options.resume)
            assert supervision.expected is not None
            judge = Judge(supervision.metric, supervision.output, supervision.expected)
            fitted = whole.wrap(lambda wanted, report: self._score_fitted(blocks, judge, wanted, report))
        with self.given.scorer(twin, supernet, supervision) as scorer:
            return trained, self._search_within(offers, base, budget, cache.wrap(scorer), fitted)

    def _search_within(
        self, offers: Sequence[Offer], base: Base, budget: Budget, evaluate: Evaluate, fitted: Evaluate | None
    ) -> SearchResult:
        """Search, measure what was found as a whole, and search again where the sum over blocks promised too much."""
        goal, settings = self.given.options.goal, self.given.options.search
        assert goal is not None

        def told(evaluations: int, best: float) -> None:
            self.given.say(f"searching: {evaluations} subnets, best score {best:.4g}")

        limit = math.inf if goal.kind == "blocks" else base.limit(goal)
        reached = math.inf
        for _ in range(_ROUNDS):
            found = search(budget, evaluate, settings, progress=told)
            if fitted is not None:
                found = self._best_fitted(found, offers, fitted)
            if goal.kind == "blocks":
                return found
            chosen = [offer.block for offer, bit in zip(offers, found.bits, strict=True) if bit == "1"]
            reached = self.planner.measured(chosen, goal)
            if goal.kind == "latency":
                reached *= 1 + _MARGIN
            logger.info("%s with %d blocks: %s", goal.kind, len(chosen), amount_text(goal, reached, base))
            if reached <= limit:
                return found
            if not budget.is_enough(budget.most) or budget.need >= budget.most:
                break
            more = (reached - limit) * (1 + _SAFETY)
            budget = replace(budget, need=min(budget.most, budget.saved(found.bits) + more))
        self.planner.nearest(offers, base)
        raise BudgetError(
            f"{goal.text}: after {_ROUNDS} searches {goal.kind} is {amount_text(goal, reached, base)}, allowed "
            f"{amount_text(goal, limit, base)}; the measurement is noisy, or take --search exhaustive"
        )

    def _best_fitted(self, found: SearchResult, offers: Sequence[Offer], fitted: Evaluate) -> SearchResult:
        """The best of a search's shortlist, fitted as a whole."""
        listed = shortlist(found.ranked, [offer.is_deletion for offer in offers], self.given.options.shortlist)
        if len(listed) < 2:
            return found
        self.given.say(f"fitting the best {len(listed)} subnets")
        scores = dict(zip(listed, fitted(listed), strict=True))
        best = max(listed, key=scores.__getitem__)
        return replace(found, bits=best, score=scores[best])

    def _score_fitted(
        self,
        blocks: Sequence[Block],
        judge: Judge,
        wanted: Sequence[str],
        report: Callable[[Mapping[str, float]], None],
    ) -> None:
        """Fit subnets as training would find them, and score them."""
        given, original = self.given, self.given.original()
        for number, bits in enumerate(wanted, 1):
            given.say(f"fitting subnet {number} of {len(wanted)}")
            chosen = [block for block, bit in zip(blocks, bits, strict=True) if bit == "1"]
            supernet = given.build(chosen)
            twin = TorchGraph(supernet.graph)
            lambdas = Lambdas(twin, supernet.lambdas)
            twin.to(given.device)
            fit_blocks(twin, supernet, original, given.calibration, lambdas=lambdas)
            report({bits: judge.score(twin, given.validation)})

    def _train_supernet(
        self, twin: TorchGraph, supernet: Supernet, supervision: Supervision, blocks: Sequence[Block]
    ) -> TrainResult:
        options = self.given.options
        settings = replace(options.training, epochs=options.supernet_epochs, steps=None, patience=None, ema_decay=None)
        identity = self.given.identity(twin, supervision, blocks) | {"epochs": settings.epochs, "steps": None}
        self.given.say("training the supernet")
        assert supervision.objective is not None
        return train_supernet(
            twin,
            Lambdas(twin, supernet.lambdas),
            self.given.batches,
            supervision.objective,
            settings,
            checkpoint=Checkpoint(self.given.folder / "supernet", identity, resume=options.resume),
            progress=self.progress,
        )

    # -- the chosen blocks ---------------------------------------------------------------------------------------------

    def _train(self, blocks: Sequence[Block]) -> _Trained:
        given, options = self.given, self.given.options
        supernet = given.build(blocks)
        twin = TorchGraph(supernet.graph)
        lambdas = Lambdas(twin, supernet.lambdas)
        supervision = given.supervise(twin)
        identity = given.identity(twin, supervision, blocks) | {
            "start": options.start,
            "ramp": options.fading.share,
            "ramp shape": options.fading.shape,
            "merged": "before" if options.start == "fitted" else "after",
        }
        checkpoint = Checkpoint(given.folder / "train", identity, resume=options.resume)
        fits: list[BlockFit] = []
        twin.to(given.device)
        if "train" not in options.stages or checkpoint.load() is None:
            fits = self._start(twin, supernet, lambdas)
        if "train" not in options.stages:
            return _Trained(twin, _written(twin, supernet, blocks), supervision, fits, None)
        if options.start == "original":
            training = self._run(twin, supervision, checkpoint, lambdas)
            return _Trained(twin, _written(twin, supernet, blocks), supervision, fits, training)
        graph = _written(twin, supernet, blocks)
        compact(graph, blocks)
        twin = TorchGraph(graph)
        supervision = given.supervise(twin)
        training = self._run(twin, supervision, checkpoint, Lambdas(twin, {}))
        twin.to("cpu").write_back(graph)
        return _Trained(twin, graph, supervision, fits, training)

    def _run(self, twin: TorchGraph, supervision: Supervision, checkpoint: Checkpoint, lambdas: Lambdas) -> TrainResult:
        given, options = self.given, self.given.options
        assert supervision.metric is not None and supervision.objective is not None
        evaluation = Evaluation(
            lambda model: supervision.figure(model, given.judged, given.device),
            supervision.metric.name,
            supervision.metric.higher_is_better,
        )
        if not options.training.freeze_statistics:
            evaluation = settled(evaluation, given.calibration)
        given.say("training the pruned network")
        return train_progressively(
            twin.to(given.device),
            lambdas,
            given.batches,
            supervision.objective,
            options.training,
            ramp=options.fading,
            evaluation=evaluation,
            checkpoint=checkpoint,
            progress=self.progress,
        )

    def _start(self, twin: TorchGraph, supernet: Supernet, lambdas: Lambdas) -> list[BlockFit]:
        """Bring the weights to where training starts."""
        given, options = self.given, self.given.options
        if options.start == "fitted":
            given.say("fitting the pruned blocks")
            return fit_blocks(twin, supernet, given.original(), given.calibration, lambdas=lambdas)
        if "train" not in options.stages:
            given.say("estimating BatchNormalization")
            lambdas.set_all(1.0)
            given.settle(twin)
        return []

    # -- the result ----------------------------------------------------------------------------------------------------

    def _write(
        self,
        offers: list[Offer],
        blocks: Sequence[Block],
        trained: _Trained,
        supernet_run: TrainResult | None,
        found: SearchResult | None,
    ) -> DepthResult:
        twin, unmerged, supervision, training = trained.twin, trained.graph, trained.supervision, trained.training
        assert self.given.output is not None and supervision.metric is not None and supervision.expected is not None
        metric, options = supervision.metric, self.given.options
        said = supervision.figure(twin.to(self.given.device), self.given.judged, self.given.device)
        self.given.say("merging")
        merged = merge(unmerged, runtime=self.given.runtime)
        self.given.say("checking on onnxruntime")
        with self.given.staged(unmerged) as plain, StagedFile(merged, self.given.output) as staged:
            different = interface_differences(self.given.proto, read_model(staged.path))
            if different:
                raise EquivalenceError(f"the interface has changed: {different[0]}")
            error = self._merge_error(plain, staged.path)
            before = metric.measure(supervision.expected, self._outputs(self.given.source, supervision.output))
            after = metric.measure(supervision.expected, self._outputs(staged.path, supervision.output))
            off = abs(metric.drop(said, after, supervision.expected))
            allowed = max(METRIC_TOLERANCE, 1.5 / len(self.given.judged.dataset))
            if not off <= allowed:
                raise EquivalenceError(
                    f"{metric.name} is {after:.6g} on onnxruntime and {said:.6g} in torch, {off:.1e} apart, "
                    f"allowed {allowed:.1e}"
                )
            self.given.say("timing")
            result = figures(merged, staged.size_bytes)
            latency = self._timed(staged.path)
            self._check_goal(result, latency)
            staged.commit()
        if options.checkpoint is None:
            self._remove_state()
        return DepthResult(
            source=str(self.given.source),
            output=str(self.given.output),
            goal=options.goal.text if options.goal is not None else "",
            learned_from=supervision.text if training is not None or supernet_run is not None else "nothing",
            offers=offers,
            pruned=[block.name for block in blocks],
            deleted=[block.name for block in blocks if block.kind == "residual"],
            metric=metric.name,
            higher_is_better=metric.higher_is_better,
            samples=len(self.given.judged.dataset),
            before=before,
            after=after,
            figures_before=self.given.figures,
            figures_after=result,
            latency=latency,
            merge_error=error,
            supernet=supernet_run,
            found=found,
            fits=trained.fits,
            training=training,
            seconds=time.monotonic() - self.given.start,
        )

    def _outputs(self, path: Path, output: str) -> np.ndarray:
        feeds = (feed for feed, _ in self.given.judged.dataset.batches(self.given.judged.size))
        rows = run_model(self.given.runtime, path, feeds, REFERENCE, outputs=[output])
        return np.concatenate([np.atleast_1d(np.asarray(row[0], np.float32)) for row in rows])

    def _merge_error(self, unmerged: Path, merged: Path) -> float:
        """The largest difference of an output over its range.

        Raises:
            EquivalenceError: It is above the tolerance.
        """
        feeds = list(itertools.islice(self.given.judged.dataset.batches(self.given.judged.size), _COMPARED_BATCHES))
        reference = Reference(unmerged, [feed for feed, _ in feeds], self.given.runtime)
        comparison = reference.compare(merged, tolerance=self.given.options.tolerance, allowance=False)
        if not comparison.equivalent:
            raise EquivalenceError(
                f"merged and unmerged differ: {comparison.message()}; --tolerance allows more, the trained weights are "
                f"kept in {self.given.folder}"
            )
        return max((found.relative for found in comparison.outputs), default=0.0)

    def _timed(self, path: Path) -> LatencyFigures:
        """Latency of the result; timed again where it seems to miss a goal that its structure was measured to meet."""
        best = self.given.latency(path)
        for _ in range(_TIMINGS - 1):
            if self._latency_share(best) is None:
                break
            best = max(best, self.given.latency(path), key=lambda latency: latency.ratio)
        return best

    def _latency_share(self, latency: LatencyFigures) -> float | None:
        """The share of the original's latency that is allowed, where the result misses it."""
        goal = self.given.options.goal
        if goal is None or goal.kind != "latency":
            return None
        share = goal.amount if goal.relative else goal.amount / latency.original_ms
        return share if 1 / latency.high > share else None  # the interval of the measurement included

    def _check_goal(self, result: Figures, latency: LatencyFigures) -> None:
        """BudgetError where the written file would miss the goal."""
        goal = self.given.options.goal
        if goal is None or goal.kind == "blocks":
            return
        if goal.kind == "macs":
            limit = goal.amount * self.given.figures.macs if goal.relative else goal.amount
            if result.macs > limit:
                raise BudgetError(f"{goal.text}: the result has {result.macs:,} MACs, allowed {limit:,.0f}")
            return
        share = self._latency_share(latency)
        if share is not None:
            raise BudgetError(
                f"{goal.text}: the result takes {latency.result_ms:.3f} ms, {1 / latency.ratio:.3f}x of the original's "
                f"{latency.original_ms:.3f} ms, allowed {share:.3f}x; its weights are kept in {self.given.folder}: the "
                "same command times it again, on a machine that is less busy"
            )

    def _remove_state(self) -> None:
        for name in ("supernet", "train"):
            Checkpoint(self.given.folder / name, {}).remove()
        for name in ("plan.json", "scores.json", "ranks.json", "fits.json"):
            (self.given.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else lies there
            self.given.folder.rmdir()
