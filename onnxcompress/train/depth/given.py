"""What a depth pruning is given: the model, its blocks, the samples, and where things run."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxcompress.data import Dataset, load_data
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.measure import LatencyFigures, compare_latency, figures, size_on_disk, with_plain_macs
from onnxcompress.model_io import load, save
from onnxcompress.optimizer import check_target
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.batches import Augment, Batches
from onnxcompress.train.batchnorm import Feeds, settle_statistics
from onnxcompress.train.checkpoint import digest
from onnxcompress.train.depth.blocks import Block
from onnxcompress.train.depth.offers import choose_blocks, with_deletions
from onnxcompress.train.depth.options import DepthOptions
from onnxcompress.train.depth.preparation import prepare
from onnxcompress.train.depth.scoring import Judge, SubnetScorer
from onnxcompress.train.depth.supernet import Supernet, build_supernet
from onnxcompress.train.supervision import Supervision, Teacher, make_teacher, supervise
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.equivalence import for_runtime, read_model
from onnxcompress.validation.judge import input_specs

Say = Callable[[str], None]

RUNTIME_TIMEOUT_S = 300.0
TIMING_S = 2.0
# What has no say in the weights, or is said otherwise in a run's identity.
_NO_IDENTITY = {"checkpoint_every", "device", "precision"}


class Given:
    """What a run is given: model, samples, and where things are done.

    Args:
        source: The model.
        output: Where the result goes; None where nothing is written.
        options: The wishes.
        say: Told what is being done.
        folder: For the state of the run; that of the options, or beside the output, when None.

    Raises:
        RecipeError: There are no samples, or the output cannot be written.
    """

    def __init__(
        self,
        source: Path,
        output: Path | None,
        options: DepthOptions,
        say: Say,
        folder: Path | None = None,
    ) -> None:
        self.source, self.output, self.options = source, output, options
        self.say = say
        self.start = time.monotonic()
        if not options.data or not options.val:
            raise RecipeError("samples to train on and to judge by are needed: give --data and --val")
        if output is not None:
            check_target(output)
            folder = options.checkpoint or output.with_name(f"{output.name}.checkpoint")
        assert folder is not None
        self.folder = folder
        self.device = options.training.torch_device()
        if options.threads:
            torch.set_num_threads(options.threads)
        self.runtime = Runtime(timeout_s=RUNTIME_TIMEOUT_S)

    def __enter__(self) -> Given:
        return self

    def __exit__(self, *error: object) -> None:
        self.runtime.close()

    def read(self) -> None:
        """Read model and samples."""
        options, settings = self.options, self.options.training
        self.say("reading the model")
        original = load(self.source)
        self.proto = read_model(self.source)
        infer_shapes(original)
        plain = figures(original, size_on_disk(self.source, original))
        self.graph = prepare(original, runtime=self.runtime)
        self.figures = with_plain_macs(plain, self.graph)
        self.blocks, self.refusals = choose_blocks(
            self.graph, named_runs=options.named_runs, only=options.only, skip=options.skip, delete=options.delete
        )
        if options.offers_deletions:
            self.blocks = with_deletions(self.blocks)
        self.say("reading the data")
        training, validation = self._dataset(options.data), self._dataset(options.val)
        self.batches = Batches(
            training,
            settings.batch,
            accumulate=settings.accumulate,
            seed=settings.seed,
            augment=Augment.parse(options.augment),
        )
        each = self.batches.size // self.batches.accumulate
        if each < 2 or training.whole:
            raise RecipeError(
                f"BatchNormalization would see {each} sample at a time, and has to settle: give --batch 32, "
                "and a model whose batch size is not fixed to 1"
            )
        self.judged = Batches(validation, min(max(settings.batch, 64), len(validation)))
        self.calibration = self._feeds(_some(training, options.calibration, settings.seed), each)
        self.validation = [dict(batch.to(self.device).feeds) for batch in self.judged.ordered()]

    def _dataset(self, spec: str) -> Dataset:
        options = self.options
        return load_data(
            spec,
            inputs=input_specs(self.proto),
            limit=options.limit,
            preprocess=options.preprocess,
            seed=options.training.seed,
        )

    def _feeds(self, dataset: Dataset, size: int) -> list[Feeds]:
        size = dataset.batch or min(max(size, 32), len(dataset))
        batches = [dict(batch.to(self.device).feeds) for batch in Batches(dataset, size).ordered()]
        if len(batches) > 1:  # a last batch of a few samples says little
            batches = [feeds for feeds in batches if all(len(value) == size for value in feeds.values())]
        return list(batches)

    def _teacher(self, twin: TorchGraph) -> Teacher | None:
        options = self.options
        needed = options.wishes.distill or options.wishes.features or self.batches.labels is None
        if options.teacher is None and not needed and self.judged.labels is not None:
            return None
        teacher = make_teacher(TorchGraph(load(options.teacher or self.source), trainable=lambda name: False), twin)
        return teacher

    def supervise(self, twin: TorchGraph) -> Supervision:
        """What a twin on the CPU learns from, and what it is judged by."""
        supervision = supervise(twin, self.batches, self.judged, self._teacher(twin), self.options.wishes)
        if supervision.metric is None or supervision.expected is None:
            raise DataError(f"{self.judged.dataset.source} has no labels, and no output to agree on: add labels")
        if supervision.objective is not None and isinstance(supervision.objective.teacher, Teacher):
            supervision.objective.teacher.twin.to(self.device)
        return supervision

    def identity(self, twin: TorchGraph, supervision: Supervision, blocks: Sequence[Block]) -> dict[str, Any]:
        """What makes a training this training."""
        options, settings = self.options, self.options.training
        teacher = options.teacher or self.source
        identity: dict[str, Any] = {
            "model": file_digest(self.source),
            "blocks": [f"{block.name} {block.kind}" for block in blocks],
            "weights": digest(sorted(twin.state_dict().items())),
            "training data": self.batches.identity(),
            "validation data": self.judged.identity(),
            "teacher": file_digest(teacher),
            "learning from": supervision.text,
            "metric": supervision.metric.name if supervision.metric else None,
            "calibration": options.calibration,
            "activation": options.activation,
            "augment": options.augment,
            "features": list(options.wishes.features),
            "device": self.device.type,
            "precision": str(settings.element_type(self.device)).removeprefix("torch."),
        }
        for part in (settings, options.wishes.losses):
            identity |= {
                name.replace("_", " "): value for name, value in vars(part).items() if name not in _NO_IDENTITY
            }
        return identity

    @contextlib.contextmanager
    def staged(self, graph: Graph) -> Iterator[Path]:
        """A file of a graph, for a while."""
        with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
            path = Path(folder) / "model.onnx"
            save(graph, path)
            yield path

    def latency(self, path: Path) -> LatencyFigures:
        """A file and the original, timed in turns."""
        feed = next(self.judged.ordered(1)).feeds
        return compare_latency(
            self.runtime,
            for_runtime(self.source),
            for_runtime(path),
            {name: value.numpy() for name, value in feed.items()},
            threads=self.options.threads or 1,
            budget_s=TIMING_S,
            max_runs=1000,
        )

    def original(self) -> TorchGraph:
        """The network before, without gradients, where things are computed."""
        return TorchGraph(self.graph, trainable=lambda name: False).to(self.device)

    def settle(self, twin: TorchGraph) -> None:
        """Estimate BatchNormalization of a twin anew."""
        settle_statistics(twin, self.calibration)

    def build(self, blocks: Sequence[Block]) -> Supernet:
        """A supernet with the original weights."""
        return build_supernet(self.graph, blocks, flows=self.options.flows)

    def scorer(self, twin: TorchGraph, supernet: Supernet, supervision: Supervision) -> SubnetScorer:
        """Scores subnets: on some of the validation samples where the best are judged again on all."""
        assert supervision.metric is not None and supervision.expected is not None
        validation, expected = self.validation, supervision.expected
        sizes = [max((len(value) for value in feeds.values() if value.dim()), default=1) for feeds in validation]
        wanted = max(1, round(self.options.ranking / max(sizes)))
        if self.options.shortlists and wanted < len(validation) and sum(sizes) == len(expected):
            starts = np.cumsum([0, *sizes])
            # Evenly spread: a file may be sorted by class.
            chosen = [number * len(validation) // wanted for number in range(wanted)]
            expected = np.concatenate([expected[starts[number] : starts[number + 1]] for number in chosen])
            validation = [validation[number] for number in chosen]
        return SubnetScorer(
            twin,
            supernet.lambdas,
            self.calibration,
            validation,
            Judge(supervision.metric, supervision.output, expected),
            jobs=self.options.jobs,
            dask=self.options.dask,
        )


def _some(dataset: Dataset, wanted: int, seed: int) -> Dataset:
    """At most so many samples, drawn evenly: a file may be sorted by class."""
    if wanted >= len(dataset):
        return dataset
    rows = np.random.PCG64(seed).random_raw(len(dataset)).argsort(kind="stable")[:wanted]
    return Dataset([dataset.samples[int(row)] for row in rows], None, dataset.source, dataset.batch, dataset.whole)


def file_digest(path: Path) -> str:
    """A short name for what a file holds."""
    return digest([("file", np.fromfile(path, np.uint8))])
