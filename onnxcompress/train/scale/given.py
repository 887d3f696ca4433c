"""What a run is given: the model, the samples, and where things are computed; the same in every process."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxcompress.channels.preparing import prepare as prepare_channels
from onnxcompress.data import Dataset, load_data
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.measure import Figures, figures, size_on_disk, with_plain_macs
from onnxcompress.model_io import load
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.batches import Augment, Batches
from onnxcompress.train.batchnorm import Feeds, running_statistics, settle_statistics
from onnxcompress.train.cached_runs import CachedRuns
from onnxcompress.train.depth.given import RUNTIME_TIMEOUT_S, file_digest
from onnxcompress.train.depth.preparation import prepare as prepare_blocks
from onnxcompress.train.scale.options import ScaleOptions
from onnxcompress.train.supervision import Supervision, Teacher, Wishes, make_teacher, supervise
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.equivalence import read_model
from onnxcompress.validation.judge import input_specs

logger = logging.getLogger(__name__)

FIT_BATCH = 64
# The networks of models/ are off by 0.005 to 0.05 on 64 to 256 samples of what they were trained on, an EfficientNet by
# 0.8 on 64 photographs.
MOST_SETTLED_ERROR = 0.2


class Given:
    """The model, and the samples, which are read when they are first asked for.

    Args:
        source: The model.
        options: The wishes.

    Raises:
        RecipeError: There are no samples, or they do not go with the settings.
        ModelError: The model cannot be read.
    """

    def __init__(self, source: Path, options: ScaleOptions) -> None:
        self.source, self.options = source, options
        if not options.data or not options.val:
            raise RecipeError("samples to train on and to judge by are needed: give --data and --val")
        self.proto = read_model(source)
        self.device = options.training.torch_device()
        self.runtime = Runtime(timeout_s=RUNTIME_TIMEOUT_S)

    def __enter__(self) -> Given:
        return self

    def __exit__(self, *error: object) -> None:
        self.runtime.close()

    # -- the model -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def graph(self) -> Graph:
        """Prepared: blocks and channels can be found in it."""
        return prepare_channels(prepare_blocks(load(self.source), runtime=self.runtime), self.runtime)

    @functools.cached_property
    def figures(self) -> Figures:
        original = load(self.source)
        infer_shapes(original)
        return with_plain_macs(figures(original, size_on_disk(self.source, original)), self.graph)

    @functools.cached_property
    def original(self) -> TorchGraph:
        """The prepared graph, without gradients, where things are computed."""
        return TorchGraph(self.graph, trainable=lambda name: False).to(self.device)

    @functools.cached_property
    def original_runs(self) -> CachedRuns:
        """Of the original on the samples for fits; all but what makes the outputs runs once."""
        runs = CachedRuns(self.original, self.calibration)
        runs.keep(self.original.output_names)
        return runs

    # -- the samples ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def training(self) -> Dataset:
        return self._dataset(self.options.data)

    @functools.cached_property
    def batches(self) -> Batches:
        options, settings = self.options, self.options.training
        found = Batches(
            self.training,
            settings.batch,
            accumulate=settings.accumulate,
            seed=settings.seed,
            augment=Augment.parse(options.augment),
        )
        each = found.size // found.accumulate
        if each < 2 or self.training.whole:
            raise RecipeError(
                f"BatchNormalization would see {each} sample at a time, and has to settle: give --batch 32, "
                "and a model whose batch size is not fixed to 1"
            )
        return found

    @functools.cached_property
    def judged(self) -> Batches:
        dataset = self._dataset(self.options.val)
        return Batches(dataset, min(max(self.options.training.batch, 64), len(dataset)))

    @functools.cached_property
    def calibration(self) -> list[Feeds]:
        """Training samples for fits, in batches, where things are computed."""
        dataset = self.training
        wanted = min(self.options.calibration, len(dataset))
        rows = np.random.PCG64(self.options.training.seed).random_raw(len(dataset)).argsort(kind="stable")[:wanted]
        some = Dataset([dataset.samples[int(row)] for row in rows], None, dataset.source, dataset.batch)
        size = dataset.batch or min(FIT_BATCH, wanted)
        whole = wanted // size * size  # a last batch of a few samples says little
        feeds = [dict(batch.to(self.device).feeds) for batch in Batches(some, size).ordered()]
        return list(feeds[: whole // size])

    @property
    def samples(self) -> list[dict[str, np.ndarray]]:
        """The same for onnxruntime."""
        return [{name: value.cpu().numpy() for name, value in feeds.items()} for feeds in self.calibration]

    def _dataset(self, spec: str) -> Dataset:
        options = self.options
        return load_data(
            spec,
            inputs=input_specs(self.proto),
            limit=options.limit,
            preprocess=options.preprocess,
            seed=options.training.seed,
        )

    # -- what is learned from ------------------------------------------------------------------------------------------

    @functools.cached_property
    def wishes(self) -> Wishes:
        """As given; the teacher, and labels where there are any, where nothing is said."""
        wishes = self.options.wishes
        if wishes.labels or wishes.distill:
            return wishes
        return replace(wishes, labels=self.batches.labels is not None, distill=True)

    @functools.cached_property
    def _teacher(self) -> TorchGraph:
        return TorchGraph(load(self.options.teacher or self.source), trainable=lambda name: False)

    def supervise(self, twin: TorchGraph) -> Supervision:
        """What a twin on the CPU learns from, and what it is judged by."""
        needed = self.wishes.distill or self.wishes.features or self.judged.labels is None
        teacher = make_teacher(self._teacher.to("cpu"), twin) if needed else None
        supervision = supervise(twin, self.batches, self.judged, teacher, self.wishes)
        if supervision.metric is None or supervision.expected is None:
            raise DataError(f"{self.judged.dataset.source} has no labels, and no output to agree on: add labels")
        if supervision.objective is not None and isinstance(supervision.objective.teacher, Teacher):
            supervision.objective.teacher.twin.to(self.device)
        return supervision

    def loss(self, twin: TorchGraph, supervision: Supervision) -> float:
        """What the training makes small, of the samples to judge by; NaN where they lack the labels that it is of."""
        objective = supervision.objective
        if objective is None or (objective.label_output and self.judged.labels is None):
            return math.nan
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self.judged.ordered():
                size = len(next(iter(batch.feeds.values())))
                total += size * float(objective(twin.eval(), batch.to(self.device)))
                count += size
        return total / count

    @functools.cached_property
    def settles(self) -> bool:
        """Whether BatchNormalization is estimated on the samples: where the original computes about the same with that.

        Samples of another kind than the original was trained on, or too few, have statistics of their own, and a
        network that has to go by them, in training too, is another one before anything is pruned.
        """
        if self.options.training.freeze_statistics:
            return False
        if not running_statistics(self.original):
            return True
        twin = TorchGraph(self.graph, trainable=lambda name: False).to(self.device)
        settle_statistics(twin, self.calibration)
        error = _relative_error(self.original_runs, CachedRuns(twin, self.calibration))
        is_close = error <= MOST_SETTLED_ERROR  # NaN is not
        if not is_close:
            logger.warning(
                "BatchNormalization keeps the statistics of the file: with those of %d samples of %s the original's "
                "outputs are off by %.2g of their variance, more than %g; if images are prepared otherwise for this "
                "model, say it with --preprocess",
                sum(len(next(iter(feeds.values()))) for feeds in self.calibration),
                self.training.source,
                error,
                MOST_SETTLED_ERROR,
            )
        return is_close

    def settle(self, twin: TorchGraph) -> None:
        """Estimate BatchNormalization of a twin anew, where that is done."""
        if self.settles:
            settle_statistics(twin, self.calibration)

    def identity(self) -> dict[str, Any]:
        """What makes the points of a run these points."""
        options, settings = self.options, self.options.training
        named = ("axes", "rounds", "round_epochs", "depth_ranking", "width_ranking", "only", "skip", "round_to")
        found: dict[str, Any] = {name.replace("_", " "): _plain(getattr(options, name)) for name in named}
        found |= {
            "model": file_digest(self.source),
            "training data": self.batches.identity(),
            "validation data": self.judged.identity(),
            "teacher": file_digest(options.teacher or self.source),
            "goal": None if options.goal is None else options.goal.text,
            "labels": self.wishes.labels,
            "distill": self.wishes.distill,
            "metric": options.wishes.metric,
            "features": list(options.wishes.features),
            "output": options.wishes.output,
            "distillation loss": options.wishes.distill_loss,
            "min keep": options.min_keep,
            "calibration": options.calibration,
            "augment": options.augment,
            "device": self.device.type,
            "precision": str(settings.element_type(self.device)).removeprefix("torch."),
        }
        # Of the points only what they depend on: the result may be trained for longer with the same points.
        skipped = {"epochs", "steps", "eval_every", "patience", "checkpoint_every", "device", "precision"}
        for part in (settings, options.wishes.losses):
            found |= {name.replace("_", " "): value for name, value in vars(part).items() if name not in skipped}
        return found


def _relative_error(wanted: CachedRuns, found: CachedRuns) -> float:
    """Squared difference of the outputs as a share of their variance; the largest of all outputs of floats."""
    names = wanted.network.output_names
    sums: dict[str, np.ndarray] = {name: np.zeros(4) for name in names}  # count, of w, of w^2, of (w - f)^2
    for one, other in zip(wanted(names), found(names), strict=True):
        for name, value in one.items():
            if value.is_floating_point():
                w, f = value.double(), other[name].double()
                parts = (torch.tensor(float(w.numel())), w.sum(), w.square().sum(), (w - f).square().sum())
                sums[name] += [float(part) for part in parts]
    spreads = {name: power - total**2 / max(count, 1) for name, (count, total, power, _) in sums.items()}
    return float(max((sums[name][3] / spread for name, spread in spreads.items() if spread > 0), default=0.0))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread, so that the number of processes has no say in a result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
