"""Batches for training, each a function of the seed and the step alone, so that a run can be taken up anywhere.

An epoch is a permutation of the samples, cut into whole batches; the few that fill none are left out and are others in
the next epoch. Samples that fit in memory are read, checked and stacked once, at the start; others are read by step.
Images may be augmented, on the way out: ``flip`` mirrors every second one, ``shift:2`` moves each by up to 2 pixels in
either direction, the edge repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from onnxcompress.data import Dataset
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.train.checkpoint import digest
from onnxcompress.train.parallel import World
from onnxcompress.train.teacher_outputs import TeacherOutputs

MEMORY_BYTES = 2 << 30
_READERS = 4

# What a permutation, an augmentation and torch's own generator are seeded with, beside seed and step.
_ORDER, _AUGMENT, _TORCH = 1, 2, 3


@dataclass(frozen=True)
class Batch:
    """Some samples on their way through the model.

    Args:
        feeds: By input name, (n, ...).
        labels: (n, ...) where there are any.
        weight: Share of these samples in their step; the losses of a step are averaged with it.
        rows: Numbers of the samples; None where they may not come again as they are.
        taught: What teachers give for them; None without ``rows``.
        memory_format: Of images.
    """

    feeds: Mapping[str, Tensor]
    labels: Tensor | None = None
    weight: float = 1.0
    rows: np.ndarray | None = None
    taught: TeacherOutputs | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format) -> Batch:
        """On a device, images in a memory format."""
        feeds = {
            name: value.to(device, memory_format=memory_format if value.dim() == 4 else torch.preserve_format)
            for name, value in self.feeds.items()
        }
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, feeds=feeds, labels=labels, memory_format=memory_format)

    def outputs_of(
        self, teacher: nn.Module, names: Sequence[str], run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """What a frozen model gives for these samples, by ``run`` or from where it is kept."""
        if self.taught is None or self.rows is None:
            return run(self.feeds)
        device = next(iter(self.feeds.values())).device

        def place(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return Batch(feeds).to(device, self.memory_format).feeds

        return self.taught.of(teacher, names, self.rows, self.feeds, run, place)


@dataclass(frozen=True)
class Augment:
    """How images are varied.

    Args:
        flip: Mirror left and right, every second image.
        shift: Move by up to so many pixels in either direction.
    """

    flip: bool = False
    shift: int = 0

    @classmethod
    def parse(cls, text: str) -> Augment:
        """Read ``flip,shift:2``.

        Raises:
            RecipeError: There is no such augmentation, or no such value.
        """
        flip, shift = False, 0
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition(":")
            if name == "flip" and not value:
                flip = True
            elif name == "shift" and value.isdecimal() and int(value) > 0:
                shift = int(value)
            else:
                raise RecipeError(f"augment {text!r}: {part!r} is none; there are flip and shift:PIXELS, as in shift:2")
        return cls(flip, shift)

    def __bool__(self) -> bool:
        return self.flip or self.shift > 0

    def apply(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Vary (n, c, h, w) by (n, 3) draws of 64 bits."""
        count, channels, height, width = images.shape
        if self.flip:
            mirrored = torch.from_numpy(draws[:, 0] % 2 == 1).reshape(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(3), images)
        if self.shift:
            span = 2 * self.shift + 1
            down, right = (torch.from_numpy((draws[:, k] % span).astype(np.int64)) - self.shift for k in (1, 2))
            rows = (torch.arange(height) - down[:, None]).clamp(0, height - 1)
            columns = (torch.arange(width) - right[:, None]).clamp(0, width - 1)
            images = images.gather(2, rows[:, None, :, None].expand(count, channels, height, width))
            images = images.gather(3, columns[:, None, None, :].expand(count, channels, height, width))
        return images


