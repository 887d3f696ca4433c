"""Tune the codebooks of a quantized graph toward the float model, from unlabelled samples.

    joint   codebooks, factors per output and biases of all layers at once; BatchNormalization keeps its statistics
    full    the recipe of Stock et al. 2020 ("And the Bit Goes Down", ICLR): first layer after layer, from the input on,
            those behind it still in float; then all together with BatchNormalization in training mode. The gradient of
            a codeword is averaged over its sub-vectors in both parts.

Indices never change. What is made small is the distance to the float model at its outputs, behind which nothing is
saturated, and where its branches join again. Held-out samples decide which weights are kept, those before tuning
included, so that on these samples the result is never worse. Where the paper fits each codebook on the output of
layers that are tuned already, here all are fitted before: tuning then starts from the file as it would be shipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from onnxcompress.codebook.damage import find_taps
from onnxcompress.cost import count
from onnxcompress.data import Dataset
from onnxcompress.errors import QuantizationError
from onnxcompress.graph import Graph, is_op
from onnxcompress.model_io import load
from onnxcompress.patterns.decoded_weights import CodebookWeight, find_codebooks
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.batches import Batch, Batches
from onnxcompress.train.checkpoint import Checkpoint
from onnxcompress.train.loop import Evaluation, Progress, TrainSettings, train
from onnxcompress.train.losses import relative_mse
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.train.weights import enters_as_weight, weight_tensors

Feeds = Mapping[str, np.ndarray]

_INT8_LIMIT = 127
_MIN_SCALE = 0.02  # a bias of zeros moves, too
_JOINS = 12
_WORK_MACS = 4e12  # about two minutes on one core
_PASSES = 4  # a forward pass of the teacher, and one forward and backward of the student
_STEPS = (100, 800)
_EPOCHS = 30
_VALIDATIONS = 8
_STEPS_BETWEEN_VALIDATIONS = 200  # at most


@dataclass(frozen=True)
class TuneSettings:
    """How long and how fast.

    Args:
        steps: Of the joint part; None is what takes about two minutes on one core, 100 to 800 and at most 30 passes
            over the samples.
        layer_steps: Of each layer in the first part of ``full``.
        batch: Samples in a step.
        rate: Highest change of a number in a step, relative to the root mean square of its tensor. At 2e-2 the error
            grows before it falls far below where 3e-3 ends.
        patience: Validations in a row without a new best that end the run; there are 8. None, because the error
            grows first.
        seed: Same seed, same result.
    """

    steps: int | None = None
    layer_steps: int = 30
    batch: int = 32
    rate: float = 2e-2
    patience: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TuneResult:
    """What tuning brought.

    Args:
        before: Relative error at the outputs on held-out samples, before.
        after: The same, of the weights that are now in the graph.
        steps: Steps done.
        seconds: Of the run.
        changed: Names of the initializers that changed.
    """

    before: float
    after: float
    steps: int
    seconds: float
    changed: list[str]


def tune(
    graph: Graph,
    feeds: Sequence[Feeds],
    held_out: Sequence[Feeds],
    *,
    reference_model: str | Path,
    mode: Literal["joint", "full"] = "joint",
    settings: TuneSettings | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TuneResult:
    """Tune the codebooks of ``graph`` in place.

    Args:
        graph: Quantized; its codebooks, factors and biases change, each rounded to its stored type.
        feeds: Samples to tune on.
        held_out: Samples that decide what is kept; those of ``feeds`` where there are none.
        reference_model: The float model with the same interface.
        mode: See the top of this module.
        settings: How long and how fast.
        checkpoint: Where the state of the joint part is kept, and taken up from.
        progress: Called after each step.

    Raises:
        ModelError: An operator of the graph has no counterpart in torch.
        QuantizationError: The graph has no codebook, or there are no samples.
        TrainingError: The loss became NaN or infinite.
    """
    settings = settings or TuneSettings()
    codebooks = find_codebooks(graph)
    if not codebooks:
        raise QuantizationError("the graph has no codebook to tune")
    if not feeds:
        raise QuantizationError("tuning needs samples: give --data")
    student = Student(graph, codebooks)
    teacher = Teacher(reference_model)
    objective = Distance(student, teacher)
    fit, judged = (_batches(given, graph, settings) for given in (feeds, held_out or feeds))
    evaluation = Evaluation(lambda model: objective.error(judged.ordered()), "relative error", higher_is_better=False)
    before = objective.error_of(judged)
    steps, seconds = 0, 0.0
    if mode == "full":
        done = _layer_by_layer(student, fit, objective, settings, progress)
        steps, seconds = done
    total = settings.steps or _affordable_steps(teacher, settings.batch, fit.steps_per_epoch)
    if mode == "full" and objective.error_of(judged) > before:
        student.restore()  # the layers one by one made it worse: the joint part starts from the file
    result = train(
        student,
        fit,
        objective,
        settings=_train_settings(settings, total, freeze_statistics=mode == "joint"),
        evaluation=evaluation,
        checkpoint=checkpoint,
        groups=student.groups(settings.rate),
        on_gradients=student.average_gradients if mode == "full" else None,
        progress=progress,
    )
    after = objective.error_of(judged)
    if after > before:
        student.restore()
        after = before
    changed = student.write_back(graph)
    return TuneResult(before, after, steps + result.steps, seconds + result.seconds, changed)


class Student(nn.Module):
    """The twin of a quantized graph; what decodes its weights is trained, and vectors such as biases.

    Codewords in int8 are trained as floats that are rounded on their way, with the gradient passed straight through.
    """

    def __init__(self, graph: Graph, codebooks: Sequence[CodebookWeight]) -> None:
        super().__init__()
        decoding = {str(c.name) for one in codebooks for c in (one.codebook, one.codebook_scale, one.scales) if c}
        narrow = {
            name
            for name, tensor in weight_tensors(graph)
            if tensor.shape is not None
            and sum(size != 1 for size in tensor.shape) <= 1
            and enters_as_weight(graph, tensor, tuple(tensor.shape))
        }
        self.twin = TorchGraph(graph, trainable=lambda name: name in decoding or name in narrow)
        self.codebooks = list(codebooks)
        self.masters = nn.ParameterList()
        self.names: list[str] = []
        for one in codebooks:
            name = str(one.codebook.name)
            if one.codebook.dtype == np.int8 and name not in self.names:
                master = nn.Parameter(self.twin.get_buffer(name).to(torch.float32))
                self.masters.append(master)
                self.names.append(name)
                self.twin.edit(name, _giving(master))
        self.start = {name: value.detach().clone() for name, value in self.state_dict().items()}
        self.counts: dict[str, Tensor] = {}
        for one in codebooks:  # several layers may share one
            name = str(one.codebook.name)
            self.counts[name] = self.counts[name] + _counts(one) if name in self.counts else _counts(one)

    def forward(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.twin(feeds, outputs)
        return found

    def parameter_of(self, name: str) -> nn.Parameter:
        """The parameter behind an initializer."""
        return self.masters[self.names.index(name)] if name in self.names else self.twin.get_parameter(name)

    def groups(self, rate: float, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Each tensor with a learning rate in proportion to its numbers."""
        wanted = names if names is not None else [*self.names, *dict(self.twin.named_parameters())]
        found = []
        for name in dict.fromkeys(wanted):
            parameter = self.parameter_of(name)
            scale = float(parameter.detach().square().mean().sqrt())
            found.append({"params": [parameter], "lr": rate * max(scale, _MIN_SCALE), "weight_decay": 0.0})
        return found

    def average_gradients(self, step: int) -> None:
        """Divide the gradient of each codeword by the number of sub-vectors that are stored as it."""
        for name, counts in self.counts.items():
            gradient = self.parameter_of(name).grad
            if gradient is not None:
                gradient /= counts.clamp(min=1)[:, None].to(gradient.device)

    def restore(self) -> None:
        """Go back to the numbers of the file."""
        self.load_state_dict(self.start)

    def write_back(self, graph: Graph) -> list[str]:
        changed = self.twin.write_back(graph)
        constants = {str(one.codebook.name): one.codebook for one in self.codebooks}
        for name, master in zip(self.names, self.masters, strict=True):
            values = _rounded(master.detach()).cpu().numpy().astype(np.int8)
            if not np.array_equal(values, constants[name].values):
                constants[name].values = values
                changed.append(name)
        return changed


