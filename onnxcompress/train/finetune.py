"""``finetune``: train the weights of an .onnx file and write them back; the graph stays as it is.

The file is read, its twin is trained on labels, on a teacher, or both, and the best weights on the validation data are
put into the graph. The result appears under its name when its interface is the same and onnxruntime gives the figure
that the twin gave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxcompress.data import Dataset, load_data
from onnxcompress.errors import DataError, EquivalenceError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.model_io import StagedFile, load
from onnxcompress.optimizer import check_target
from onnxcompress.runtime import REFERENCE, Runtime
from onnxcompress.train.batches import Augment, Batches
from onnxcompress.train.batchnorm import SEQUENTIAL_BELOW, reestimate_batchnorm
from onnxcompress.train.checkpoint import Checkpoint, digest
from onnxcompress.train.loop import Evaluation, Progress, TrainResult, train
from onnxcompress.train.parallel import World, joined
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.supervision import Supervision, Teacher, Wishes, make_teacher, supervise
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.train.weights import enters_as_weight, weight_tensors
from onnxcompress.validation.equivalence import read_model, run_model
from onnxcompress.validation.judge import METRIC_TOLERANCE, input_specs
from onnxcompress.validation.signature import interface_differences

logger = logging.getLogger(__name__)

_RUNTIME_TIMEOUT_S = 300.0
# What has no say in the weights, or is said otherwise in a run's identity.
_NO_IDENTITY = {"checkpoint_every", "device", "precision"}


@dataclass(frozen=True)
class FinetuneOptions:
    """What to do with a model.

    Args:
        data: Samples to train on, see ``onnxcompress.data``.
        val: Samples to judge by; needed unless ``bn_only``.
        teacher: The model to distil from.
        wishes: What to learn from.
        training: How to train.
        freeze: Patterns of initializer names that stay as they are.
        only: Patterns of the only names to train.
        bn_only: Re-estimate BatchNormalization, and nothing else.
        augment: As in ``Augment.parse``.
        preprocess: How images are prepared.
        limit: At most so many samples of each source.
        tensorboard: Folder for figures that TensorBoard shows.
        checkpoint: Folder for the state of the run; beside the output when None, and removed when the output is there.
        resume: Go on from a checkpoint that is found there.
        threads: Of torch on the CPU; 0 is torch's choice.
    """

    data: str
    val: str | None = None
    teacher: Path | None = None
    wishes: Wishes = field(default_factory=Wishes)
    training: TrainSettings = field(default_factory=TrainSettings)
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    bn_only: bool = False
    augment: str = ""
    preprocess: str | None = None
    limit: int | None = None
    tensorboard: Path | None = None
    checkpoint: Path | None = None
    resume: bool = True
    threads: int = 0


@dataclass(frozen=True)
class FinetuneResult:
    """What came of it.

    Args:
        source: The input file.
        output: The file that was written.
        learned_from: In words.
        metric: Name of the figure of merit; None when there was nothing to compare with.
        higher_is_better: Which way is up.
        samples: Validation samples.
        before: The figure of the input, by onnxruntime.
        after: That of the output.
        training: Figures of the run; None with ``bn_only``.
        changed: Names of initializers that have other values now.
        seconds: All in all.
    """

    source: str
    output: str
    learned_from: str
    metric: str | None
    higher_is_better: bool
    samples: int
    before: float | None
    after: float | None
    training: TrainResult | None
    changed: list[str]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(inner) for key, inner in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(inner) for inner in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        found: dict[str, Any] = plain(dataclasses.asdict(self))
        return found


def finetune(
    source: Path,
    output: Path,
    options: FinetuneOptions,
    *,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> FinetuneResult | None:
    """Train a model file.

    Args:
        source: The model.
        output: Where the result goes; may be ``source``.
        options: How.
        progress: Called after each step.
        say: Told what is being done.

    Returns:
        The figures; None in a process that is not the first of several.

    Raises:
        RecipeError: The settings conflict with each other, the model or a checkpoint.
        DataError: The data does not fit the model, or there is none.
        ModelError: The model cannot be read, or holds an operator that cannot be trained through.
        TrainingError: The loss is no number any more.
        EquivalenceError: onnxruntime does not confirm the result.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.training.torch_device()
    with joined(device.type) as world:
        result = _Job(source, output, options, world, say or (lambda line: None)).run(progress)
        world.wait()
    return result


