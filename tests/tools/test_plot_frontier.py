"""The frontier's points, the series that are joined, and that a picture comes out."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "plot_frontier.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plot_frontier", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def row(name, size, error, quality=1.0):
    return {"name": name, "size_bytes": size, "feature_error": error, "output_error": 0.0, "quality": quality}


ROWS = [
    row("original", 8_000_000, 0.0),
    row("float16 weights", 4_000_000, 0.001),
    row("onnxruntime int8 static", 2_000_000, 0.3, 0.9),
    row("ours 9x", 900_000, 0.1, 0.98),
    row("ours 19x", 420_000, 0.2, 0.95),
    row("ours 19x, joint", 420_000, 0.15, 0.97),
    row("no features", 300_000, None),
]


def test_the_frontier_holds_what_nothing_is_both_smaller_and_better_than(tool):
    points = tool.read_points(ROWS, "feature error")
    names = [point.name for point in tool.frontier(points)]
    assert names == ["ours 19x, joint", "ours 9x", "float16 weights"]


def test_ratios_of_one_method_are_one_series(tool):
    series = {point.name: point.series for point in tool.read_points(ROWS, "feature error")}
    assert "original" not in series and "no features" not in series
    assert series["ours 9x"] == series["ours 19x"] == "ours"
    assert series["ours 19x, joint"] == "ours, joint"
    assert series["float16 weights"] == "float16 weights"


def test_disagreement_is_what_quality_lacks(tool):
    found = {point.name: point.loss for point in tool.read_points(ROWS, "disagreement")}
    assert found["onnxruntime int8 static"] == pytest.approx(0.1) and found["no features"] == 0


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_figures_give_the_same_picture(tool, tmp_path, suffix):
    record = tmp_path / "net.json"
    record.write_text(json.dumps({"model": "net", "rows": ROWS}))
    pictures = [tmp_path / f"{number}.{suffix}" for number in range(2)]
    for picture in pictures:
        tool.main([str(record), str(record), "-o", str(picture)])
    first, second = (picture.read_bytes() for picture in pictures)
    assert first == second and len(first) > 5_000


def test_a_bench_without_the_measure_is_named(tool, tmp_path):
    record = tmp_path / "net.json"
    record.write_text(json.dumps({"model": "net", "rows": [row("original", 8, None), row("ours 9x", 1, None)]}))
    with pytest.raises(SystemExit, match="net: no row has the feature error"):
        tool.main([str(record), "-o", str(tmp_path / "net.png")])