class Batches:
    """The samples of a run.

    Args:
        dataset: Where they come from. A model's fixed batch size wins over ``size``: a step then has as many whole
            batches of that size as ``size`` holds, at least one.
        size: Samples in a step, over all processes.
        accumulate: Backward passes in a step, each with its part of the samples.
        seed: Same seed, same batches.
        augment: How images are varied in ``at``, never in ``ordered``.
        world: This process takes its share of each batch in ``at``; ``ordered`` gives everything to everyone.

    Raises:
        DataError: There are fewer samples than a batch has, their shapes differ, or a value is NaN or infinite.
        RecipeError: The batch cannot be cut as asked, or the samples are no images and are to be augmented.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        augment: Augment | None = None,
        world: World | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.dataset, self.seed, self.augment = dataset, seed, augment or Augment()
        self.world = world or World()
        fixed = 1 if dataset.whole else dataset.batch
        if fixed:
            parts = max(1, size // fixed // self.world.size) * self.world.size
            size, accumulate = parts * fixed, parts // self.world.size
        self.size, self.accumulate = size, accumulate
        self._check_sizes()
        self._memory: dict[str, Tensor] | None = None
        self._order: tuple[int, np.ndarray] | None = None
        self._ahead: tuple[list[int], Future[dict[str, Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1)
        first = dataset.samples[0]
        self._check_augment(first)
        total = sum(np.asarray(value).nbytes for value in first.values()) * len(dataset)
        if total <= memory_bytes and not dataset.whole:
            self._memory = self._read(range(len(dataset)))
        self._labels = None if dataset.labels is None else _label_tensor(dataset.labels, dataset.source)
        self._taught: dict[str, TeacherOutputs] = {}

    def _check_sizes(self) -> None:
        parts, source = self.world.size * self.accumulate, self.dataset.source
        if self.size < parts:
            raise RecipeError(f"batch {self.size} cannot be cut into {parts} parts (processes x accumulate)")
        if len(self.dataset) < self.size:
            raise DataError(
                f"{source} has {len(self.dataset)} samples, fewer than a batch of {self.size}: give more, or a smaller "
                f"batch"
            )

    def _check_augment(self, first: Mapping[str, np.ndarray]) -> None:
        if not self.augment:
            return
        shapes = {name: np.shape(value) for name, value in first.items()}
        if len(shapes) != 1 or any(len(shape) != 3 for shape in shapes.values()) or self.dataset.whole:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise RecipeError(f"augment varies images (C, H, W) of a model with one input, samples are {listed}")
        if self.dataset.labels is not None and self.dataset.labels.ndim > 2:
            raise RecipeError(f"augment would move the images and not their labels {self.dataset.labels.shape[1:]}")
        (shape,) = shapes.values()
        if self.augment.shift >= min(shape[1:]):
            raise RecipeError(f"augment shift:{self.augment.shift} moves images of {shape[1]}x{shape[2]} out of sight")

    @property
    def labels(self) -> Tensor | None:
        """Of all samples, in their order."""
        return self._labels

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset) // self.size

    def identity(self) -> str:
        """A short name for samples and labels: of all, or of the first batch when they are not in memory."""
        rows = self._memory if self._memory is not None else self._read(range(1 if self.dataset.whole else self.size))
        labels = [] if self._labels is None else [("labels", self._labels)]
        return f"{len(self.dataset)} samples {digest([*sorted(rows.items()), *labels])}"

    def at(self, step: int) -> Iterator[Batch]:
        """The batches of a step, one for each backward pass, this process's share of them."""
        draws = _bits(self.seed, _AUGMENT, step, 3 * self.size).reshape(-1, 3)
        plan = self._plan(step)
        later = [rows for rows, _ in (*plan[1:], *self._plan(step + 1)[:1])]
        for (rows, positions), then in zip(plan, later, strict=True):
            feeds = self._take(rows, then)
            if self.augment:
                feeds = {name: self.augment.apply(value, draws[positions]) for name, value in feeds.items()}
            yield self._batch(feeds, rows, len(rows) / self.size, None if self.augment else self._taught_at())

    def _plan(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each backward pass the samples, and their places in the step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._order_of(epoch)
        chosen = self._order[1][index * self.size : (index + 1) * self.size]
        mine = np.array_split(np.arange(self.size), self.world.size)[self.world.rank]
        return [(chosen[part], part) for part in np.array_split(mine, self.accumulate)]

    def _order_of(self, epoch: int) -> np.ndarray:
        return np.argsort(_bits(self.seed, _ORDER, epoch, len(self.dataset)), kind="stable")

    def ordered(self, size: int | None = None) -> Iterator[Batch]:
        """All samples in order, as they are; the last batch may be smaller."""
        step = (1 if self.dataset.whole else self.dataset.batch) or size or self.size
        for start in range(0, len(self.dataset), step):
            rows = np.arange(start, min(start + step, len(self.dataset)))
            taught = self._taught_in_order(step) if size is None else None
            yield self._batch(self._take(rows), rows, len(rows) / len(self.dataset), taught)

    def _batch(self, feeds: dict[str, Tensor], rows: np.ndarray, weight: float, taught: TeacherOutputs | None) -> Batch:
        return Batch(feeds, self._labels_of(rows), weight, None if taught is None else rows, taught)

    def _taught_at(self) -> TeacherOutputs | None:
        """Blocks are the batches of the first epoch, and what it leaves out."""
        if self.world.size > 1 or self.dataset.whole:
            return None
        if "at" not in self._taught:
            order = self._order_of(0)
            cut = np.array_split(order[: self.steps_per_epoch * self.size], self.steps_per_epoch)
            parts = [part for rows in cut for part in np.array_split(rows, self.accumulate)]
            rest = order[self.steps_per_epoch * self.size :]
            self._taught["at"] = TeacherOutputs([*parts, *([rest] if len(rest) else [])], self._feeds_of)
        return self._taught["at"]

    def _taught_in_order(self, step: int) -> TeacherOutputs | None:
        if self.dataset.whole:
            return None
        if "in order" not in self._taught:
            rows = np.arange(len(self.dataset))
            blocks = [rows[start : start + step] for start in range(0, len(rows), step)]
            self._taught["in order"] = TeacherOutputs(blocks, self._feeds_of)
        return self._taught["in order"]

    def _labels_of(self, rows: np.ndarray) -> Tensor | None:
        return None if self._labels is None else self._labels[torch.from_numpy(rows)]

    def _take(self, rows: np.ndarray, then: np.ndarray | None = None) -> dict[str, Tensor]:
        """Samples by number; what is read by step is read ahead, while the model is at work."""
        if self._memory is None:
            wanted = rows.tolist()
            feeds = self._ahead[1].result() if self._ahead and self._ahead[0] == wanted else self._read(wanted)
            self._ahead = None
            if then is not None:
                self._ahead = then.tolist(), self._reader.submit(self._read, then.tolist())
            return feeds
        return self._feeds_of(rows)

    def _feeds_of(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Samples by number, without reading ahead."""
        if self._memory is None:
            return self._read(rows.tolist())
        index = torch.from_numpy(rows)
        return {name: value[index] for name, value in self._memory.items()}

    def _read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        with ThreadPoolExecutor(_READERS) as pool:
            samples = list(pool.map(self.dataset.samples.__getitem__, rows))
        if self.dataset.whole:
            return {name: _float_tensor(value, name, self.dataset.source, rows) for name, value in samples[0].items()}
        stacked = {}
        for name in samples[0]:
            shapes = {np.shape(sample[name]) for sample in samples}
            if len(shapes) > 1:
                listed = " and ".join(str(shape) for shape in sorted(shapes)[:2])
                raise DataError(
                    f"{self.dataset.source}: samples of input {name!r} have shapes {listed}: a batch needs them alike"
                )
            values = np.stack([sample[name] for sample in samples])
            stacked[name] = _float_tensor(values, name, self.dataset.source, rows)
        return stacked


def torch_seed(seed: int, step: int) -> int:
    """What torch's generator is seeded with before a step."""
    return int(_bits(seed, _TORCH, step, 1)[0] >> np.uint64(1))


def _bits(seed: int, purpose: int, number: int, count: int) -> np.ndarray:
    """Draws of 64 bits that every NumPy gives alike: bit generators are frozen, methods of ``Generator`` are not."""
    return np.random.PCG64(np.random.SeedSequence([seed, purpose, number])).random_raw(count)


def _float_tensor(values: np.ndarray, name: str, source: str, rows: Sequence[int]) -> Tensor:
    if values.dtype.kind in "OSU":
        raise DataError(f"{source}: input {name!r} takes strings, which a model cannot be trained on")
    if values.dtype.kind == "V" or values.dtype == np.float16:  # half types are computed in float32
        values = values.astype(np.float32)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = [row for row, value in zip(rows, values, strict=False) if not np.isfinite(value).all()]
        raise DataError(
            f"{source}: {len(bad)} samples hold NaN or infinity in input {name!r}, the first is sample {bad[0]}: drop "
            f"or mend them"
        )
    return torch.from_numpy(np.array(values, order="C"))


def _label_tensor(labels: np.ndarray, source: str) -> Tensor:
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            count = int((~np.isfinite(labels.reshape(len(labels), -1)).all(axis=1)).sum())
            raise DataError(f"{source}: the labels of {count} samples hold NaN or infinity: drop or mend them")
        return torch.from_numpy(labels.astype(np.float32))
    return torch.from_numpy(labels.astype(np.int64))