class _Job:
    """One model on its way."""

    def __init__(
        self, source: Path, output: Path, options: FinetuneOptions, world: World, say: Callable[[str], None]
    ) -> None:
        self.source, self.output, self.options, self.world, self.say = source, output, options, world, say
        self.settings = options.training
        self.start = time.monotonic()

    def run(self, progress: Callable[[Progress], None] | None) -> FinetuneResult | None:
        options = self.options
        if options.val is None and not options.bn_only:
            raise RecipeError("there is no validation data, which decides what weights are kept: give --val")
        augment = Augment.parse(options.augment)
        if options.bn_only and (augment or options.freeze or options.only):
            raise RecipeError("--bn-only trains nothing: leave out --augment, --freeze and --train")
        check_target(self.output)
        self.say("reading the model")
        graph = load(self.source)
        self.proto = read_model(self.source)
        twin = TorchGraph(graph, trainable=self._trainable(graph))
        self.say("reading the data")
        training = self._dataset(options.data)
        validation = self._dataset(options.val) if options.val is not None else None
        batches = self._batches(training, augment, twin)
        judged = None if validation is None else Batches(validation, min(self.settings.batch, len(validation)))
        supervision = supervise(
            twin, batches, judged, self._teacher(twin), options.wishes, gradients=not options.bn_only
        )
        found = None
        if options.bn_only:
            self._reestimate(twin, batches)
        else:
            found = self._train(twin, batches, judged, supervision, progress)
        if not self.world.first:
            return None
        return self._write(graph, twin.to("cpu"), judged, supervision, found)

    # -- what is given -------------------------------------------------------------------------------------------------

    def _dataset(self, spec: str) -> Dataset:
        options = self.options
        inputs = input_specs(self.proto)
        return load_data(
            spec, inputs=inputs, limit=options.limit, preprocess=options.preprocess, seed=self.settings.seed
        )

    def _batches(self, dataset: Dataset, augment: Augment, twin: TorchGraph) -> Batches:
        settings = self.settings
        size = settings.batch
        if self.options.bn_only:
            size = min(size, len(dataset))
        found = Batches(
            dataset, size, accumulate=settings.accumulate, seed=settings.seed, augment=augment, world=self.world
        )
        alone = found.size // found.accumulate <= 1 or dataset.whole or dataset.batch == 1
        if alone and twin.batch_normalizations and not settings.freeze_statistics and not self.options.bn_only:
            logger.warning("BatchNormalization sees one sample at a time: its statistics stay as they are")
            self.settings = replace(settings, freeze_statistics=True)
        return found

    def _trainable(self, graph: Graph) -> Callable[[str], bool] | None:
        """Which initializers to train: those that are weights, less what the patterns leave out."""
        freeze, only = self.options.freeze, self.options.only
        if not freeze and not only:
            return None
        weights = {
            name for name, tensor in weight_tensors(graph) if enters_as_weight(graph, tensor, tuple(tensor.shape or ()))
        }
        for pattern in (*freeze, *only):
            if not any(fnmatchcase(name, pattern) for name in weights):
                some = ", ".join(sorted(weights)[:3])
                raise RecipeError(f"{pattern!r} is the name of no weight; there are {len(weights)}, such as {some}")

        def chosen(name: str) -> bool:
            wanted = not only or any(fnmatchcase(name, pattern) for pattern in only)
            return name in weights and wanted and not any(fnmatchcase(name, pattern) for pattern in freeze)

        return chosen

    def _teacher(self, twin: TorchGraph) -> Teacher | None:
        path = self.options.teacher
        if path is None:
            return None
        self.say("reading the teacher")
        wishes = self.options.wishes
        if wishes.distill and not wishes.labels and path.exists() and path.read_bytes() == self.source.read_bytes():
            raise RecipeError(f"the teacher {path} is the model itself: name the model that it was made of")
        return make_teacher(TorchGraph(load(path), trainable=lambda name: False), twin)

    # -- training ------------------------------------------------------------------------------------------------------

    def _reestimate(self, twin: TorchGraph, batches: Batches) -> None:
        if not twin.batch_normalizations:
            raise RecipeError(f"{self.source} has no BatchNormalization: --bn-only has nothing to do")
        self.say("estimating BatchNormalization")
        size = batches.size // batches.accumulate
        reestimate_batchnorm(
            twin,
            lambda: (batch.feeds for batch in batches.ordered(size)),
            sequential=min(size, batches.dataset.batch or size) < SEQUENTIAL_BELOW,
        )

    def _train(
        self,
        twin: TorchGraph,
        batches: Batches,
        judged: Batches | None,
        supervision: Supervision,
        progress: Callable[[Progress], None] | None,
    ) -> TrainResult:
        assert supervision.objective is not None and judged is not None
        device = self.settings.torch_device()
        evaluation = None
        if supervision.metric is not None:
            evaluation = Evaluation(
                lambda model: supervision.figure(model, judged, device),
                supervision.metric.name,
                supervision.metric.higher_is_better,
            )
        else:
            raise DataError(f"{judged.dataset.source} has no labels and there is no teacher to agree with: add labels")
        checkpoint = self._checkpoint(twin, batches, judged, supervision)
        if isinstance(supervision.objective.teacher, Teacher):
            supervision.objective.teacher.twin.to(device)
        self.say("training")
        with _tensorboard(self.options.tensorboard if self.world.first else None) as write:

            def each(now: Progress) -> None:
                write(now, evaluation.name)
                if progress is not None:
                    progress(now)

            return train(
                twin,
                batches,
                supervision.objective,
                settings=self.settings,
                evaluation=evaluation,
                checkpoint=checkpoint,
                progress=each,
                world=self.world,
            )

    def _checkpoint(self, twin: TorchGraph, batches: Batches, judged: Batches, supervision: Supervision) -> Checkpoint:
        options, settings = self.options, self.settings
        assert supervision.objective is not None
        device = settings.torch_device()
        identity: dict[str, Any] = {
            "model": _identity(self.source, twin),
            "training data": batches.identity(),
            "validation data": judged.identity(),
            "teacher": None,
            "learning from": supervision.text,
            "metric": supervision.metric.name if supervision.metric else None,
            "trained weights": digest([("\n".join(name for name, _ in twin.named_parameters()), np.ones(1))]),
            "augment": options.augment,
            "features": list(options.wishes.features),
            "processes": self.world.size,
            "device": device.type,
            "precision": str(settings.element_type(device)).removeprefix("torch."),
        }
        if options.teacher is not None and isinstance(supervision.objective.teacher, Teacher):
            identity["teacher"] = _identity(options.teacher, supervision.objective.teacher.twin)
        for part in (settings, options.wishes.losses):
            identity |= {
                name.replace("_", " "): value for name, value in vars(part).items() if name not in _NO_IDENTITY
            }
        folder = options.checkpoint or self.output.with_name(f"{self.output.name}.checkpoint")
        return Checkpoint(folder, identity, resume=options.resume)

    # -- the result ----------------------------------------------------------------------------------------------------

    def _write(
        self,
        graph: Graph,
        twin: TorchGraph,
        judged: Batches | None,
        supervision: Supervision,
        found: TrainResult | None,
    ) -> FinetuneResult:
        self.say("checking on onnxruntime")
        changed = twin.write_back(graph)
        metric = supervision.metric
        before = after = None
        with StagedFile(graph, self.output) as staged, Runtime(timeout_s=_RUNTIME_TIMEOUT_S) as runtime:
            different = interface_differences(self.proto, read_model(staged.path))
            if different:
                raise EquivalenceError(f"the interface has changed: {different[0]}")
            if metric is not None and judged is not None:
                assert supervision.expected is not None
                before = metric.measure(supervision.expected, _run(runtime, self.source, judged, supervision.output))
                after = metric.measure(supervision.expected, _run(runtime, staged.path, judged, supervision.output))
                said = supervision.figure(twin, judged, torch.device("cpu"))
                off = abs(metric.drop(said, after, supervision.expected))
                allowed = max(METRIC_TOLERANCE, 1.5 / len(judged.dataset))
                if not off <= allowed:
                    raise EquivalenceError(
                        f"{metric.name} is {after:.6g} on onnxruntime and {said:.6g} in torch, {off:.1e} apart, "
                        f"allowed {allowed:.1e}"
                    )
            else:
                runtime.interface(staged.path)
            staged.commit()
        if found is not None and self.options.checkpoint is None:
            Checkpoint(self.output.with_name(f"{self.output.name}.checkpoint"), {}).remove()
        return FinetuneResult(
            source=str(self.source),
            output=str(self.output),
            learned_from=supervision.text,
            metric=None if metric is None else metric.name,
            higher_is_better=metric is None or metric.higher_is_better,
            samples=0 if judged is None else len(judged.dataset),
            before=before,
            after=after,
            training=found,
            changed=changed,
            seconds=time.monotonic() - self.start,
        )


