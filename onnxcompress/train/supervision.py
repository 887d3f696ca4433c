"""What a model is taught by, decided and checked before training: labels, a teacher, features, and the figure of merit.

Every misfit between data, model and teacher is found here, on one batch, with one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from onnxcompress.errors import DataError, ModelError, RecipeError
from onnxcompress.graph import Graph, is_op
from onnxcompress.train.batches import Batch, Batches
from onnxcompress.train.losses import Executor, LossSettings, WeightedSum
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.metrics import Metric, find_metric

DISTILL_LOSSES = ("auto", "kl", "mse")


@dataclass(frozen=True)
class Wishes:
    """What the user says about supervision; None and () leave it to the data.

    Args:
        labels: Learn from labels.
        distill: Learn from the teacher's outputs.
        output: The output that labels, metric and a choice of logits refer to; the first of floats when None.
        features: ``STUDENT`` or ``STUDENT=TEACHER`` names of tensors inside.
        distill_loss: "kl", "mse", or "auto": KL where an output of two axes may hold logits, else the squared error.
        metric: See ``validation.metrics``.
        losses: Weights of the terms.
    """

    labels: bool = False
    distill: bool = False
    output: str | None = None
    features: tuple[str, ...] = ()
    distill_loss: str = "auto"
    metric: str | None = None
    losses: LossSettings = field(default_factory=LossSettings)

    def __post_init__(self) -> None:
        if self.distill_loss not in DISTILL_LOSSES:
            raise RecipeError(f"distillation loss {self.distill_loss!r}: choose {', '.join(DISTILL_LOSSES)}")


@dataclass(frozen=True)
class Teacher:
    """A model under the student's names: inputs and outputs by name, or the only ones by position."""

    twin: TorchGraph
    inputs: Mapping[str, str]
    outputs: dict[str, str]

    def __call__(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        return self.of(Batch(feeds), outputs)

    def of(self, batch: Batch, outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The outputs for a batch, run or remembered."""
        asked = {name: self.outputs.get(name, name) for name in outputs or self.outputs}
        wanted = list(dict.fromkeys(asked.values()))

        def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = self.twin({theirs: feeds[ours] for ours, theirs in self.inputs.items()}, wanted)
            return found

        found = batch.outputs_of(self.twin, wanted, run)
        return {name: found[theirs] for name, theirs in asked.items()}


def make_teacher(twin: TorchGraph, student: TorchGraph) -> Teacher:
    """Match a teacher's interface with the student's.

    Raises:
        RecipeError: It takes an input that the student does not have, or has none of its outputs.
    """
    ours, theirs = student.input_names, twin.input_names
    inputs = {ours[0]: theirs[0]} if len(ours) == len(theirs) == 1 else {name: name for name in theirs}
    missing = [name for name in inputs if name not in ours]
    if missing:
        raise RecipeError(f"the teacher takes {', '.join(map(repr, missing))}, the model {', '.join(map(repr, ours))}")
    ours, theirs = student.output_names, twin.output_names
    outputs = {ours[0]: theirs[0]} if len(ours) == len(theirs) == 1 else {n: n for n in ours if n in theirs}
    if not outputs:
        raise RecipeError(f"the teacher gives {', '.join(map(repr, theirs))}, the model {', '.join(map(repr, ours))}")
    return Teacher(twin, inputs, outputs)


def label_kind(labels: Tensor, output: Tensor, source: str, name: str, *, varied: bool = True) -> str:
    """What labels are for an output, see ``losses.LABEL_KINDS``, after checking that they fit it.

    Args:
        labels: All of them.
        output: Of a few samples.
        source: Of the labels, for messages.
        name: Of the output.
        varied: Demand two classes at least.

    Raises:
        DataError: The shapes do not fit, a class index is out of range, or there is only one class.
    """
    shape, rows = tuple(output.shape[1:]), tuple(labels.shape[1:])
    per_sample, per_label = int(np.prod(shape)), int(np.prod(rows))
    if not labels.is_floating_point() and not (rows == shape and per_sample > 1):
        count = class_count(output, labels)
        if count is None:
            raise DataError(
                f"{source}: labels of shape {_text(rows)} do not fit output {name!r} {_text(shape)} a sample"
            )
        if count < 2:
            raise DataError(
                f"{source}: class indices need an output with a score per class, {name!r} has one value a sample: give "
                f"labels as floats to learn values"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= count:
            raise DataError(f"{source}: class {low if low < 0 else high}, output {name!r} has classes 0 to {count - 1}")
        if varied and low == high:
            raise DataError(f"{source}: all {len(labels)} labels are class {low}: there is nothing to tell apart")
        return "classes"
    if per_sample != per_label:
        raise DataError(f"{source}: labels of shape {_text(rows)} do not fit output {name!r} {_text(shape)} a sample")
    flat = labels.reshape(len(labels), -1).float()
    sums_to_one = bool(((flat.sum(1) - 1).abs() < 1e-3).all() and (flat >= 0).all())
    if per_sample > 1 and sums_to_one:
        if varied and bool((flat.argmax(1) == flat[0].argmax()).all()):
            raise DataError(f"{source}: all {len(labels)} labels are for class {int(flat[0].argmax())}")
        return "distribution"
    if not labels.is_floating_point():
        raise DataError(f"{source}: integer labels {_text(rows)} are neither class indices nor one-hot: give floats")
    return "values"


def class_count(output: Tensor, labels: Tensor) -> int | None:
    """Number of classes where the labels' shape lets the output hold logits, see ``losses.classes_first``."""
    shape, positions = tuple(output.shape), tuple(labels.shape[1:])
    if len(shape) < 2:
        return 1 if labels.numel() == len(labels) else None
    if shape[2:] == positions or (labels.numel() == len(labels) and all(size == 1 for size in shape[2:])):
        return int(shape[1])
    return int(shape[-1]) if shape[1:-1] == positions else None


def logits_of(graph: Graph, output: str) -> str:
    """The tensor before a final Softmax, which a loss computes itself; the output where there is none."""
    tensor = next(t for t in graph.outputs if t.name == output)
    node = graph.producer(tensor)
    return str(node.inputs[0].name) if node is not None and is_op(node, "Softmax") else output


@dataclass(frozen=True)
class Supervision:
    """What training minimizes and what it is judged by.

    Args:
        objective: For the loop; None for a run without gradients.
        metric: The figure of merit; None when nothing is known to compare with.
        output: The output that it is taken of.
        expected: (n, ...) what the validation samples should give.
        text: In words.
    """

    objective: WeightedSum | None
    metric: Metric | None
    output: str
    expected: np.ndarray | None
    text: str

    def figure(self, model: nn.Module, validation: Batches, device: torch.device) -> float:
        """The metric of a model, in evaluation mode."""
        assert self.metric is not None and self.expected is not None
        found = predict(model, (batch.to(device) for batch in validation.ordered()), self.output)
        return self.metric.measure(self.expected, found)


def predict(model: Executor, batches: Iterable[Batch], output: str) -> np.ndarray:
    """One output for all batches."""
    with torch.no_grad():
        found = [model(batch.feeds, [output])[output].float().cpu() for batch in batches]
    return torch.cat([value if value.dim() else value[None] for value in found]).numpy()


def supervise(
    twin: TorchGraph,
    training: Batches,
    validation: Batches | None,
    teacher: Teacher | None,
    wishes: Wishes,
    *,
    gradients: bool = True,
) -> Supervision:
    """Decide what the twin learns from, and check that all of it fits.

    Args:
        twin: The student, on the CPU.
        training: Its data.
        validation: None only without gradients.
        teacher: For distillation and features.
        wishes: Of the user.
        gradients: False for a run that only estimates statistics.

    Raises:
        RecipeError: There is nothing to learn from, or a name is unknown.
        DataError: Labels are missing or do not fit.
    """
    probe = next(training.ordered(2))
    with torch.no_grad():
        outputs = twin(probe.feeds, twin.output_names)
        floats = [name for name in twin.output_names if outputs[name].is_floating_point()]
        output = wishes.output or next(iter(floats), twin.output_names[0])
        if output not in outputs:
            raise RecipeError(f"output {output!r}: the model has {', '.join(map(repr, twin.output_names))}")
        tensor = logits_of(twin.graph, output)
        outputs = {**outputs, **twin(probe.feeds, [tensor])}
    objective, text = None, "statistics of BatchNormalization only"
    if gradients:
        objective = _objective(twin, training, teacher, wishes, outputs, probe, output, tensor)
        text = _text_of(objective)
    metric = expected = None
    if validation is not None:
        metric, expected = _judge(validation, teacher, wishes, outputs[output], output)
    return Supervision(objective, metric, output, expected, text)


def _objective(
    twin: TorchGraph,
    training: Batches,
    teacher: Teacher | None,
    wishes: Wishes,
    outputs: Mapping[str, Tensor],
    probe: Batch,
    output: str,
    tensor: str,
) -> WeightedSum:
    labels, source = training.labels, training.dataset.source
    use_labels = wishes.labels or (labels is not None and not wishes.distill)
    use_teacher = wishes.distill or (teacher is not None and not wishes.labels and not wishes.features)
    if use_labels and labels is None:
        raise DataError(f"{source} has no labels, and --labels asks for them: add an array `labels`, or distil")
    if wishes.distill and teacher is None:
        raise RecipeError("--distill needs a teacher: name it with --teacher")
    if wishes.features and teacher is None:
        raise RecipeError("--feature matches tensors of a teacher: name it with --teacher")
    if teacher is not None and not (use_teacher or wishes.features):
        raise RecipeError("--labels alone leaves the teacher out: add --distill or --feature, or name no teacher")
    if not (use_labels or use_teacher or wishes.features):
        raise RecipeError(
            f"{source} has no labels, so there is nothing to learn from: name with --teacher the model to learn from, "
            f"such as the one that this one was made of"
        )
    kind = "classes"
    if use_labels and labels is not None:
        kind = label_kind(labels, outputs[tensor], source, output)
        if kind == "values":
            tensor = output
    distilled: dict[str, int | None] = {}
    features = tuple((ours, other or ours) for ours, _, other in (text.partition("=") for text in wishes.features))
    if teacher is not None:
        partners = {n: t for n, t in teacher.outputs.items() if use_teacher and outputs[n].is_floating_point()}
        teacher = Teacher(teacher.twin, teacher.inputs, {})
        for name, theirs in partners.items():
            is_class = use_labels and kind == "classes" and name == output
            axis = _class_axis(outputs[name], wishes.distill_loss, is_class, name == output)
            ours = name if axis is None else logits_of(twin.graph, name)
            distilled[ours] = axis
            teacher.outputs[ours] = theirs if axis is None else logits_of(teacher.twin.graph, theirs)
    _check_teacher(twin, teacher, distilled, features, probe)
    if not (use_labels or distilled or features):
        raise RecipeError("no output of floats is shared with the teacher: match tensors inside, with --feature")
    objective = WeightedSum(wishes.losses, tensor if use_labels else None, kind, distilled or None, features, teacher)
    if any(p.requires_grad for p in twin.parameters()) and not objective(twin, probe).requires_grad:
        raise RecipeError(f"{_text_of(objective)}: no weight that is trained has a say in it")
    return objective


def _class_axis(output: Tensor, wish: str, is_class: bool, chosen: bool) -> int | None:
    """The axis of the classes where an output is taken for logits."""
    if not output.is_floating_point() or output.dim() < 2 or wish == "mse":
        return None
    if wish == "kl" and not chosen and output.dim() != 2:
        return None
    if wish == "kl" or is_class or output.dim() == 2:
        axis = -1 if output.dim() == 3 else 1
        return axis if output.shape[axis] > 1 else None
    return None


def _check_teacher(
    twin: TorchGraph,
    teacher: Teacher | None,
    distilled: Mapping[str, int | None],
    features: Sequence[tuple[str, str]],
    probe: Batch,
) -> None:
    if teacher is None or not (distilled or features):
        return
    pairs = [*((name, name) for name in distilled), *features]
    with torch.no_grad():
        try:
            ours = twin(probe.feeds, list(dict.fromkeys(name for name, _ in pairs)))
        except ModelError as error:
            raise RecipeError(f"the model: {error}") from error
        try:
            theirs = teacher(probe.feeds, list(dict.fromkeys(name for _, name in pairs)))
        except ModelError as error:
            raise RecipeError(f"the teacher: {error}") from error
    for name, other in pairs:
        if ours[name].shape != theirs[other].shape:
            raise RecipeError(
                f"{name!r} is {_text(ours[name].shape)}, the teacher's {other!r} {_text(theirs[other].shape)}: they "
                f"cannot be compared"
            )
        if not theirs[other].isfinite().all():
            raise RecipeError(f"the teacher gives NaN or infinity in {other!r}")


def _judge(
    validation: Batches, teacher: Teacher | None, wishes: Wishes, probe: Tensor, output: str
) -> tuple[Metric | None, np.ndarray | None]:
    """The metric, and what it expects."""
    labels, source = validation.labels, validation.dataset.source
    metric = find_metric(wishes.metric) if wishes.metric is not None else None
    if metric is not None and metric.labels == "needed" and labels is None:
        raise DataError(f"metric {metric.name} needs labels, and {source} has none: take agreement, mse or cosine")
    if labels is not None and (metric is None or metric.labels != "ignored"):
        if metric is None or metric.labels == "needed":
            kind = label_kind(labels, probe, source, output, varied=False)
            metric = metric or _default_metric(kind, probe, labels)
        return metric, labels.numpy()
    if teacher is None or output not in teacher.outputs:
        return None, None
    expected = predict(teacher, validation.ordered(), output)
    if metric is None:
        metric = find_metric("agreement" if probe.dim() == 2 and probe.shape[1] > 1 else "mse")
    return metric, expected


def _default_metric(kind: str, probe: Tensor, labels: Tensor) -> Metric:
    if kind == "values":
        return find_metric("mse")
    if labels.numel() == len(labels) or kind == "distribution":
        return find_metric("top1")
    axis = 1 if tuple(probe.shape[2:]) == tuple(labels.shape[1:]) else -1

    def accuracy(expected: np.ndarray, predicted: np.ndarray) -> float:
        return float(np.mean(predicted.argmax(axis=axis) == expected))

    return Metric("accuracy", accuracy, "needed")


def _text_of(objective: WeightedSum) -> str:
    parts = [f"labels ({objective.label_kind})"] if objective.label_output else []
    if objective.distilled:
        kinds = dict.fromkeys("logits" if axis is not None else "values" for axis in objective.distilled.values())
        parts.append(f"the teacher's {' and '.join(kinds)}")
    parts += [f"{len(objective.features)} features"] if objective.features else []
    return ", ".join(parts)


def _text(shape: Iterable[int]) -> str:
    return f"({', '.join(map(str, shape))})"
