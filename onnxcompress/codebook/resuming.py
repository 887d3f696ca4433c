"""The work so far of a run that may be stopped: a folder beside the output, removed at the end.

settings.json      what the run was asked: another model, data or option, and the folder is refused
NAME.npz           arrays of one step; written beside and renamed, so each is whole or absent
NAME.json          the same for plain figures
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.codebook.codebook import Choice, QuantizedLayer
from onnxcompress.codebook.narrow import Float16Layer, Int8Layer
from onnxcompress.errors import OutputError, RecipeError

VERSION = 1
Stored = QuantizedLayer | Int8Layer | Float16Layer


class Checkpoint:
    """Steps of a run on disk.

    Args:
        folder: Where they are; None keeps nothing.
        settings: What the run was asked.
        resume: Go on from what is there; otherwise it is removed.

    Raises:
        RecipeError: The folder is of a run with other settings.
        OutputError: It cannot be written.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], *, resume: bool = True) -> None:
        self.folder = folder
        self.resumed = False
        if folder is None:
            return
        wanted = {"version": VERSION, **settings}
        if not resume:
            self.remove()
        found = self._settings()
        if found is not None:
            differing = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
            if differing:
                key = differing[0]
                there, asked = _short(found.get(key)), _short(wanted.get(key))
                raise RecipeError(
                    f"{folder} is of a run with another {key}: {there}, not {asked}; "
                    "repeat that command, or start anew with --no-resume"
                )
            self.resumed = True
            return
        self._write("settings.json", json.dumps(wanted, indent=1).encode())

    def _settings(self) -> dict[str, Any] | None:
        assert self.folder is not None
        path = self.folder / "settings.json"
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise RecipeError(f"{self.folder} is there and no checkpoint of ours: move it, or write elsewhere")
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path} cannot be read ({error}); start anew with --no-resume") from error
        return found if isinstance(found, dict) else {}

    def remove(self) -> None:
        """Forget everything; leaves a folder alone that is not of our making."""
        if self.folder is not None and (self.folder / "settings.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- figures -----------------------------------------------------------------------------------------------------

    def save(self, name: str, figures: Any) -> None:
        """Keep plain figures."""
        if self.folder is not None:
            self._write(f"{name}.json", json.dumps(figures).encode())

    def load(self, name: str) -> Any:
        """Figures kept before, or None."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is None or not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # a step more to do

    # -- layers ------------------------------------------------------------------------------------------------------

    def save_layer(self, name: str, layer: Stored) -> None:
        """Keep a quantized layer."""
        if self.folder is None:
            return
        arrays, figures = _taken_apart(layer)
        text = np.frombuffer(json.dumps(figures).encode(), np.uint8)
        path = self.folder / f"{name}.npz"
        partial = path.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                np.savez(file, allow_pickle=False, figures=text, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    def load_layer(self, name: str) -> Stored | None:
        """A layer kept before, or None."""
        path = None if self.folder is None else self.folder / f"{name}.npz"
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as found:
                figures = json.loads(found["figures"].tobytes())
                return _put_together({key: found[key] for key in found.files if key != "figures"}, figures)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None  # quantized again

    def _write(self, name: str, content: bytes) -> None:
        assert self.folder is not None
        path = self.folder / name
        partial = path.with_suffix(path.suffix + ".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _taken_apart(layer: Stored) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if isinstance(layer, QuantizedLayer):
        names = ["codebook", "codebook_scale", "indices", "scales", "bias", "order"]
        choice = layer.choice
        figures = {
            "form": list(astuple(choice)),
            "error": layer.error,
            "held_out_error": layer.held_out_error,
            "method": layer.method,
        }
    else:
        names = ["values", "scales", "bias"]
        figures = {"form": "int8" if isinstance(layer, Int8Layer) else "float16"}
    arrays = {name: getattr(layer, name, None) for name in names}
    return {name: array for name, array in arrays.items() if array is not None}, figures


def _put_together(arrays: dict[str, np.ndarray], figures: dict[str, Any]) -> Stored:
    form = figures["form"]
    if form == "int8":
        return Int8Layer(arrays["values"], arrays["scales"], arrays.get("bias"))
    if form == "float16":
        return Float16Layer(arrays["values"], arrays.get("bias"))
    return QuantizedLayer(
        Choice(*form),
        arrays["codebook"],
        arrays.get("codebook_scale"),
        arrays["indices"],
        arrays.get("scales"),
        arrays.get("bias"),
        figures["error"],
        figures["held_out_error"],
        figures["method"],
        arrays.get("order"),
    )


def feeds_digest(feeds: Iterable[Mapping[str, Any]]) -> str:
    """What tells samples from others."""
    digest = hashlib.sha256()
    for feed in feeds:
        for name in sorted(feed):
            array = np.asarray(feed[name])
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data if array.dtype != object else repr(array.tolist()).encode())
    return digest.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """What tells files from others, by their content."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