def _run(runtime: Runtime, path: Path, judged: Batches, output: str) -> np.ndarray:
    feeds = (feed for feed, _ in judged.dataset.batches(judged.size))
    rows = run_model(runtime, path, feeds, REFERENCE, outputs=[output])
    return np.concatenate([np.atleast_1d(np.asarray(row[0], np.float32)) for row in rows])


def _identity(path: Path, twin: TorchGraph) -> str:
    file = np.frombuffer(path.read_bytes(), np.uint8)
    return digest([("file", file), *sorted(twin.state_dict().items())])


@contextlib.contextmanager
def _tensorboard(folder: Path | None) -> Iterator[Callable[[Progress, str], None]]:
    """What writes figures for TensorBoard.

    Raises:
        RecipeError: tensorboard is not installed.
    """
    if folder is None:
        yield lambda now, name: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError("--tensorboard needs tensorboard: pip install onnxcompress[tensorboard]") from error

    def write(now: Progress, name: str) -> None:
        writer.add_scalar("loss/train", now.loss, now.step)
        writer.add_scalar("learning_rate", now.learning_rate, now.step)
        if now.figure is not None:
            writer.add_scalar(f"{name}/validation", now.figure, now.step)

    with SummaryWriter(str(folder)) as writer:
        yield write
