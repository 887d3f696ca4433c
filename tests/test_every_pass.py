"""What holds for every pass: spelling, a test, interface kept, checker passed, a second run finds nothing."""

from __future__ import annotations

import importlib
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto

from onnxcompress import models, pipeline
from onnxcompress.model_io import load, to_proto
from onnxcompress.shapes import infer_shapes
from onnxcompress.validation.signature import interface_differences

ROOT = Path(__file__).parents[1]
PASSES = [cls for stage in pipeline.ORDER for cls in stage.passes]
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def camel(kebab: str) -> str:
    return "".join(part.capitalize() for part in kebab.split("-"))


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_one_name_in_four_spellings(cls):
    stem = cls.name.replace("-", "_")
    assert cls.__module__ == f"onnxcompress.passes.{stem}"
    assert cls.__name__.lower() == camel(cls.name).lower()
    assert (ROOT / "passes" / f"{stem}.py").is_file()
    assert (ROOT / "tests/passes" / f"test_{stem}.py").is_file()
    verbs = ("eliminate_", "fuse_", "fold_", "replace_", "deduplicate_", "simplify_", "inline_", "merge_", "quantize_")
    assert stem.startswith(verbs)


def test_every_file_is_listed_once():
    listed = [cls.name.replace("-", "_") for cls in PASSES]
    files = [path.stem for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__"]
    assert sorted(listed) == sorted(files)


def test_importing_a_pass_from_the_top_level_is_refused():
    with pytest.raises(ImportError, match=r"onnxcompress\.passes"):
        importlib.import_module("passes")


def subjects() -> list[Path]:
    return [models.path("digits"), LIGHT / "light_squeezenet.onnx", LIGHT / "light_shufflenet.onnx"]


@pytest.fixture(scope="module", params=[path.stem for path in subjects()])
def cleaned(request):
    """A model after cleanup and folding, so that each pass meets what it meets in life, and before them."""
    path = next(path for path in subjects() if path.stem == request.param)
    before = onnx.load(path)
    graph = load(ModelProto.FromString(before.SerializeToString()))
    early = {cls.name for stage in pipeline.ORDER if stage.name in ("cleanup", "folding") for cls in stage.passes}
    pipeline.run(graph, early, pipeline.Settings())
    return before, to_proto(graph)


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_keeps_the_interface_and_comes_to_rest(cls, cleaned):
    for proto in cleaned:
        graph = load(ModelProto.FromString(proto.SerializeToString()))
        infer_shapes(graph)
        first = cls().apply(graph)
        after = to_proto(graph)
        assert interface_differences(proto, after) == []
        assert after.opset_import == proto.opset_import and after.ir_version == proto.ir_version
        onnx.checker.check_model(after)
        if not first.rewrites:
            assert after == proto, "nothing was rewritten, and the model is another"
        assert cls().apply(graph).rewrites == 0
        assert to_proto(graph) == after


@pytest.mark.parametrize("path", subjects(), ids=lambda path: path.stem)
def test_the_whole_pipeline_comes_to_rest(path):
    graph = load(path)
    selected = pipeline.select()
    first = pipeline.run(graph, selected, pipeline.Settings())
    assert first.rewrites and first.rounds < pipeline.MAX_ROUNDS
    after = to_proto(graph)
    onnx.checker.check_model(after)
    again = load(ModelProto.FromString(after.SerializeToString()))
    assert pipeline.run(again, selected, pipeline.Settings()).rewrites == 0
