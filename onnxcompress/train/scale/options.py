"""The wishes for pruning several axes at once, the plan, and the result."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.channels.options import Goal
from onnxcompress.errors import RecipeError
from onnxcompress.measure import Figures, LatencyFigures
from onnxcompress.train.depth.options import finite
from onnxcompress.train.loop import TrainResult
from onnxcompress.train.scale.predictor import AXES, AxisFit
from onnxcompress.train.scale.solving import CrossCheck, Levels
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.supervision import Wishes

LETTERS = {"d": "depth", "w": "width", "r": "resolution"}
DEPTH_RANKINGS = ("fits", "probes")
WIDTH_RANKINGS = ("data", "magnitude")
MERGE_TOLERANCE = 1e-5  # largest max|d| / max|y| of merged and unmerged


def parse_axes(text: str) -> tuple[str, ...]:
    """Read ``d,w,r``.

    Raises:
        RecipeError: An axis is unknown, named twice, or there is none.
    """
    letters = [part.strip() for part in text.split(",") if part.strip()]
    if not letters or len(set(letters)) != len(letters) or not set(letters) <= set(LETTERS):
        raise RecipeError(f"axes {text!r}: choose some of d (depth), w (width), r (resolution), as in d,w")
    return tuple(axis for letter, axis in LETTERS.items() if letter in letters)


@dataclass(frozen=True)
class ScaleOptions:
    """What to do with a model.

    Args:
        data: Samples to train on, see ``onnxcompress.data``.
        val: Samples to judge by; also those that the predictor is fed with.
        goal: What is to be reached.
        axes: Of ``AXES``.
        rounds: Steps along each axis down to the goal.
        mixed: Points off the axes.
        round_epochs: Passes over the data after each step; a point off the axes has those of all rounds.
        candidates: Networks that are trained for as long as a point off the axes before one is chosen; with one the
            predictor alone decides.
        finalists: The best so many candidates are trained to the end.
        depth_ranking: "fits": what the outputs lose when a block alone goes and the rest is fitted; "probes": what a
            linear probe gains by a block.
        width_ranking: "data" or "magnitude", see ``channels``.
        only: Patterns of the only blocks, by name or kind, that may go.
        skip: Patterns of those that may not.
        round_to: Multiple of which the numbers of channels are.
        min_keep: Share of a group's channels that stays at least.
        native: Let the result take the smaller image itself; else it takes that of the original and makes it smaller.
        teacher: The model to distil from; the original when None.
        wishes: What to learn from; the teacher, and labels where there are any, when it says nothing.
        training: Of the result.
        calibration: Samples for fits and statistics.
        jobs: Processes for the points; None for one a processor.
        dask: Address of a Dask scheduler instead; its workers read the model and the samples from the same paths.
        augment: As in ``Augment.parse``.
        preprocess: How images are prepared.
        limit: At most so many samples of each source.
        tolerance: Largest difference between merged and unmerged.
        threads: Of torch for the result, and of onnxruntime where latency is measured; 0 is their choice.
        checkpoint: Folder for the state; beside the output when None, and removed when the output is there.
        resume: Go on from what is found there.
    """

    data: str = ""
    val: str = ""
    goal: Goal | None = None
    axes: tuple[str, ...] = AXES
    rounds: int = 4
    mixed: int = 3
    round_epochs: float = 1.0
    candidates: int = 6
    finalists: int = 2
    depth_ranking: str = "fits"
    width_ranking: str = "data"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    round_to: int = 8
    min_keep: float = 0.1
    native: bool = False
    teacher: Path | None = None
    wishes: Wishes = field(default_factory=Wishes)
    training: TrainSettings = field(default_factory=TrainSettings)
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
        if self.goal is None:
            raise RecipeError("there is nothing to reach: give --macs 0.5x or --latency 0.5x")
        if not self.axes or not set(self.axes) <= set(AXES):
            raise RecipeError(f"axes {','.join(self.axes)!r}: choose some of {', '.join(AXES)}")
        for name, value, known in (
            ("depth ranking", self.depth_ranking, DEPTH_RANKINGS),
            ("width ranking", self.width_ranking, WIDTH_RANKINGS),
        ):
            if value not in known:
                raise RecipeError(f"{name} {value!r}: choose {' or '.join(known)}")
        if self.rounds < 1 or self.mixed < 0:
            raise RecipeError(f"rounds {self.rounds}, mixed {self.mixed}: expected at least 1 and 0")
        if self.finalists < 1 or self.candidates < 1:
            raise RecipeError(f"candidates {self.candidates}, finalists {self.finalists}: expected at least 1")
        if not 0 < self.round_epochs < math.inf:
            raise RecipeError(f"round epochs {self.round_epochs:g}: expected more than 0")
        if self.calibration < 2:
            raise RecipeError(f"calibration {self.calibration}: expected at least 2 samples")
        if self.round_to < 1 or not 0 <= self.min_keep < 1:
            raise RecipeError(
                f"round to {self.round_to}, keep {self.min_keep:g}: expected at least 1, and a share below 1"
            )


@dataclass(frozen=True)
class Point:
    """One pruned network.

    Attributes:
        axis: Along which it was pruned, "mixed", "candidate" or "finalist".
        levels: In depth, width and resolution.
        sizes: What is left of each.
        macs: Multiply-accumulates.
        cost: What the goal is about, as a share of the original's.
        fitted: Validation figure before training.
        figure: After it.
        loss: What the training makes small, of the validation samples; NaN where they have no labels, and it is of
            labels.
        seconds: That it took; NaN where it is still to come.
    """

    axis: str
    levels: Levels
    sizes: tuple[float, float, float]
    macs: float
    cost: float
    fitted: float = math.nan
    figure: float = math.nan
    loss: float = math.nan
    seconds: float = math.nan

    @property
    def name(self) -> str:
        return f"{self.axis}-{'-'.join(map(str, self.levels))}"

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "name": self.name}


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        text: What was done or is being done.
        done: Parts done.
        total: Parts in all.
        seconds_left: Expected; None where nothing is known yet.
    """

    text: str
    done: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True)
