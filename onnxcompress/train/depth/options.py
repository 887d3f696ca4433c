"""The wishes for a depth pruning, its plan, and its result."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnxcompress.errors import RecipeError
from onnxcompress.measure import Figures, LatencyFigures
from onnxcompress.train.depth.blocks import Refusal
from onnxcompress.train.depth.fitting import BlockFit
from onnxcompress.train.depth.kinds import FLOWS, Flow, Kind
from onnxcompress.train.depth.offers import Base, Goal, Offer
from onnxcompress.train.depth.search import SearchResult, SearchSettings
from onnxcompress.train.depth.training import Ramp
from onnxcompress.train.loop import TrainResult
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.supervision import Wishes

STAGES = ("supernet", "search", "train")
STARTS = ("fitted", "original")
SUPERNETS = ("fitted", "trained")
MERGE_TOLERANCE = 1e-5  # largest max|d| / max|y| of merged and unmerged


@dataclass(frozen=True)
class DepthOptions:
    """What to do with a model.

    Args:
        data: Samples to train on, see ``onnxcompress.data``.
        val: Samples to judge subnets and weights by.
        goal: What is to be reached; None only without a search: then all offered blocks are pruned.
        stages: Of ``STAGES``; without "supernet" subnets are ranked with the original weights, without "train" the
            statistics of BatchNormalization are all that is adapted.
        named_runs: First and last node of runs of convolutions to offer.
        only: Patterns of the names or kinds of the only blocks to offer.
        skip: Patterns of those not to offer.
        delete: Patterns of those to delete and not to merge.
        deletions: Whether a search for latency or MACs may delete a block as well as merge it; with a fitted supernet.
        activation: What inner activations become: "nothing", or "batchnorm".
        teacher: The model to distil from; the original when None.
        wishes: What to learn from; the original's outputs where there are no labels.
        training: Of the chosen blocks.
        supernet: "fitted": pruned flows have weights of their own, fitted block by block; "trained": shared weights,
            trained by the sandwich rule.
        supernet_epochs: Passes over the data for a supernet that is trained, with the same settings otherwise.
        start: What the chosen blocks are trained from: "fitted", pruned at once and their last linear operators fitted
            to what the blocks gave; or "original", the weights as they are.
        ramp: How the chosen blocks fade from the original weights; None for the usual one.
        search: How to look for them.
        shortlist: So many of the best subnets of a fitted supernet are fitted as a whole, and judged again.
        ranking: Where there is a shortlist, subnets are ranked for it on so many of the validation samples, about.
        calibration: Samples that BatchNormalization is estimated from.
        jobs: Processes for the search; None for one a processor.
        dask: Address of a Dask scheduler instead.
        augment: As in ``Augment.parse``.
        preprocess: How images are prepared.
        limit: At most so many samples of each source.
        tolerance: Largest difference between merged and unmerged.
        threads: Of torch, and of onnxruntime where latency is measured; 0 is their choice.
        checkpoint: Folder for the state; beside the output when None, and removed when the output is there.
        resume: Go on from what is found there.
    """

    data: str = ""
    val: str = ""
    goal: Goal | None = None
    stages: tuple[str, ...] = STAGES
    named_runs: tuple[tuple[str, str], ...] = ()
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()
    deletions: bool = True
    activation: str = "nothing"
    teacher: Path | None = None
    wishes: Wishes = field(default_factory=Wishes)
    training: TrainSettings = field(default_factory=TrainSettings)
    supernet: str = "fitted"
    supernet_epochs: float = 2.0
    start: str = "fitted"
    ramp: Ramp | None = None
    search: SearchSettings = field(default_factory=SearchSettings)
    shortlist: int = 8
    ranking: int = 512
    calibration: int = 256
    jobs: int | None = None
    dask: str | None = None
    augment: str = ""
    preprocess: str | None = None
    limit: int | None = None
    tolerance: float = MERGE_TOLERANCE
    threads: int = 0
    checkpoint: Path | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise RecipeError(f"stages {','.join(self.stages)!r}: choose some of {', '.join(STAGES)}")
        if "search" in self.stages and self.goal is None:
            raise RecipeError("there is nothing to reach: give --blocks 4, --latency 0.7x or --macs 0.5x")
        if "search" not in self.stages and self.goal is not None:
            raise RecipeError(f"{self.goal.text} can be reached by a search only: add search to the stages")
        if "search" not in self.stages and "supernet" in self.stages:
            raise RecipeError("the supernet is for the search: leave supernet out of the stages, or add search")
        if self.activation not in ("nothing", "batchnorm"):
            raise RecipeError(f"activation {self.activation!r}: choose nothing or batchnorm")
        if self.supernet not in SUPERNETS:
            raise RecipeError(f"supernet {self.supernet!r}: choose {' or '.join(SUPERNETS)}")
        if self.start not in STARTS:
            raise RecipeError(f"start {self.start!r}: choose {' or '.join(STARTS)}")
        if self.start == "fitted" and self.ramp is not None and self.ramp.share > 0:
            raise RecipeError(
                f"ramp {self.ramp.share:g}: blocks fade from the original weights only, fitted ones are pruned at "
                "once: give --start original, or no ramp"
            )
        if not 0 < self.supernet_epochs < math.inf:
            raise RecipeError(f"supernet epochs {self.supernet_epochs:g}: expected more than 0")
        if self.shortlist < 1:
            raise RecipeError(f"shortlist {self.shortlist}: expected at least 1")
        if self.ranking < 1:
            raise RecipeError(f"ranking {self.ranking}: expected at least 1 sample")
        if self.calibration < 2:
            raise RecipeError(f"calibration {self.calibration}: expected at least 2 samples")

    @property
    def shortlists(self) -> bool:
        """Whether the best subnets of the search are fitted as a whole before one is taken."""
        fitted = self.supernet == self.start == "fitted" and "supernet" in self.stages
        return fitted and self.shortlist > 1 and self.search.method != "random"

    @property
    def offers_deletions(self) -> bool:
        """Whether a merge and a deletion compete for a place."""
        has_use = self.goal is not None and self.goal.kind != "blocks"
        return self.deletions and has_use and "supernet" in self.stages and self.supernet == "fitted"

    @property
    def fading(self) -> Ramp:
        """The ramp that is meant."""
        if self.start == "fitted":
            return Ramp(0.0)
        return self.ramp or Ramp()

    @property
    def flows(self) -> dict[Kind, Flow]:
        return {kind: replace(flow, activation=self.activation) for kind, flow in FLOWS.items()}  # type: ignore[arg-type]


@dataclass(frozen=True)
class DepthPlan:
    """What a run would do.

    Args:
        source: The input file.
        goal: In words; "" where all offered blocks are pruned.
        offers: The blocks.
        refusals: What looked like a block.
        base: The network before.
        method: Of the search; "" without one.
        candidates: Subnets that would be scored, at most.
        macs: Smallest and largest expected among some candidates.
        latency_ms: Likewise.
        seconds: Expected for each stage.
    """

    source: str
    goal: str
    offers: list[Offer]
    refusals: list[Refusal]
    base: Base
    method: str
    candidates: int
    macs: tuple[float, float]
    latency_ms: tuple[float, float] | None
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["offers"] = [offer.as_dict() for offer in self.offers]
        plain["refusals"] = [dataclasses.asdict(refusal) for refusal in self.refusals]
        plain["base"] = dataclasses.asdict(self.base)
        found: dict[str, Any] = finite(plain)
        return found


@dataclass(frozen=True)
class DepthResult:
    """What came of it.

    Args:
        source: The input file.
        output: The file that was written.
        goal: In words.
        learned_from: In words.
        offers: The blocks that were offered.
        pruned: Names of those that were pruned, the deleted ones among them.
        deleted: Names of those that were deleted.
        metric: Name of the figure of merit.
        higher_is_better: Which way is up.
        samples: Validation samples.
        before: The figure of the input, by onnxruntime.
        after: That of the output.
        figures_before: Nodes, bytes, MACs of the input.
        figures_after: Of the output.
        latency: Both in turns on onnxruntime.
        merge_error: max|d| / max|y| between merged and unmerged.
        supernet: Figures of its training; None without.
        found: Of the search; None without.
        fits: Of the blocks that were pruned; empty where they were not fitted.
        training: Figures of the run; None without.
        seconds: All in all.
    """

    source: str
    output: str
    goal: str
    learned_from: str
    offers: list[Offer]
    pruned: list[str]
    deleted: list[str]
    metric: str
    higher_is_better: bool
    samples: int
    before: float
    after: float
    figures_before: Figures
    figures_after: Figures
    latency: LatencyFigures
    merge_error: float
    supernet: TrainResult | None
    found: SearchResult | None
    fits: list[BlockFit]
    training: TrainResult | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        plain = dataclasses.asdict(replace(self, offers=[]))
        plain["offers"] = [offer.as_dict() for offer in self.offers]
        found: dict[str, Any] = finite(plain)
        return found


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
