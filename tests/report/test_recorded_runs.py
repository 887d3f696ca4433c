"""What recorded runs hold, and pages read, is what runs still give."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from onnxcompress.channels.compensation import Fit
from onnxcompress.channels.pruning import GroupRow
from onnxcompress.cli.view import COMPARED
from onnxcompress.codebook.evaluation import OutputQuality, Quality
from onnxcompress.codebook.results import LayerRow
from onnxcompress.compression.point import Point as CompressionPoint
from onnxcompress.deployment.targets import Deployment, Setting
from onnxcompress.measure import Figures, LatencyFigures
from onnxcompress.validation.comparison import Difference
from onnxcompress.view.changes import NodeChange

RUNS = Path(__file__).with_name("runs")
OF_THE_FILE = {"environment", "run", "weight_bytes"}


def run_of(verb):
    return json.loads((RUNS / f"{verb}.json").read_text())


def names(kind, *more, without=()):
    return {field.name for field in dataclasses.fields(kind)} - set(without) | set(more)


def test_optimize():
    found = run_of("optimize")
    assert set(found["before"]) <= names(Figures) and set(found["latency"]) == names(LatencyFigures)
    assert set(found["equivalence"]["outputs"][0]) <= names(Difference, "equivalent")


def test_quantize():
    found = run_of("quantize")
    assert set(found["layers"][0]) <= names(LayerRow)
    assert set(found["quality"]) <= names(Quality, "criterion", "drop", "error")
    assert set(found["quality"]["outputs"][0]) <= names(OutputQuality)


def test_prune_width():
    found = run_of("prune-width")
    assert set(found["groups"][0]) <= names(GroupRow) and set(found["fits"][0]) == names(Fit)


def test_prune_depth():
    pytest.importorskip("torch")
    from onnxcompress.train.depth.fitting import BlockFit
    from onnxcompress.train.depth.offers import Offer
    from onnxcompress.train.depth.options import DepthResult
    from onnxcompress.train.depth.search import SearchResult
    from onnxcompress.train.loop import TrainResult

    found = run_of("prune-depth")
    assert set(found) - OF_THE_FILE <= names(DepthResult)
    assert set(found["offers"][0]) <= names(Offer, "place", "kind", "deletable")
    assert set(found["found"]) <= names(SearchResult) and set(found["fits"][0]) == names(BlockFit)
    assert set(found["training"]) <= names(TrainResult)


def test_prune_scale():
    pytest.importorskip("torch")
    from onnxcompress.train.scale.options import Decision, Point, ScaleResult
    from onnxcompress.train.scale.predictor import AxisFit
    from onnxcompress.train.scale.solving import CrossCheck

    found = run_of("prune-scale")
    assert set(found) - OF_THE_FILE <= names(ScaleResult, "predictor", without=["decision"])
    assert set(found["predictor"]) <= names(Decision)
    assert set(found["predictor"]["fits"][0]) <= names(AxisFit)
    assert set(found["predictor"]["points"][0]) <= names(Point, "name")
    assert set(found["predictor"]["check"]) <= names(CrossCheck)


def test_finetune():
    pytest.importorskip("torch")
    from onnxcompress.train.finetune import FinetuneResult

    assert set(run_of("finetune")) - OF_THE_FILE <= names(FinetuneResult)


def test_compress():
    found = run_of("compress")
    assert set(found["before"]) <= names(CompressionPoint)
    assert set(found["attempts"][0]["figures"]) <= names(CompressionPoint)


def test_deploy():
    found = run_of("deploy")
    assert set(found) - OF_THE_FILE == names(Deployment) and set(found["settings"][0]) == names(Setting)


def test_view():
    found = run_of("view")
    assert set(found["changes"][0]) == names(NodeChange) and set(found["before"]) == set(COMPARED)
