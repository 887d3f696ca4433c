"""What a frozen model gives for samples that come again as they were, kept so that it runs once for each.

At a quarter of the multiply-accumulates a student and its gradients cost less than one run of its teacher. A row of an
output depends, in its last bits, on the rows that it was computed with. So each sample belongs to one block, which is
always computed whole: a training that is taken up in its second epoch reads the very numbers that it would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

MEMORY_BYTES = 256 << 20  # for the outputs that are asked for together

Feeds = Mapping[str, Tensor]
Run = Callable[[Feeds], Mapping[str, Tensor]]


class TeacherOutputs:
    """Outputs by sample, of one teacher or several.

    Args:
        blocks: Numbers of the samples that are computed together; each sample is in one of them.
        read: The inputs of some samples.
        memory_bytes: What is larger for all samples is not kept.
    """

    def __init__(
        self,
        blocks: Sequence[np.ndarray],
        read: Callable[[np.ndarray], Feeds],
        *,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.blocks, self.read, self.memory_bytes = blocks, read, memory_bytes
        self._block = np.empty(sum(map(len, blocks)), np.int64)
        for number, rows in enumerate(blocks):
            self._block[rows] = number
        self._known: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], _Table]] = WeakKeyDictionary()

    def of(
        self,
        teacher: nn.Module,
        names: Sequence[str],
        rows: np.ndarray,
        feeds: Feeds,
        run: Run,
        place: Callable[[Feeds], Feeds],
    ) -> dict[str, Tensor]:
        """Outputs of a teacher for some samples.

        Args:
            teacher: Whose weights and mode do not change.
            names: Of the outputs.
            rows: Numbers of the samples.
            feeds: Their inputs.
            run: Gives the outputs for inputs.
            place: Moves inputs to where those of ``feeds`` are.
        """
        device = next(iter(feeds.values())).device
        key = (*names, str(device), str(torch.is_autocast_enabled(device.type)))
        table = self._known.setdefault(teacher, {}).setdefault(key, _Table(len(self._block), self.memory_bytes))
        for number in dict.fromkeys(self._block[rows[~table.known[rows]]].tolist()):
            if table.too_large:
                break
            block = self.blocks[number]
            table.put(block, run(feeds if np.array_equal(block, rows) else place(self.read(block))))
        return dict(run(feeds)) if table.too_large else table.get(rows)


class _Table:
    """Rows of outputs, of which some are known."""

    def __init__(self, count: int, memory_bytes: int) -> None:
        self.known = np.zeros(count, bool)
        self.memory_bytes = memory_bytes
        self.too_large = False
        self._values: dict[str, Tensor] = {}

    def put(self, rows: np.ndarray, found: Mapping[str, Tensor]) -> None:
        if not self._values:
            each = [value.nbytes // len(rows) for value in found.values() if value.dim() and len(value) == len(rows)]
            self.too_large = len(each) < len(found) or sum(each) * len(self.known) > self.memory_bytes
            if self.too_large:
                return
            self._values = {name: value.new_empty((len(self.known), *value.shape[1:])) for name, value in found.items()}
        index = torch.from_numpy(rows)
        for name, value in found.items():
            self._values[name][index.to(value.device)] = value
        self.known[rows] = True

    def get(self, rows: np.ndarray) -> dict[str, Tensor]:
        index = torch.from_numpy(rows)
        return {name: value[index.to(value.device)] for name, value in self._values.items()}
