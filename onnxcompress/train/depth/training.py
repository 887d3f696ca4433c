"""Train a supernet, and then a chosen subnet progressively (Liu et al. 2024).

The supernet learns by the sandwich rule (Yu et al. 2020): each step adds the gradients of three passes, one with no
block pruned, one with random blocks, one with all. It only has to rank subnets, so its training is short.

The chosen blocks are trained from the original weights: their lambdas go from 0 to 1 over the first part of training,
so that the network turns from the original into the pruned one step by step; then BatchNormalization settles. Weights
of before the end of the ramp belong to another network and are never kept.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from onnxcompress.errors import RecipeError
from onnxcompress.train.batches import Batch
from onnxcompress.train.batchnorm import Feeds, settle_statistics
from onnxcompress.train.checkpoint import Checkpoint
from onnxcompress.train.loop import Evaluation, Progress, StepBatches, TrainResult, train
from onnxcompress.train.losses import Objective
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.torch_graph import TorchGraph

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Ramp:
    """How lambda goes from 0 to 1.

    Args:
        share: Of the steps, over which it goes; 0 prunes at once.
        shape: One of ``SHAPES``; the cosine starts and ends slowly.
    """

    share: float = 0.4
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise RecipeError(f"ramp shape {self.shape!r} is unknown: choose {', '.join(SHAPES)}")
        if not 0 <= self.share < 1:
            raise RecipeError(f"ramp {self.share:g}: expected a share of the steps, 0 or more and below 1")

    def steps(self, total: int) -> int:
        """Steps with a lambda below 1; the last step is never among them."""
        return min(round(self.share * total), total - 1)

    def at(self, step: int, total: int) -> float:
        """Lambda during a step."""
        length = self.steps(total)
        if step >= length:
            return 1.0
        return step / length if self.shape == "linear" else (1 - math.cos(math.pi * step / length)) / 2

    def kept_from(self, total: int) -> int:
        """The first step whose weights were trained as the pruned network."""
        length = self.steps(total)
        return length + 1 if length else 0


class Lambdas:
    """The lambdas of a supernet's twin: no weights, and in no checkpoint or moving average of weights.

    Args:
        twin: Of the supernet; reads them from here from now on.
        names: The scalar initializer of each block.
    """

    def __init__(self, twin: TorchGraph, names: Mapping[str, str]) -> None:
        self.blocks = list(names)
        self.values = dict.fromkeys(names, 0.0)
        for block, name in names.items():
            twin.edit(name, functools.partial(self._value, block))

    def _value(self, block: str, held: Tensor) -> Tensor:
        return torch.full_like(held, self.values[block])

    def set_all(self, value: float) -> None:
        self.values.update(dict.fromkeys(self.blocks, value))

    def prune(self, blocks: Collection[str]) -> None:
        """Prune these blocks and no others."""
        self.values.update({block: float(block in blocks) for block in self.blocks})

    def set_bits(self, bits: str) -> None:
        """Prune the blocks whose bit is "1", and no others."""
        self.values.update(zip(self.blocks, map(float, bits), strict=True))


class Sandwich:
    """The sandwich rule as an objective, and as what moves its random pass on.

    Args:
        objective: Of one pass.
        lambdas: Of the model.
        seed: Same seed, same random subnets.
    """

    def __init__(self, objective: Callable[[nn.Module, Batch], Tensor], lambdas: Lambdas, seed: int = 0) -> None:
        self.objective, self.lambdas, self.seed = objective, lambdas, seed
        self._step = 0

    def on_step(self, step: int, total: int) -> None:
        self._step = step

    def bits(self, step: int) -> str:
        """The random subnet of a step."""
        rng = random.Random(f"{self.seed} {step}")
        return "".join("1" if rng.random() < 0.5 else "0" for _ in self.lambdas.blocks)

    def __call__(self, model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        count = len(self.lambdas.blocks)
        for bits in ("0" * count, self.bits(self._step), "1" * count):
            self.lambdas.set_bits(bits)
            yield self.objective(model, batch)


def train_supernet(
    twin: TorchGraph,
    lambdas: Lambdas,
    batches: StepBatches,
    objective: Callable[[nn.Module, Batch], Tensor],
    settings: TrainSettings,
    *,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a supernet by the sandwich rule; the last weights stay.

    Raises:
        TrainingError: The loss or a weight is no number any more.
        RecipeError: The checkpoint is of another run.
    """
    rule = Sandwich(objective, lambdas, settings.seed)
    return train(twin, batches, rule, settings=settings, checkpoint=checkpoint, progress=progress, on_step=rule.on_step)


def train_progressively(
    twin: TorchGraph,
    lambdas: Lambdas,
    batches: StepBatches,
    objective: Objective,
    settings: TrainSettings,
    *,
    ramp: Ramp,
    evaluation: Evaluation | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Turn the network into the pruned one while it trains; the best weights after the ramp stay, lambdas at 1.

    Args:
        twin: Of a supernet of the chosen blocks alone, with the original weights.
        lambdas: Of the twin.
        batches: To train on.
        objective: Of a pass.
        settings: How; patience counts from the end of the ramp on.
        ramp: How the lambdas rise.
        evaluation: Decides which weights are kept.
        checkpoint: Where the state is kept.
        progress: Called after each step.

    Raises:
        TrainingError: The loss or a weight is no number any more.
        RecipeError: The checkpoint is of another run.
    """
    total = settings.total_steps(batches.steps_per_epoch)

    def on_step(step: int, steps: int) -> None:
        lambdas.set_all(ramp.at(step, steps))

    lambdas.set_all(ramp.at(0, total))  # for the validation before the first step
    result = train(
        twin,
        batches,
        objective,
        settings=settings,
        evaluation=evaluation,
        checkpoint=checkpoint,
        progress=progress,
        on_step=on_step,
        best_from=ramp.kept_from(total),
    )
    lambdas.set_all(1.0)
    return result


def settled(evaluation: Evaluation, calibration: Sequence[Feeds]) -> Evaluation:
    """An evaluation that is preceded by new statistics of BatchNormalization."""

    def function(model: nn.Module) -> float:
        assert isinstance(model, TorchGraph)
        settle_statistics(model, calibration)
        return evaluation.function(model)

    return replace(evaluation, function=function)
