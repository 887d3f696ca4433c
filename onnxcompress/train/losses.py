"""What training makes small: the error on labels, the distance to a teacher's outputs and to its inner tensors.

classes         cross entropy with class indices, labels smoothed on request (Szegedy et al. 2016)
distribution    cross entropy with a probability per class
values          mean squared error
distillation    KL divergence from the teacher at a temperature T, times T^2 (Hinton et al. 2015), where an output
                holds logits; else the mean squared error over the mean square of the teacher's values
features        the same, of tensors inside, by name (Romero et al. 2015)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onnxcompress.errors import RecipeError
from onnxcompress.train.batches import Batch

# What a step minimizes. Each loss that it gives goes backward before the next is asked for, and gradients add up: a
# generator makes several passes with the memory of one. ``batch.weight`` is applied by the loop.
Objective = Callable[[nn.Module, Batch], "Tensor | Iterable[Tensor]"]

LABEL_KINDS = ("classes", "distribution", "values")


class Executor(Protocol):
    """What runs a graph: the trainable twin."""

    def __call__(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]: ...


class Teaching(Protocol):
    """What gives a teacher's outputs for a batch, under the student's names."""

    def of(self, batch: Batch, outputs: Sequence[str] | None = None) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class LossSettings:
    """Which terms count, and how much.

    Args:
        smoothing: Share of each class label that is spread over all classes.
        temperature: Logits of both models are divided by it for distillation.
        distill_weight: Share of distillation where there are labels, too; 1 - it is the share of the labels.
        feature_weight: Factor of the distance between features.
    """

    smoothing: float = 0.0
    temperature: float = 2.0
    distill_weight: float = 0.5
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise RecipeError(f"label smoothing {self.smoothing:g}: expected 0 or more and below 1")
        if not 0 < self.temperature < float("inf"):
            raise RecipeError(f"temperature {self.temperature:g}: expected more than 0")
        if not 0 <= self.distill_weight <= 1:
            raise RecipeError(f"distillation weight {self.distill_weight:g}: expected 0 to 1")
        if not 0 <= self.feature_weight < float("inf"):
            raise RecipeError(f"feature weight {self.feature_weight:g}: expected 0 or more")


@dataclass(frozen=True)
class WeightedSum:
    """An objective made of labels, a teacher's outputs, and features.

    Args:
        label_output: The tensor that labels are for: logits, or values. None without labels.
        label_kind: One of ``LABEL_KINDS``.
        distilled: By tensor, the axis of its classes where it holds logits, None where it holds values.
        features: Pairs of tensors, the student's and the teacher's.
        teacher: Needed where anything is distilled or matched; runs without gradients.
        settings: The weights.
    """

    settings: LossSettings
    label_output: str | None = None
    label_kind: str = "classes"
    distilled: Mapping[str, int | None] | None = None
    features: tuple[tuple[str, str], ...] = ()
    teacher: Teaching | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        settings, distilled = self.settings, self.distilled or {}
        wanted = [self.label_output] if self.label_output else []
        wanted += [*distilled, *(ours for ours, _ in self.features)]
        found: dict[str, Tensor] = model(batch.feeds, list(dict.fromkeys(wanted)))
        theirs: dict[str, Tensor] = {}
        if self.teacher is not None and (distilled or self.features):
            known = replace(batch, rows=None) if self.features else batch  # their first axis may be any
            with torch.no_grad():
                theirs = self.teacher.of(known, list(dict.fromkeys([*distilled, *(t for _, t in self.features)])))
        terms: list[Tensor] = []
        share = 1.0
        if self.label_output:
            assert batch.labels is not None
            share = settings.distill_weight
            weight = 1 - share if distilled else 1.0
            terms.append(
                weight * label_loss(found[self.label_output], batch.labels, self.label_kind, settings.smoothing)
            )
        for name, logits in distilled.items():
            terms.append(
                share / len(distilled) * output_distance(found[name], theirs[name], logits, settings.temperature)
            )
        for ours, other in self.features:
            weight = settings.feature_weight / len(self.features)
            terms.append(weight * relative_mse(found[ours].float(), theirs[other].float()))
        return torch.stack(terms).sum()


def label_loss(output: Tensor, labels: Tensor, kind: str, smoothing: float = 0.0) -> Tensor:
    """The loss on labels.

    Args:
        output: Logits, classes on axis 1 or, where the labels' shape says so, on the last; or values.
        labels: (n, ...) class indices, a distribution shaped like ``output``, or values shaped like it.
        kind: One of ``LABEL_KINDS``.
        smoothing: For classes and distributions.
    """
    output = output.float()
    if kind == "values":
        return F.mse_loss(output, labels.reshape(output.shape).to(output.dtype))
    if kind == "distribution":
        classes_last = output.reshape(len(output), -1)
        return F.cross_entropy(classes_last, labels.reshape(classes_last.shape).float(), label_smoothing=smoothing)
    return F.cross_entropy(*classes_first(output, labels), label_smoothing=smoothing)


def classes_first(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as (n, classes, ...) and labels as (n, ...): as they come, or from (n, ..., classes).

    Raises:
        ValueError: The shapes fit neither way.
    """
    shape = tuple(logits.shape)
    positions = tuple(labels.shape[1:])
    if len(shape) >= 2 and shape[2:] == positions:
        return logits, labels
    if len(shape) > 2 and shape[1:-1] == positions:
        return logits.movedim(-1, 1), labels
    if len(shape) > 2 and labels.numel() == len(logits) and all(size == 1 for size in shape[2:]):
        return logits.reshape(shape[:2]), labels.reshape(-1)  # (n, classes, 1, 1)
    if len(shape) == 2 and labels.numel() == len(logits):
        return logits, labels.reshape(-1)
    raise ValueError(f"logits {shape} and labels {tuple(labels.shape)} do not fit")


def output_distance(student: Tensor, teacher: Tensor, axis: int | None, temperature: float) -> Tensor:
    """How far an output is from the teacher's: logits with their classes on ``axis``, or values."""
    student, teacher = student.float(), teacher.float()
    if axis is None:
        return relative_mse(student, teacher)
    log_p, log_q = (F.log_softmax(values / temperature, dim=axis) for values in (student, teacher))
    divergence = (log_q.exp() * (log_q - log_p)).sum(dim=axis).mean()
    return divergence * temperature**2


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the mean square of the teacher: 1 for a student that gives zeros."""
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(torch.finfo(teacher.dtype).tiny)
