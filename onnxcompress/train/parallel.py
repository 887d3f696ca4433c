"""Several processes on one run, as ``torchrun`` starts them.

    torchrun --nproc-per-node 2 -m onnxcompress finetune ...

Each process holds the whole model and takes its rows of every batch. Gradients are added over the processes by one
all-reduce per element type, after the last backward pass of a step, so that a step may have several passes and a pass
may leave parameters out. torch's DistributedDataParallel pairs each forward pass with one backward pass and with
one reduction, which neither holds for. Losses are weighted with the rows they stand for before they go backward.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from onnxcompress.errors import RecipeError

_PATIENCE = timedelta(hours=1)  # the first process may validate for long while the others wait


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add the gradients over the processes; a parameter without one counts as 0 where another process has one."""
        if self.size == 1:
            return
        wanted = [p for p in parameters if p.requires_grad]
        if not wanted:
            return
        present = self.sum(torch.tensor([float(p.grad is not None) for p in wanted], device=wanted[0].device))
        used = [p for p, count in zip(wanted, present.tolist(), strict=True) if count]
        for dtype in dict.fromkeys(p.dtype for p in used):
            group = [p for p in used if p.dtype == dtype]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = self.sum(torch.cat([grad.reshape(-1) for grad in grads]))
            for parameter, grad, part in zip(group, grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
                parameter.grad = part.view(grad.shape)

    def from_first(self, number: float) -> float:
        """The number of the first process, in all of them."""
        if self.size == 1:
            return number
        box = torch.tensor([number], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            box = box.cuda()
        dist.broadcast(box, 0)
        return float(box.item())

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that torchrun started with this one; a world of one without torchrun.

    Args:
        device: "cpu" (they talk by gloo) or "cuda" (by nccl, each process with the GPU of its local rank).

    Raises:
        RecipeError: The environment names several processes and they cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RecipeError(
            f"WORLD_SIZE is {size}, and the processes do not meet: {' '.join(str(error).split())}"
        ) from error
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
