"""The state of a run in one file, written whole or not at all; nothing in it is pickled code.

A checkpoint carries the *identity* of its run: settings, model, data, teacher, number of processes. One of another run
is refused with the name of what differs, because going on from it would give weights that no uninterrupted run gives.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxcompress.errors import OutputError, RecipeError

FORMAT = 1
FILE_NAME = "state.pt"

Identity = Mapping[str, Any]


class Checkpoint:
    """The file of a run inside ``folder``.

    Args:
        folder: Made when first written to.
        identity: What makes a run this run: plain numbers, strings, None, and lists of them, by name.
        resume: Whether a checkpoint found there is taken up.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Identity, *, resume: bool = True) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        self.identity, self.resume = dict(identity), resume
        self.saved_step: int | None = None  # of the last good checkpoint

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``state``, which holds its ``step``.

        Raises:
            OutputError: The folder cannot be written to, or the disk is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".state-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    torch.save({"format": FORMAT, "identity": self.identity, **state}, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, self.path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise OutputError(f"cannot write the checkpoint {self.path}: {reason}") from error
        self.saved_step = int(state["step"])

    def load(self) -> dict[str, Any] | None:
        """The state to go on from; None when there is none, or none is wanted.

        Raises:
            RecipeError: The checkpoint cannot be read, or belongs to another run.
        """
        if not self.resume or not self.path.exists():
            return None
        way_out = "--no-resume starts anew, --checkpoint names another folder"
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            version, theirs = state["format"], state["identity"]
        except Exception as error:  # damaged bytes make torch raise anything
            reason = " ".join(str(error).split())[:120]
            raise RecipeError(f"checkpoint {self.path} cannot be read ({reason}): {way_out}") from error
        if version != FORMAT:
            raise RecipeError(f"checkpoint {self.path} has format {version}, this version reads {FORMAT}: {way_out}")
        found = difference(theirs, self.identity)
        if found:
            raise RecipeError(f"checkpoint {self.path} is of another run: {found}; {way_out}")
        self.saved_step = int(state["step"])
        return state

    def remove(self) -> None:
        """Delete the file, and the folder when nothing else is in it."""
        self.path.unlink(missing_ok=True)
        for left in self.folder.glob(".state-*"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def difference(theirs: Identity, ours: Identity) -> str:
    """What distinguishes two runs, in words; empty when nothing does."""
    changed = [name for name in dict.fromkeys([*ours, *theirs]) if theirs.get(name) != ours.get(name)]
    texts = []
    for name in changed[:3]:
        was, now = str(theirs.get(name)), str(ours.get(name))
        texts.append(f"{name} was {was}, now {now}" if len(was) + len(now) < 80 else f"another {name}")
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(texts) + more


def digest(items: Iterable[tuple[str, Tensor | np.ndarray]]) -> str:
    """A short name for arrays and what they are called: 16 hexadecimal digits of SHA-256."""
    sha = hashlib.sha256()
    for name, value in items:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
