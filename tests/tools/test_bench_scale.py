"""What the scale bench makes of its rows."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # the scripts import each other as when run

import bench_scale as bench


def row(arm, accuracy, seed=0, **more):
    plain = {"model": "m", "setting": "s", "goal": "0.4x of the macs", "arm": arm, "seed": seed}
    figures = {"accuracy": accuracy, "original_accuracy": 0.95, "val": accuracy, "fitted": 0.5, "share": 0.4}
    return {**plain, **figures, "speedup": 1.5, "loss": 1 - accuracy, **more}


def decision(expected, seed=0):
    found = {"model": "m", "setting": "s", "goal": "0.4x of the macs", "arm": "decision", "seed": seed}
    return {
        **found,
        "expected": expected,
        "product": expected,
        "collecting": 60.0,
        "decision": {"off_axis_error": 0.01},
    }


def test_rank_correlation():
    assert bench.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert bench.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert bench.spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert bench.spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1)  # ties share their rank
    assert math.isnan(bench.spearman([1, 1], [1, 2]))


def test_regret_is_against_the_best_arm():
    arms = {name: row(name, accuracy) for name, accuracy in (("predictor", 0.9), ("width", 0.91), ("depth", 0.8))}
    found = bench.seed_figures(decision({"predictor": 0.92, "width": 0.9, "depth": 0.7}), arms)
    assert found["regret"] == pytest.approx(0.01) and found["rank correlation"] == pytest.approx(0.5)
    assert found["rank correlation of the loss on validation"] == pytest.approx(1)
    assert found["seconds of collecting"] == 60.0 and "regret of the product" not in found


def test_the_summary_pairs_seeds():
    rows = []
    for seed in range(2):
        rows.append(decision({"predictor": 0.92, "width": 0.9}, seed))
        rows += [row("predictor", 0.9 + 0.01 * seed, seed), row("width", 0.88, seed)]
    text = bench.summary(rows)
    assert "| predictor | 2 | 0.9050 +- 0.0050 |" in text and "| 0.400x |" in text
    assert "- predictor - width: 0.0250 +- 0.0050 over 2 paired seeds" in text
    assert "- regret: 0.0000 +- 0.0000 over 2 seeds" in text
    assert "- seconds of collecting: 60.0 +- 0.0 over 2 seeds" in text
