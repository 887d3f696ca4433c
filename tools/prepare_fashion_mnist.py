"""Write Fashion-MNIST as train.npz, val.npz and test.npz: `python tools/prepare_fashion_mnist.py FOLDER`.

Reads the four files of the Debian package dataset-fashion-mnist (Xiao, Rasul, Vollgraf 2017; MIT licence). Each .npz
holds `image` (N, 1, 28, 28) float32 in [0, 1] and `labels` (N,) int64, so that `--data FOLDER/val.npz` takes it:

    train.npz    55,000
    val.npz       5,000 of the 60,000 training images, 500 of each class, drawn with a fixed seed
    test.npz     10,000, the test part as published
"""

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
VAL_PER_CLASS = 500
SPLIT_SEED = 28

Split = tuple[np.ndarray, np.ndarray]


def read_idx(path: Path) -> np.ndarray:
    """Return the array of a gzipped IDX file of unsigned bytes (LeCun's format: magic, sizes, values)."""
    with gzip.open(path, "rb") as file:
        content = file.read()
    zero, kind, rank = struct.unpack_from(">HBB", content)
    shape = struct.unpack_from(f">{rank}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if (zero, kind) != (0, 8) or values.size != np.prod(shape):
        raise SystemExit(f"{path} is no IDX file of unsigned bytes: type {kind}, {values.size} values for {shape}")
    return values.reshape(shape)


def read_part(source: Path, name: str) -> Split:
    images = read_idx(source / f"{name}-images-idx3-ubyte.gz").astype(np.float32)[:, None] / np.float32(255)
    labels = read_idx(source / f"{name}-labels-idx1-ubyte.gz").astype(np.int64)
    return images, labels


def val_indices(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return the sorted indices of ``per_class`` random samples of each class."""
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def load_splits(source: Path = SOURCE) -> dict[str, Split]:
    """Return images and labels of train, val and test."""
    if not source.is_dir():
        raise SystemExit(f"{source} does not exist: apt install dataset-fashion-mnist")
    images, labels = read_part(source, "train")
    held_out = np.zeros(len(labels), bool)
    held_out[val_indices(labels, VAL_PER_CLASS, SPLIT_SEED)] = True
    return {
        "train": (images[~held_out], labels[~held_out]),
        "val": (images[held_out], labels[held_out]),
        "test": read_part(source, "t10k"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the .npz files go; made if missing")
    parser.add_argument("--source", type=Path, default=SOURCE, help=f"the package's folder (default {SOURCE})")
    arguments = parser.parse_args()
    splits = load_splits(arguments.source)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in splits.items():
        path = arguments.folder / f"{name}.npz"
        np.savez(path, image=images, labels=labels)
        print(f"{path}: {len(labels)} images, {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
