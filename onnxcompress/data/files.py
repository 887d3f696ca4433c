"""Samples out of files: .npz, .npy, folders of .npy, folders of images.

Names are sorted naturally (2.npy before 10.npy), so that ``labels.npy`` meets its samples. An .npz is read at once;
the others give up shapes and types at once and their values when asked for. Nothing pickled is ever loaded.
"""

import itertools
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from onnxcompress.data.inputs import Preprocess, Target, describe
from onnxcompress.errors import DataError, RecipeError

Sample = Mapping[str, np.ndarray]

LABEL_NAMES = ("labels", "label", "y")
INPUT_ALIASES = ("x", "images")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# What np.load raises on damaged bytes.
_BROKEN_FILE = (
    *(OSError, EOFError, ValueError),
    *(SyntaxError, tokenize.TokenError),  # an array's header
    *(zipfile.BadZipFile, zlib.error, RuntimeError),  # RuntimeError: an entry marked encrypted, or an unknown method
    MemoryError,  # a shape of any size
)


class Lazy(Sequence[Sample]):
    """A sequence whose item i is ``make(i)``, made anew each time."""

    def __init__(self, count: int, make: Callable[[int], Sample]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        return map(self._make, range(self._count))  # the inherited one would take an IndexError of make for the end

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        chosen = range(self._count)[index]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(i) for i in chosen]


@dataclass(frozen=True)
class Found:
    """What a source offers: ``eager`` ones are read and checked at once, the others when asked for."""

    samples: Sequence[Sample]
    labels: np.ndarray | None
    eager: bool


def open_npz(path: Path, target: Target) -> Found:
    """Read arrays named like the inputs; a model with one input also takes `x`, `images` or the only array there."""
    archive = _load(path)
    if isinstance(archive, np.ndarray):
        raise DataError(f"{path} is a single .npy array: rename it to {path.stem}.npy")
    with archive:
        names = {spec.name for spec in target.inputs}
        label_name = next((name for name in LABEL_NAMES if name in archive.files and name not in names), None)
        others = [name for name in archive.files if name != label_name]
        aliases = [*INPUT_ALIASES, *(others if len(others) == 1 else [])] if len(names) == 1 else []
        arrays = {}
        for spec in target.inputs:
            name = next((name for name in [spec.name, *aliases] if name in others), None)
            if name is None:
                have = ", ".join(archive.files) or "none"
                raise DataError(f"{path} has no array {spec.name!r}; it has {have}: name the arrays like the inputs")
            arrays[spec.name] = _member(archive, name, path)
            target.check_shape(spec, arrays[spec.name].shape, f"{path}: array {name!r}", stack=True)
            target.check_type(spec, arrays[spec.name].dtype, f"{path}: array {name!r}")
        labels = None if label_name is None else _member(archive, label_name, path)
    count = same_count({name: len(array) for name, array in arrays.items()}, str(path))
    return Found(Lazy(count, lambda i: row_of(arrays, i, target, str(path))), labels, eager=True)


def row_of(arrays: Mapping[str, np.ndarray], index: int, target: Target, source: str) -> Sample:
    """Row ``index`` of stacked samples, checked and converted."""
    return target.fit({name: array[index] for name, array in arrays.items()}, f"{source}: sample {index}")


def _load(path: Path, *, header_only: bool = False) -> Any:
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r" if header_only else None)
    except _BROKEN_FILE as error:
        raise _unreadable(str(path), error) from error


def _read_row(path: Path, row: int | None) -> np.ndarray:
    mapped: np.ndarray = _load(path, header_only=True)
    return mapped if row is None else mapped[row]


def _member(archive: Any, name: str, path: Path) -> np.ndarray:
    try:
        array = archive[name]
    except _BROKEN_FILE as error:
        raise _unreadable(f"{path}: array {name!r}", error) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: {name!r} is no array: write the file with np.savez")
    return array


def _unreadable(what: str, error: BaseException) -> DataError:
    if "pickle" in str(error) or "Python objects" in str(error):
        return DataError(f"{what} is no NumPy data or holds pickled objects, which are never loaded: save plain arrays")
    return DataError(f"{what} cannot be read ({one_line(error)}): write it anew")