class Teacher:
    """The float model, in evaluation mode and without gradients."""

    def __init__(self, path: str | Path) -> None:
        self.graph = load(path)
        infer_shapes(self.graph)
        self.twin = TorchGraph(self.graph, trainable=lambda name: False)

    def __call__(self, feeds: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            found: dict[str, Tensor] = self.twin(feeds, outputs)
        return found


class Distance:
    """How far the student is from the teacher: an objective for training, and an error for judging.

    Args:
        student: Trained.
        teacher: Followed, at the tensors that ``damage.find_taps`` names and where branches join.
    """

    def __init__(self, student: Student, teacher: Teacher) -> None:
        self.student, self.teacher = student, teacher
        there = {str(tensor.name) for tensor in student.twin.graph.tensors().values()}
        taps = {tap.name: tap.classes for tap in find_taps(teacher.graph) if tap.name in there}
        self.classes = {name for name, classes in taps.items() if classes}
        self.taps = list(taps) or list(student.twin.output_names)
        self.joins = [name for name in _joins(teacher.graph) if name in there and name not in self.taps]
        self.wanted = [*self.taps, *self.joins]

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        ours, theirs = self._centred(model(batch.feeds, self.wanted), self.teacher(batch.feeds, self.wanted))
        outside = [relative_mse(ours[name].float(), theirs[name].float()) for name in self.taps]
        inside = [relative_mse(ours[name].float(), theirs[name].float()) for name in self.joins]
        loss = torch.stack(outside).mean()
        return loss + torch.stack(inside).mean() if inside else loss

    def _centred(self, *found: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Without what a Softmax behind does not notice: the mean over the classes."""
        return [
            {k: v - v.mean(dim=-1, keepdim=True) if k in self.classes else v for k, v in one.items()} for one in found
        ]

    def error(self, batches: Iterable[Batch]) -> float:
        """Root of the mean over the taps of ||student - teacher||^2 / ||teacher||^2, over all samples."""
        wrong, whole = dict.fromkeys(self.taps, 0.0), dict.fromkeys(self.taps, 0.0)
        for batch in batches:
            ours, theirs = self._centred(self.student(batch.feeds, self.taps), self.teacher(batch.feeds, self.taps))
            for name in self.taps:
                wrong[name] += float((ours[name] - theirs[name]).double().square().sum())
                whole[name] += float(theirs[name].double().square().sum())
        ratios = [wrong[name] / whole[name] if whole[name] else wrong[name] for name in self.taps]
        return math.sqrt(sum(ratios) / len(ratios))

    def error_of(self, batches: Batches) -> float:
        self.student.eval()
        with torch.no_grad():
            return self.error(batches.ordered())


def _affordable_steps(teacher: Teacher, batch: int, steps_per_epoch: int) -> int:
    """As many as the time allows; counted in work, so that the result does not depend on the machine."""
    least, most = _STEPS
    macs = max(1, count(teacher.graph).macs)
    return min(max(least, min(most, _EPOCHS * steps_per_epoch)), max(least, int(_WORK_MACS / (_PASSES * batch * macs))))


def _layer_by_layer(
    student: Student,
    fit: Batches,
    objective: Distance,
    settings: TuneSettings,
    progress: Callable[[Progress], None] | None,
) -> tuple[int, float]:
    """The first part of ``full``; returns steps and seconds."""
    floats = _float_weights(student, objective.teacher)
    for name, value in floats.items():
        student.twin.edit(name, _constant(value))
    steps, seconds = 0, 0.0
    for one in student.codebooks:
        weight = str(one.weight.name)
        if weight in floats:
            student.twin.unedit(weight)
        names = [str(c.name) for c in (one.codebook, one.scales) if c is not None]
        result = train(
            student,
            fit,
            objective,
            settings=_train_settings(settings, settings.layer_steps, freeze_statistics=True),
            groups=student.groups(settings.rate, names),
            on_gradients=student.average_gradients,
            progress=progress,
        )
        steps, seconds = steps + result.steps, seconds + result.seconds
    return steps, seconds


def _float_weights(student: Student, teacher: Teacher) -> dict[str, Tensor]:
    """By decoded weight, the teacher's: the tensor in the same place of a node of the same name."""
    readers = {(str(node.name), node.op): node for node in teacher.graph.nodes if node.name}
    found = {}
    for one in student.codebooks:
        for reader in one.readers:
            other = readers.get((str(reader.name), reader.op))
            place = next(i for i, tensor in enumerate(reader.inputs) if tensor is one.weight)
            name = str(other.inputs[place].name) if other is not None and place < len(other.inputs) else ""
            if name in dict(teacher.twin.named_buffers()):
                found[str(one.weight.name)] = teacher.twin.get_buffer(name)
    return found


def _joins(graph: Graph) -> list[str]:
    """Sums of two computed tensors, evenly chosen when there are many."""
    found = [
        str(node.outputs[0].name)
        for node in graph.nodes
        if is_op(node, "Add") and all(tensor.inputs for tensor in node.inputs) and node.outputs[0].name
    ]
    step = -(-len(found) // _JOINS) if found else 1
    return found[::-1][::step][::-1]


def _giving(master: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: _rounded(master)


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _rounded(values: Tensor) -> Tensor:
    """int8 codewords, with the gradient of the identity."""
    return values + (values.round().clamp(-_INT8_LIMIT, _INT8_LIMIT) - values).detach()


def _counts(one: CodebookWeight) -> Tensor:
    """How many sub-vectors are stored as each codeword."""
    indices = one.indices.values.astype(np.int64).reshape(-1)
    if one.packed:
        indices = np.concatenate([indices // 16, indices % 16])
    counts = np.bincount(indices, minlength=one.codebook.shape[0])
    return torch.from_numpy(counts).to(torch.float32)


def _train_settings(settings: TuneSettings, steps: int, *, freeze_statistics: bool) -> TrainSettings:
    return TrainSettings(
        steps=steps,
        batch=settings.batch,
        schedule="cosine",
        warmup=0.1,
        clip_norm=None,
        freeze_statistics=freeze_statistics,
        eval_every=min(max(1, steps // _VALIDATIONS), _STEPS_BETWEEN_VALIDATIONS),
        patience=settings.patience,
        seed=settings.seed,
    )


def _batches(feeds: Sequence[Feeds], graph: Graph, settings: TuneSettings) -> Batches:
    """Feeds as samples that can be mixed, where the model takes any batch; else each is a batch of its own."""
    sizes = {array.shape[:1] for feed in feeds for array in feed.values()}
    free = all(tensor.shape and not isinstance(tensor.shape[0], int) for tensor in graph.inputs)
    alike = len({tuple(array.shape[1:] for array in feed.values()) for feed in feeds}) == 1
    if not (free and alike and () not in sizes):
        return Batches(Dataset(list(feeds), whole=True), min(settings.batch, len(feeds)), seed=settings.seed)
    samples = [{name: array[i] for name, array in feed.items()} for feed in feeds for i in range(_length(feed))]
    return Batches(Dataset(samples), min(settings.batch, len(samples)), seed=settings.seed)


def _length(feed: Feeds) -> int:
    return min(len(array) for array in feed.values())