class ScalePlan:
    """What a run would do.

    Attributes:
        source: The input file.
        goal: In words.
        original_macs: Of the input.
        points: On the axes, in the order of the rounds.
        mixed: Points off the axes that would follow.
        candidates: Networks that would be trained for a while, and
        finalists: to the end.
        axes: By axis the smallest size, what it costs alone, and why it cannot be pruned.
        triples: Networks within the goal.
        seconds: Expected for each part.
    """

    source: str
    goal: str
    original_macs: int
    points: list[Point]
    mixed: int
    candidates: int
    finalists: int
    axes: dict[str, dict[str, Any]]
    triples: int
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = finite(dataclasses.asdict(self))
        return found


@dataclass(frozen=True)
class Decision:
    """How the triple was chosen.

    Attributes:
        metric: Name of the figure.
        higher_is_better: Which way is up.
        samples: That it was measured on.
        base: Figure of the original.
        form: How the axes are put together: "product" or "sum".
        fits: By axis.
        points: All that the predictor was fed with.
        candidates: Networks that were trained for a while, the best one first; none where the predictor alone decided.
        chosen: Levels.
        sizes: What is left of each axis.
        predicted: Figure expected there.
        deviation: Its standard deviation.
        product: Figure by the fits alone.
        off_axis_error: Root mean square of measured less predicted by the fits alone, off the axes; None without.
        cost: Share of the original's cost.
        limit: Share that is allowed.
        triples: That were within the limit.
        check: Karush, Kuhn, Tucker.
        refusals: Why an axis was not pruned, by axis.
        seconds: That collecting took.
    """

    metric: str
    higher_is_better: bool
    samples: int
    base: float
    form: str
    fits: dict[str, AxisFit]
    points: list[Point]
    candidates: list[Point]
    chosen: Levels
    sizes: tuple[float, float, float]
    predicted: float
    deviation: float
    product: float
    off_axis_error: float | None
    cost: float
    limit: float
    triples: int
    check: CrossCheck
    refusals: dict[str, str]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain |= {
            "fits": [fit.as_dict() for fit in self.fits.values()],
            "points": [point.as_dict() for point in self.points],
            "candidates": [point.as_dict() for point in self.candidates],
            "check": dataclasses.asdict(self.check),
        }
        found: dict[str, Any] = finite(plain)
        return found


@dataclass(frozen=True)
class ScaleResult:
    """What came of it.

    Attributes:
        source: The input file.
        output: The file that was written.
        goal: In words.
        learned_from: In words.
        decision: How the triple was chosen; None where it was given.
        finalists: Networks that were trained to the end; the one with the least loss is the result.
        deleted: Names of the blocks that went.
        channels: Kept and all channels of each group that lost any.
        pixels: Height of what the network computes on, before and after.
        native: Whether the input is that small itself.
        before: Validation figure of the input, by onnxruntime.
        fitted: Of the pruned network before training.
        after: Of the output, by onnxruntime.
        figures_before: Nodes, bytes, MACs of the input.
        figures_after: Of the output.
        latency: Both in turns on onnxruntime.
        merge_error: max|d| / max|y| between merged and unmerged.
        training: Figures of the run.
        seconds: All in all.
    """

    source: str
    output: str
    goal: str
    learned_from: str
    metric: str
    samples: int
    decision: Decision | None
    finalists: list[Point]
    deleted: list[str]
    channels: dict[str, tuple[int, int]]
    pixels: tuple[int, int]
    native: bool
    before: float
    fitted: float
    after: float
    figures_before: Figures
    figures_after: Figures
    latency: LatencyFigures
    merge_error: float
    training: TrainResult
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity; what a figure of the fits needs is under "predictor"."""
        plain = dataclasses.asdict(dataclasses.replace(self, decision=None))
        del plain["decision"]
        plain["finalists"] = [point.as_dict() for point in self.finalists]
        plain["predictor"] = None if self.decision is None else self.decision.as_dict()
        found: dict[str, Any] = finite(plain)
        return found
