"""A folder that appears whole or not at all: filled beside its place, then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from onnxcompress.errors import OutputError

MANIFEST = "deployment.json"


class StagedFolder:
    """A folder being filled, not yet visible under its name.

    Used as a context manager: leaving it without ``commit`` removes everything that was written.

    Args:
        target: Where it is to appear; nothing, or an empty folder.
        force: Also where an earlier deployment is, which it then replaces.
        sources: Files that must not be lost with what is replaced.

    Raises:
        OutputError: Something is in its place, or the folder around it is missing or read-only.
    """

    def __init__(self, target: Path, *, force: bool = False, sources: tuple[Path, ...] = ()) -> None:
        self.target = target
        self.force = force
        self.sources = sources
        self._check()
        try:
            self._around = Path(tempfile.mkdtemp(prefix=".onnxcompress-", dir=_parent(target)))
            # Not the temporary folder itself, which nobody else may read.
            self.path = self._around / (target.name or "folder")
            self.path.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write into {_parent(target)}: {error.strerror}") from error

    def _check(self) -> None:
        if self.target.is_symlink() or (self.target.exists() and not self.target.is_dir()):
            raise OutputError(f"cannot write {self.target}: it is a file or a link; name a new folder")
        if not self.target.is_dir() or not any(self.target.iterdir()):
            return
        if not (self.target / MANIFEST).is_file():
            raise OutputError(f"cannot write {self.target}: the folder is not empty; name a new one")
        if not self.force:
            raise OutputError(f"cannot write {self.target}: it holds a deployment; --force replaces it")
        whole = self.target.resolve()
        for source in self.sources:
            if source.resolve().is_relative_to(whole):
                raise OutputError(f"cannot replace {self.target}: {source.name}, which is deployed, lies in it")

    def commit(self) -> None:
        """Rename into place.

        Raises:
            OutputError: Something is in its place by now, or it cannot be replaced.
        """
        self._check()
        old = self._around / "replaced"
        try:
            if self.target.exists():
                os.replace(self.target, old)
            try:
                os.replace(self.path, self.target)
            except OSError:
                if old.exists():
                    os.replace(old, self.target)
                raise
        except OSError as error:
            raise OutputError(f"cannot write {self.target}: {error.strerror}") from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary folder and what is left in it."""
        shutil.rmtree(self._around, ignore_errors=True)

    def __enter__(self) -> StagedFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _parent(target: Path) -> Path:
    return target.absolute().parent