def open_folder(folder: Path, target: Target) -> Found:
    """Read a folder of .npy files or of images."""
    files, folders = _entries(folder)
    inner = {sub: _entries(sub)[0] for sub in folders if not sub.name.startswith("__")}
    everything = [*files, *itertools.chain.from_iterable(inner.values())]
    label_file = folder / "labels.npy"
    arrays = any(path.suffix == ".npy" and path != label_file for path in everything)
    images = any(_is_image(path) for path in everything)
    if arrays and images:
        raise DataError(f"{folder} holds both .npy files and images: put them into two folders")
    if not arrays and not images:
        raise DataError(f"{folder} holds no .npy file and no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    stored = _load(label_file) if label_file in files else None
    if images:
        return _open_images(folder, files, inner, stored, target)
    columns = {}
    for spec in target.inputs:
        stem = re.sub(r'[\\/:*?"<>|]', "_", spec.name)
        if folder / stem in inner:
            columns[spec.name] = [path for path in inner[folder / stem] if path.suffix == ".npy"]
        elif folder / f"{stem}.npy" in files:
            columns[spec.name] = [folder / f"{stem}.npy"]
        elif len(target.inputs) == 1:
            columns[spec.name] = [path for path in files if path.suffix == ".npy" and path != label_file]
        if not columns.get(spec.name):
            raise DataError(f"{folder} has no {stem}.npy and no .npy in a folder {stem}, for {describe(spec)}")
    return open_npy(columns, stored, target)


def open_npy(columns: Mapping[str, Sequence[Path]], labels: np.ndarray | None, target: Target) -> Found:
    """Read the .npy files of each input; a file holds one sample, or a stack of them when it has one axis more."""
    rows: dict[str, list[tuple[Path, int | None]]] = {}
    for spec in target.inputs:
        rows[spec.name] = []
        for path in columns[spec.name]:
            header = _load(path, header_only=True)
            stack = header.ndim > len(target.sample_shape(spec))
            target.check_shape(spec, header.shape, str(path), stack=stack)
            target.check_type(spec, header.dtype, str(path))
            rows[spec.name] += [(path, row) for row in range(len(header))] if stack else [(path, None)]
    source = str(Path(os.path.commonpath([path for paths in columns.values() for path in paths])))
    count = same_count({name: len(places) for name, places in rows.items()}, source)

    def read(index: int) -> Sample:
        places = {name: places[index] for name, places in rows.items()}
        what = ", ".join(str(path) if row is None else f"{path}[{row}]" for path, row in places.values())
        return target.fit({name: _read_row(path, row) for name, (path, row) in places.items()}, what)

    return Found(Lazy(count, read), labels, eager=False)


def _open_images(
    folder: Path, files: Sequence[Path], inner: Mapping[Path, Sequence[Path]], stored: np.ndarray | None, target: Target
) -> Found:
    spec = target.only_input(f"{folder} (images)")
    preprocess = (target.preprocess or Preprocess()).for_input(spec)
    if preprocess.size is None:
        raise RecipeError(f"{describe(spec)} leaves the image size open: give it in preprocess, such as size=224")
    try:
        import PIL.Image  # noqa: F401 - only to fail before the first image is asked for
    except ImportError as error:
        raise DataError(f"{folder} holds images, and Pillow is not installed: pip install pillow") from error
    paths, labels = [path for path in files if _is_image(path)], stored
    classes = {sub: found for sub, found in inner.items() if not found or any(map(_is_image, found))}
    if paths and any(classes.values()):
        raise DataError(f"{folder} holds images beside sub-folders with images: move the former into a sub-folder")
    if not paths:
        numbers = _class_numbers([sub.name for sub in classes])
        pairs = [(path, numbers[sub.name]) for sub, found in classes.items() for path in found if _is_image(path)]
        paths = [path for path, _ in pairs]
        labels = np.array([number for _, number in pairs], np.int64) if stored is None else stored

    def read(index: int) -> Sample:
        return {spec.name: preprocess.normalize(_pixels(paths[index], preprocess), spec.dtype)}

    return Found(Lazy(len(paths), read), labels, eager=False)


def _class_numbers(names: Sequence[str]) -> dict[str, int]:
    """Number the sub-folders: names that are all integers as they are, others in sorted order, empty folders too."""
    if all(re.fullmatch(r"[0-9]+", name) for name in names):
        return {name: int(name) for name in names}
    return {name: number for number, name in enumerate(sorted(names))}


def _pixels(path: Path, preprocess: Preprocess) -> np.ndarray:
    """Decode an image to uint8 in the layout, size and channel order of ``preprocess``."""
    from PIL import Image, ImageOps

    assert preprocess.size is not None
    height, width = preprocess.size
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # convert() would clip it at 255
                raise DataError(f"{path} has pixels of mode {image.mode}, 8 bits are expected: convert it")
            image = image.convert("L" if preprocess.channels == "gray" else "RGB")
            if preprocess.crop == "center":
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            else:
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(image).reshape(height, width, -1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded ({one_line(error)}): mend or remove it") from error
    if preprocess.channels == "bgr":
        pixels = pixels[..., ::-1]
    return pixels.transpose(2, 0, 1) if preprocess.layout == "nchw" else pixels


def same_count(counts: Mapping[str, int], source: str) -> int:
    if len(set(counts.values())) != 1:
        raise DataError(f"{source}: samples per input differ: {', '.join(f'{n} {c}' for n, c in counts.items())}")
    return next(iter(counts.values()))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files and the folders inside, without hidden ones, in natural order."""
    try:
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
        visible.sort(key=lambda path: [int(w) if k % 2 else w for k, w in enumerate(re.split(r"([0-9]+)", path.name))])
        return [path for path in visible if path.is_file()], [path for path in visible if path.is_dir()]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({one_line(error)})") from error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES
