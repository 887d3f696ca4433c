"""The plan of a depth pruning: what is offered, what it saves, whether the goal is in reach, and the time it takes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxcompress.cost import count
from onnxcompress.errors import RecipeError
from onnxcompress.graph import Graph
from onnxcompress.train.checkpoint import difference
from onnxcompress.train.depth.blocks import Block
from onnxcompress.train.depth.costs import merge
from onnxcompress.train.depth.given import Given, file_digest
from onnxcompress.train.depth.offers import Base, BudgetError, Goal, Offer, largest, make_budget, measure_offers
from onnxcompress.train.depth.search import Budget, write_whole
from onnxcompress.train.depth.supernet import build_pruned
from onnxcompress.train.depth.training import Lambdas, Sandwich
from onnxcompress.train.torch_graph import TorchGraph

logger = logging.getLogger(__name__)


class Planner:
    """Figures of blocks and of whole subnets; measured once in a run, so that a resumed one has the same budget."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def offers(self, *, timed: bool) -> tuple[list[Offer], Base]:
        """What is offered, and the network before."""
        options = self.given.options
        path = self.given.folder / "plan.json"
        identity = {
            "model": file_digest(self.given.source),
            "blocks": [f"{block.name} {block.kind}" for block in self.given.blocks],
            "activation": options.activation,
            "threads": options.threads or 1,
            "timed": timed,
        }
        found = _read_plan(path, identity) if options.resume else None
        if found is None:
            self.given.say("counting and timing blocks" if timed else "counting blocks")
            offers = measure_offers(
                self.given.graph,
                self.given.blocks,
                self.given.runtime,
                timed=timed,
                flows=options.flows,
                threads=options.threads or 1,
                say=self.given.say,
            )
            found = offers, self._base(offers, timed)
            plain = {"identity": identity, "base": dataclasses.asdict(found[1]), "offers": [_stored(o) for o in offers]}
            write_whole(path, json.dumps(plain, indent=1))
        return self._offered(found[0]), found[1]

    def _offered(self, offers: list[Offer]) -> list[Offer]:
        """Those that have a place in the search."""
        goal = self.given.options.goal
        if goal is None or goal.kind == "blocks":
            return offers
        offered = [offer for offer in offers if offer.saving(goal.kind) > 0]
        for offer in offers:
            if offer not in offered:
                logger.info("block %s is not offered: pruned, it needs no less %s", offer.name, goal.kind)
        if not offered:
            raise BudgetError(f"{goal.text}: none of {len(offers)} blocks needs less {goal.kind} when it is pruned")
        return offered

    def _base(self, offers: Sequence[Offer], timed: bool) -> Base:
        merged = merge(self.given.graph, runtime=self.given.runtime)
        base = Base(self.given.figures.macs, count(merged).macs)
        if not timed:
            return base
        with self.given.staged(merged) as path:
            latency = self.given.latency(path)
        base = replace(base, latency_ms=latency.original_ms, merged_ms=latency.original_ms / latency.ratio)
        saving = largest(offers, "latency")
        return replace(base, pruned_ms=self._latency(saving, latency.original_ms)) if saving else base

    def budget(self, offers: Sequence[Offer], base: Base) -> Budget:
        """The budget of the search.

        Raises:
            RecipeError: The goal is reached as it is, or asks for more blocks than there are.
            BudgetError: It is out of reach.
        """
        goal = self.given.options.goal
        assert goal is not None
        budget = make_budget(goal, offers, base)
        if goal.kind != "blocks" and budget.need <= 0:
            raise RecipeError(f"{goal.text} is reached without pruning: onnxcompress optimize does it")
        if not budget.is_enough(budget.most):
            self.nearest(offers, base)  # raises, unless a second measurement says otherwise
            budget = replace(budget, need=budget.most)
        return budget

    def nearest(self, offers: Sequence[Offer], base: Base) -> None:
        """What pruning everything comes to.

        Raises:
            BudgetError: It is not enough.
        """
        goal = self.given.options.goal
        assert goal is not None
        everything = [offer.block for offer in offers] if goal.kind == "blocks" else largest(offers, goal.kind)
        reached = self.measured(everything, goal)
        limit = base.limit(goal)
        if reached > limit:
            raise BudgetError(
                f"{goal.text} is out of reach: with all {len(everything)} offered blocks pruned, {goal.kind} is "
                f"{amount_text(goal, reached, base)}, allowed {amount_text(goal, limit, base)}"
            )

    def measured(self, blocks: Sequence[Block], goal: Goal) -> float:
        """Latency or MACs of the whole network with these blocks pruned and merged."""
        if goal.kind == "macs":
            return float(count(self._merged(blocks)).macs)
        # In units of the original's latency as it was measured for the plan: the machine may be slower now.
        plan = _read_plan_base(self.given.folder / "plan.json")
        return self._latency(blocks, None if plan is None else plan.latency_ms)

    def _merged(self, blocks: Sequence[Block]) -> Graph:
        names = [block.name for block in blocks]
        pruned = build_pruned(self.given.graph, blocks, names, flows=self.given.options.flows)
        return merge(pruned, runtime=self.given.runtime)

    def _latency(self, blocks: Sequence[Block], original_ms: float | None) -> float:
        with self.given.staged(self._merged(blocks)) as path:
            latency = self.given.latency(path)
        return (latency.original_ms if original_ms is None else original_ms) / latency.ratio

    def expected_seconds(self, offers: Sequence[Offer], candidates: int) -> dict[str, float]:
        """From the time of a step and of a score."""
        options, settings = self.given.options, self.given.options.training
        self.given.say("timing a step and a score")
        supernet = self.given.build([offer.block for offer in offers])
        twin = TorchGraph(supernet.graph).to(self.given.device)
        lambdas = Lambdas(twin, supernet.lambdas)
        supervision = self.given.supervise(twin.to("cpu"))
        twin.to(self.given.device)
        objective = supervision.objective
        assert objective is not None
        batch = next(self.given.batches.at(0)).to(self.given.device)

        def step() -> float:
            start = time.monotonic()
            for loss in Sandwich(objective, lambdas)(twin.train(), batch):
                loss.backward()  # type: ignore[no-untyped-call]  # torch's
            return (time.monotonic() - start) * self.given.batches.accumulate

        step()
        each = min(step() for _ in range(2))
        every = self.given.batches.steps_per_epoch
        start = time.monotonic()
        self.given.settle(twin)
        fit = _FIT_PASSES * (time.monotonic() - start)  # of one block
        seconds = {}
        if "supernet" in options.stages and options.supernet == "fitted":
            seconds["supernet"] = fit * len(offers)
        elif "supernet" in options.stages:
            seconds["supernet"] = each * replace(settings, steps=None, epochs=options.supernet_epochs).total_steps(
                every
            )
        if "search" in options.stages:
            with self.given.scorer(twin, supernet, supervision) as scorer:
                start = time.monotonic()
                scorer_jobs = scorer.workers.jobs
                scorer.alone = True
                scorer(["1" * len(offers)], lambda scores: None)
                seconds["search"] = (time.monotonic() - start) * math.ceil(candidates / scorer_jobs)
        if options.start == "fitted":
            seconds["fit"] = fit * len(offers)
        if "train" in options.stages:
            seconds["train"] = each / 3 * settings.total_steps(every)
        return seconds


