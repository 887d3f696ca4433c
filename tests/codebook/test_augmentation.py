"""Cuts of images: their place and size, what is left alone, and what calibration makes of them."""

import numpy as np
import pytest

from onnxcompress.codebook.augmentation import LEAST_PART, cut, cuts_for, image_axes, resampled
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.statistics import Calibration, split_samples
from onnxcompress.runtime import Runtime
from onnxcompress.testing import graph_of, model


def ramps(layout, count=3, height=100, width=120):
    """Images whose first channel is the row number and second the column number."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([rows, columns, np.full(rows.shape, 7)]).astype(np.float32)
    images = np.stack([image] * count)
    return images if layout == "nchw" else np.ascontiguousarray(images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_each_image_is_a_part_of_its_own(layout):
    made = cut({"x": ramps(layout, 20)}, np.random.default_rng(0))["x"]
    assert made.dtype == np.float32 and made.shape == ramps(layout, 20).shape
    images = made if layout == "nchw" else made.transpose(0, 3, 1, 2)
    parts, mirrored = [], 0
    for rows, columns, constant in images:
        np.testing.assert_array_equal(constant, 7)
        assert np.abs(rows - rows[:, :1]).max() == 0 and np.abs(columns - columns[:1]).max() == 0
        steps, across = np.diff(rows[:, 0])[2:-2], np.diff(columns[0])[2:-2]
        assert np.allclose(steps, steps[0], atol=1e-3) and np.allclose(across, across[0], atol=1e-3)
        assert abs(across[0]) == pytest.approx(steps[0], abs=1e-3)  # as wide as high: no stretching
        mirrored += across[0] < 0
        parts.append(steps[0])
        assert rows.min() >= 0 and rows.max() <= 99 and columns.min() >= 0 and columns.max() <= 119
    assert LEAST_PART <= min(parts) < 0.65 and 0.85 < max(parts) <= 1
    assert 5 <= mirrored <= 15
    assert len(set(parts)) == 20


@pytest.mark.parametrize(
    ("samples", "cuts"), [(0, 3), (1, 3), (30, 3), (31, 2), (40, 2), (41, 1), (60, 1), (61, 0), (1000, 0)]
)
def test_fewer_cuts_of_more_samples(samples, cuts):
    assert cuts_for(samples) == cuts


def test_resampling_meets_the_pixels_and_the_lines_between_them():
    image = np.array([[1.0, 3.0, 7.0]], np.float32)
    places = np.array([-1.0, 0.0, 0.5, 1.0, 1.75, 2.0, 2.5])
    np.testing.assert_array_equal(resampled(image, 1, places), [[1, 1, 2, 3, 6, 7, 7]])


@pytest.mark.parametrize(
    "values",
    [
        {"x": np.zeros((2, 3, 95, 200), np.float32)},
        {"x": np.zeros((2, 5, 100, 100), np.float32)},
        {"x": np.zeros((2, 3, 100), np.float32)},
        {"x": np.zeros((2, 3, 100, 100), np.uint8)},
        {"x": [np.zeros((2, 3, 100, 100), np.float32)]},
        {"x": np.zeros((2, 3, 100, 100), np.float32), "y": np.zeros((2, 3, 100, 100), np.float32)},
        {"x": np.zeros((2, 3, 100, 100), np.float32), "n": np.zeros(2, np.float32)},
    ],
)
def test_what_is_no_image_is_left_alone(values):
    assert not image_axes(values)
    made = cut(values, np.random.default_rng(0))
    assert made.keys() == values.keys() and all(made[name] is values[name] for name in values)


def calibrated(cuts, side=100):
    rng = np.random.default_rng(3)
    samples = [{"x": rng.normal(size=(2, 3, side, side)).astype(np.float32)} for _ in range(5)]
    graph = graph_of(
        model("g (float[N,3,?,?] x) => (float[?,?,?,?] y) { y = Conv(x, W) }", W=np.ones((2, 3, 1, 1), np.float32))
    )
    layers, _ = find_layers(graph)
    with (
        Runtime() as runtime,
        Calibration(graph, layers, samples, runtime=runtime, cuts=cuts, rows_per_input=1 << 30) as calibration,
    ):
        for stage in calibration.stages():
            return samples, [calibration.statistics(stage[0], part) for part in ("fit", "held_out")]


def test_calibration_fits_to_cuts_and_judges_without():
    samples, (fit, held_out) = calibrated(2)
    _, (plain, judge) = calibrated(0)
    assert plain.rows == len(split_samples(5, 0.25, 0)["fit"]) * 2 * 100 * 100
    assert fit.rows == 3 * plain.rows
    np.testing.assert_array_equal(held_out.gram, judge.gram)
    assert len(samples) == 5  # the caller's list stays as it was
    again = calibrated(2)[1][0]
    np.testing.assert_array_equal(fit.gram, again.gram)


def test_calibration_leaves_small_images_alone():
    assert calibrated(2, side=32)[1][0].rows == calibrated(0, side=32)[1][0].rows
