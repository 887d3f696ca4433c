"""Figures of a file beside the original's: MACs with sizes that a graph hides, latency against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.compression.goal import parse_goal
from onnxcompress.compression.meter import Meter
from onnxcompress.compression.parts import Parts
from onnxcompress.measure import LatencyFigures
from onnxcompress.optimizer import optimize
from onnxcompress.runtime import Runtime
from onnxcompress.testing import model

WEIGHT = np.ones((2, 1, 3, 3), np.float32)
PADS = np.array([[0, 0], [0, 0], [1, 1], [1, 1]], np.int64)  # (axes, ends), and Pad wants them the other way round


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=60.0) as found:
        yield found


def padded(height: int | str) -> onnx.ModelProto:
    """A network that computes how much it pads, as exporters write it."""
    return model(
        f"g (float[N,1,{height},4] x) => (float[N,2,A,B] y) {{"
        "  t = Transpose<perm=[1,0]>(p)  flat = Reshape(t, eight)  z = Pad(x, flat)  h = Conv(z, w)  y = Softplus(h) }",
        p=PADS,
        eight=np.array([8], np.int64),
        w=WEIGHT,
    )


def test_sizes_that_shape_arithmetic_hides_do_not_count_as_macs_that_are_gone(tmp_path: Path, runtime):
    source, smaller = tmp_path / "m.onnx", tmp_path / "s.onnx"
    onnx.save(padded(4), source)
    optimize(source, smaller, runtime=runtime, measure_latency=False)
    meter = Meter(source, Parts(), runtime)
    found, after = meter.measure(source), meter.measure(smaller)
    assert found.macs == after.macs == 2 * 4 * 4 * 9 and found.macs_exact


def test_a_size_that_is_open_is_assumed_in_both(tmp_path: Path, runtime):
    source, smaller = tmp_path / "m.onnx", tmp_path / "s.onnx"
    onnx.save(padded("H"), source)
    optimize(source, smaller, runtime=runtime, measure_latency=False)
    meter = Meter(source, Parts(), runtime)
    found, after = meter.measure(source), meter.measure(smaller)
    assert found.macs == after.macs and not found.macs_exact


@pytest.mark.parametrize("goal", ["size=2x", "latency=0.5x"])
def test_the_original_takes_as_long_as_itself(goal, tmp_path: Path, runtime, monkeypatch):
    source = tmp_path / "m.onnx"
    onnx.save(padded(4), source)
    meter = Meter(source, Parts(), runtime, latency=parse_goal(goal).latency)
    monkeypatch.setattr(meter, "_timed", lambda path, budget_s: LatencyFigures(2.0, 2.6, 0.77, 0.7, 0.8, 9))
    found = meter.measure(source).latency
    assert found is not None and (found.ratio, found.low, found.high) == (1.0, 1.0, 1.0)
    assert found.original_ms == found.result_ms == 2.0