_FIT_PASSES = 3.0  # statistics, both networks, and the solution, in passes over the samples


def amount_text(goal: Goal, value: float, base: Base) -> str:
    whole = base.macs if goal.kind == "macs" else base.latency_ms or math.nan
    number = f"{value:,.0f}" if goal.kind == "macs" else f"{value:.3f} ms"
    return f"{value / whole:.3f}x ({number})"


def _stored(offer: Offer) -> dict[str, Any]:
    return dataclasses.asdict(offer)


def _read_plan(path: Path, identity: Mapping[str, Any]) -> tuple[list[Offer], Base] | None:
    """The plan of an earlier run of the same identity; None where there is none.

    Raises:
        RecipeError: It is of another run, or cannot be read.
    """
    if not path.exists():
        return None
    way_out = "--no-resume starts anew, --checkpoint names another folder"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs, base = found["identity"], Base(**found["base"])
        offers = [_offer(plain) for plain in found["offers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"the plan {path} cannot be read ({error}): {way_out}") from error
    changed = difference(theirs, json.loads(json.dumps(dict(identity))))
    if changed:
        raise RecipeError(f"the plan {path} is of another run: {changed}; {way_out}")
    return offers, base


def _read_plan_base(path: Path) -> Base | None:
    return Base(**json.loads(path.read_text(encoding="utf-8"))["base"]) if path.exists() else None


def _offer(plain: Mapping[str, Any]) -> Offer:
    def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    return Offer(**{**tuples(plain), "block": Block(**tuples(plain["block"]))})
