"""Files that appear whole or not at all: written beside their target, then renamed into place."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import IO

from onnx import GraphProto, ModelProto, TensorProto

from onnxcompress.errors import OutputError
from onnxcompress.graph import Graph
from onnxcompress.model_io.stored import (
    external_alignment,
    external_files,
)
from onnxcompress.model_io.writing import Initializer, Writer

logger = logging.getLogger(__name__)

PROTO_LIMIT_BYTES = (1 << 31) - (1 << 16)  # protobuf refuses messages of 2 GiB
EXTERNAL_THRESHOLD_BYTES = 1024
SMALL_MESSAGE_BYTES = 4096

# Wire format, https://protobuf.dev/programming-guides/encoding: tag = field number << 3 | 2 for length-delimited.
_GRAPH_TAG = bytes([ModelProto.DESCRIPTOR.fields_by_name["graph"].number << 3 | 2])
_INITIALIZER_TAG = bytes([GraphProto.DESCRIPTOR.fields_by_name["initializer"].number << 3 | 2])


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def check_replaceable(target: Path, sources: Collection[Path] = ()) -> None:
    """Refuse a target that renaming a file over it would destroy.

    Args:
        target: Where a file is to be written.
        sources: Data files of the input.

    Raises:
        OutputError: The target is a folder, a device, a pipe, or a file where the input keeps its weights.
    """
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a folder")
    # /dev/stdout leads to a file of any kind by way of /proc, and the link itself would be replaced.
    through_proc = target.is_symlink() and os.readlink(target).startswith("/proc/")
    if through_proc or (target.exists() and not target.is_file()):
        raise OutputError(f"cannot write {target}: it is a device or a pipe, and would be replaced by a file")
    if target.resolve() in sources:
        raise OutputError(f"cannot write {target}: the input keeps its weights in it")


class StagedFile:
    """A model written in full beside its target, not yet visible under its name.

    Used as a context manager: leaving it without ``commit`` removes everything that was written.
    """

    def __init__(self, graph: Graph, target: str | os.PathLike[str]) -> None:
        self.target = Path(target)
        self.committed = False
        assert graph.model is not None, "only the outermost graph is a model"
        self.sources = set(external_files(graph.model, graph.folder))
        check_replaceable(self.target, self.sources)
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=".onnxcompress-", dir=self.target.parent or "."))
        except OSError as error:
            raise OutputError(f"cannot write into {self.target.parent}: {error.strerror}") from error
        self.path = self.folder / self.target.name
        self.data_path: Path | None = None
        try:
            self._write(graph)
        except OSError as error:
            self.discard()
            raise OutputError(f"cannot write {self.target}: {error.strerror or error}") from error
        except BaseException:
            self.discard()
            raise

    def _write(self, graph: Graph) -> None:
        model, initializers = Writer(graph).model()
        names = {entry.proto is not None and entry.external for entry in initializers}
        inline_bytes = sum(entry.nbytes for entry in initializers if not entry.external)
        external = True in names or inline_bytes > PROTO_LIMIT_BYTES
        data_file: IO[bytes] | None = None
        data_name = self._data_name() if external else ""
        skeleton = model.graph.SerializeToString()
        model.ClearField("graph")
        length = 0
        try:
            if external:
                self.data_path = self.folder / data_name
                data_file = open(self.data_path, "wb")  # noqa: SIM115  # closed below, with the model half-written
            # The length stands before the content, so every message is made once to be measured; only small ones stay.
            heads: list[bytes] = []
            kept: list[bytes | None] = []
            for entry in initializers:
                if data_file is not None and self._goes_external(entry, inline_bytes):
                    message = _write_external(entry, data_file, data_name).SerializeToString()
                else:
                    message = entry.inline()
                heads.append(_INITIALIZER_TAG + _varint(len(message)))
                kept.append(message if len(message) <= SMALL_MESSAGE_BYTES else None)
                length += len(heads[-1]) + len(message)
            with open(self.path, "wb") as out:
                out.write(model.SerializeToString())
                out.write(_GRAPH_TAG + _varint(len(skeleton) + length))
                out.write(skeleton)
                for entry, head, small in zip(initializers, heads, kept, strict=True):
                    out.write(head)
                    out.write(entry.inline() if small is None else small)
                out.flush()
                os.fsync(out.fileno())
        finally:
            if data_file is not None:
                data_file.close()

    @staticmethod
    def _goes_external(entry: Initializer, inline_bytes: int) -> bool:
        if entry.external:
            return True
        if entry.constant.dtype == object or entry.nbytes < EXTERNAL_THRESHOLD_BYTES:
            return False
        return entry.proto is None or inline_bytes > PROTO_LIMIT_BYTES

    def _data_name(self) -> str:
        """Name of the data file: never that of a file which the input itself reads."""
        name, n = f"{self.target.name}.data", 0
        while (self.target.parent / name).resolve() in self.sources:
            n += 1
            name = f"{self.target.name}.{n}.data"
        return name

    @property
    def size_bytes(self) -> int:
        """Bytes of the model file and its data file."""
        return self.path.stat().st_size + (self.data_path.stat().st_size if self.data_path is not None else 0)

    def commit(self) -> None:
        """Rename into place, the data file first.

        Raises:
            OutputError: The target cannot be replaced.
        """
        try:
            check_replaceable(self.target, self.sources)
            if self.data_path is not None:
                os.replace(self.data_path, self.target.parent / self.data_path.name)
            os.replace(self.path, self.target)
            self.committed = True
        except OSError as error:
            raise OutputError(f"cannot write {self.target}: {error.strerror}") from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary folder and what is left in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _write_external(entry: Initializer, data_file: IO[bytes], data_name: str) -> TensorProto:
    """Append an initializer's bytes to the data file; returns the TensorProto that points at them."""
    position = data_file.tell()
    data = entry.data()
    padding = -position % external_alignment(len(data))
    data_file.write(b"\0" * padding)
    for start in range(0, len(data), 1 << 24):
        data_file.write(data[start : start + (1 << 24)])
    head = entry.header()
    head.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data_name), ("offset", position + padding), ("length", len(data))):
        head.external_data.add(key=key, value=str(value))
    return head


def save(graph: Graph, path: str | os.PathLike[str]) -> int:
    """Write a graph to ``path``, whole or not at all.

    Returns:
        Bytes written, external data included.

    Raises:
        OutputError: The folder is missing or read-only, or the disk is full.
    """
    with StagedFile(graph, path) as staged:
        size = staged.size_bytes
        staged.commit()
    return size
