"""More calibration images out of few: cuts of each, some mirrored, resized to the input's size.

A covariance of D inputs needs several times D rows that differ, and positions of one photograph hardly do. What is
fitted to few photographs is known by heart: each layer then sees inputs that the layers before it have been fitted to,
and takes them for better than they are on other photographs.

opennsfw at 18.4x, 24 photographs fitted and 8 to judge: with three cuts of each the feature error on others falls
from .315 to .303.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

CHANNELS = (1, 3, 4)
MIN_SIDE = 96  # smaller pictures have nothing to cut off
LEAST_PART = 0.5  # of a side
MAX_CUTS = 3
ENOUGH = 120  # samples; from half as many on cuts gain little (.280 to .276 with 56)


def cuts_for(samples: int) -> int:
    """How many cuts to make of each of so many samples."""
    return min(MAX_CUTS, max(0, ENOUGH // max(samples, 1) - 1))


def image_axes(values: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Height and width of the inputs that hold images, by name; empty where an input is anything else."""
    found = {}
    for name, value in values.items():
        if not isinstance(value, np.ndarray) or value.ndim != 4 or value.dtype.kind != "f":
            return {}
        if value.shape[1] in CHANNELS and min(value.shape[2:]) >= MIN_SIDE:
            found[name] = (2, 3)
        elif value.shape[3] in CHANNELS and min(value.shape[1:3]) >= MIN_SIDE:
            found[name] = (1, 2)
        else:
            return {}
    # Several images belong together in a way that is not known here.
    return found if len(found) == 1 else {}


def cut(values: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A feed of the same shapes, each of its images a part of the one given, mirrored or not."""
    changed = dict(values)
    for name, axes in image_axes(values).items():
        images = values[name]
        changed[name] = np.stack([_cut_one(image, [axis - 1 for axis in axes], rng) for image in images])
    return changed


def _cut_one(image: np.ndarray, axes: list[int], rng: np.random.Generator) -> np.ndarray:
    part = rng.uniform(LEAST_PART, 1.0)
    mirrored = rng.random() < 0.5
    for axis in axes:
        size = image.shape[axis]
        length = max(2.0, part * size)
        start = rng.uniform(0, size - length)
        image = resampled(image, axis, start + (np.arange(size) + 0.5) * (length / size) - 0.5)
    return np.ascontiguousarray(np.flip(image, axes[1]) if mirrored else image)


def resampled(image: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Linear interpolation along an axis, the edge repeated beyond it."""
    size = image.shape[axis]
    places = np.clip(places, 0, size - 1)
    before = np.minimum(places.astype(np.intp), size - 1)
    after = np.minimum(before + 1, size - 1)
    shape = [1] * image.ndim
    shape[axis] = len(places)
    share = (places - before).astype(image.dtype).reshape(shape)
    first = image.take(before, axis)
    return np.asarray(first + share * (image.take(after, axis) - first), image.dtype)
