"""``optimize`` when things go wrong: a pass that breaks the model, grows the file or slows it down is left out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnxcompress
from onnxcompress import models, pipeline
from onnxcompress.errors import ModelError, OutputError, PassError
from onnxcompress.graph import is_op
from onnxcompress.model_io import load
from onnxcompress.optimizer import OptimizeOptions, optimize
from onnxcompress.rewrite import RewritePass
from onnxcompress.testing import model

QUICK = {"measure_latency": False}


class Wrong(RewritePass):
    """Negates the first Relu it meets."""

    name = "wrong"
    ops = ("Relu",)
    done = False

    def match(self, graph, node):
        return None if any(n.made_by == self.name for n in graph.nodes) else node

    def rewrite(self, graph, node):
        node.op = "Neg"
        graph.touch(node)


class Growing(RewritePass):
    """Adds a large zero to a bias, as a merge that does not pay would."""

    name = "growing"
    ops = ("Relu",)
    is_merge = True

    def match(self, graph, node):
        return None if any(n.made_by == self.name for n in graph.nodes) else node

    def rewrite(self, graph, node):
        shape = [1, *node.inputs[0].shape[1:]]
        zeros = graph.new_constant("zeros", np.zeros([64, *shape[1:]], np.float32))
        top = graph.insert("ReduceMax", [zeros], None, {"axes": [0], "keepdims": 1}, before=node)
        added = graph.insert("Add", [node.inputs[0], top.outputs[0]], None, before=node)
        node.inputs = [added.outputs[0]]


class Slow(RewritePass):
    """Puts twelve matrix products by the identity behind the input."""

    name = "slow"
    ops = ("Relu",)
    is_merge = True

    def match(self, graph, node):
        return None if any(n.made_by == self.name for n in graph.nodes) else node

    def rewrite(self, graph, node):
        eye = graph.new_constant("eye", np.eye(8, dtype=np.float32))
        tensor = node.inputs[0]
        for _ in range(12):
            tensor = graph.insert("MatMul", [tensor, eye], None, before=node).outputs[0]
        node.inputs = [tensor]


class Failing(RewritePass):
    """Raises in match."""

    name = "failing"
    ops = ("Relu",)

    def match(self, graph, node):
        raise RuntimeError("boom")


@pytest.fixture
def with_pass(monkeypatch):
    def use(*classes):
        stage = pipeline.Stage("test", classes)
        monkeypatch.setattr(pipeline, "ORDER", (*pipeline.ORDER, stage))

    return use


@pytest.mark.parametrize("verify_each", [False, True])
def test_a_pass_that_breaks_the_model_is_named_and_left_out(with_pass, tmp_path, verify_each):
    with_pass(Wrong)
    result = optimize(models.path("digits"), tmp_path / "o.onnx", verify_each=verify_each, **QUICK)
    assert [dropped.what for dropped in result.dropped] == ["wrong"]
    assert "max|d|" in result.dropped[0].reason and result.comparison.equivalent
    assert result.after.nodes < result.before.nodes, "the other passes still ran"
    assert "Neg" not in result.after.by_operator


def test_without_the_check_nothing_is_noticed(with_pass, tmp_path):
    """The same wrong pass gets through without the check: the test above shows the check, not luck."""
    with_pass(Wrong)
    result = optimize(models.path("digits"), tmp_path / "o.onnx", check=False, only=("wrong",), **QUICK)
    assert result.after.by_operator["Neg"] == 1


def test_a_larger_file_is_given_up(with_pass, tmp_path):
    with_pass(Growing)
    result = optimize(models.path("digits"), tmp_path / "o.onnx", skip=(), only=("growing",), **QUICK)
    assert result.dropped and "grow" in result.dropped[0].reason
    assert result.unchanged and (tmp_path / "o.onnx").stat().st_size <= 1.01 * models.path("digits").stat().st_size
    assert onnx.load(tmp_path / "o.onnx") == onnx.load(models.path("digits"))


def test_a_slower_model_is_given_up(with_pass, tmp_path):
    with_pass(Slow)
    result = optimize(models.path("digits"), tmp_path / "o.onnx", only=("slow",), latency_budget_s=0.3)
    assert result.dropped and "slower" in result.dropped[0].reason and result.unchanged


def test_a_pass_that_fails_is_our_bug_and_is_named(with_pass, tmp_path):
    with_pass(Failing)
    with pytest.raises(PassError, match=r"pass failing failed at node .*RuntimeError: boom"):
        optimize(models.path("digits"), tmp_path / "o.onnx", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_python_api_in_memory():
    proto = onnx.load(models.path("digits"))
    before = proto.SerializeToString()
    result = onnxcompress.optimize(proto, **QUICK)
    assert proto.SerializeToString() == before, "the given model is left as it is"
    onnx.checker.check_model(result.model)
    assert len(result.model.graph.node) == result.after.nodes < result.before.nodes
    again = onnxcompress.optimize(result.model.SerializeToString(), options=OptimizeOptions(**QUICK))
    assert again.unchanged
    found = onnxcompress.validate(proto, result.model)
    assert found.within_tolerance and found.interface == []


def test_load_change_save(tmp_path):
    graph = onnxcompress.load(models.path("digits"))
    assert any(is_op(node, "Conv") for node in graph.nodes)
    onnxcompress.save(graph, tmp_path / "o.onnx")
    assert onnx.load(tmp_path / "o.onnx") == onnx.load(models.path("digits"))


def test_a_pass_from_another_package_runs(monkeypatch, tmp_path):
    class Entry:
        name, value = "wrong", "somewhere:Wrong"

        def load(self):
            return Wrong

    monkeypatch.setattr(pipeline, "entry_points", lambda group: [Entry()] if group == "onnxcompress.passes" else [])
    result = optimize(models.path("digits"), tmp_path / "o.onnx", only=("wrong",), **QUICK)
    assert [dropped.what for dropped in result.dropped] == ["wrong"]


def test_unwritable_targets_are_refused_before_the_work(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        optimize(models.path("digits"), tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        optimize(models.path("digits"), tmp_path / "a" / "b.onnx")


def test_a_random_model_is_compared_by_shape(tmp_path):
    text = "g (float[2,3] x) => (float[2,3] y) { r = RandomNormalLike(x) t = Identity(r) y = Add(x, t) }"
    result = optimize(model(text), tmp_path / "o.onnx", **QUICK)
    assert result.comparison.equivalent and result.after.nodes == 2


def test_a_model_that_onnxruntime_cannot_run_is_refused(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g (float[2] x) => (float[2] y) { y = ours.Secret(x) }"""
    with pytest.raises(ModelError, match="Secret"):
        optimize(model(text), tmp_path / "o.onnx", **QUICK)
    assert list(tmp_path.iterdir()) == []
    result = optimize(model(text), tmp_path / "o.onnx", check=False, **QUICK)
    assert result.unchanged


def test_newer_ir_versions_than_the_runtime_knows(tmp_path):
    proto = model("g (float[2] x) => (float[2] y) { t = Identity(x) y = Relu(t) }", opset=20)
    proto.ir_version = onnx.IR_VERSION
    result = optimize(proto, tmp_path / "o.onnx", **QUICK)
    assert result.comparison.equivalent and onnx.load(tmp_path / "o.onnx").ir_version == onnx.IR_VERSION


def test_subgraphs_functions_and_overridable_initializers_are_kept(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17, "ours" : 1]>
    g (float[2] x, bool c, float[2] w = {1, 2}) => (float[2] y) {
      t = ours.twice(x) u = Add(t, w)
      y = If (c) <then_branch = a () => (float[2] p) { q = Identity(u) p = Relu(q) },
                  else_branch = b () => (float[2] r) { s = Identity(u) r = Neg(s) }>
    }
    <domain: "ours", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }"""
    proto = onnx.parser.parse_model(text)
    result = optimize(proto, tmp_path / "o.onnx", **QUICK)
    after = onnx.load(tmp_path / "o.onnx")
    assert after.functions == proto.functions and len(after.graph.initializer) == 1
    assert [value.name for value in after.graph.input] == ["x", "c", "w"]
    bodies = [attr.g for node in after.graph.node for attr in node.attribute if attr.HasField("g")]
    assert [len(body.node) for body in bodies] == [1, 1]
    assert result.comparison.equivalent
    assert len(list(load(after).walk())) == 3


def padded_pairs(count):
    """``count`` blocks of 3x3 -> 3x3, both padded, through a wide middle: class 4, 0.35 times the MACs if merged."""
    rng = np.random.default_rng(0)
    weights, lines, name = {}, [], "x"
    for i in range(count):
        weights[f"a{i}"] = (rng.normal(size=(64, 16, 3, 3)) / 12).astype(np.float32)
        weights[f"b{i}"] = (rng.normal(size=(16, 64, 3, 3)) / 24).astype(np.float32)
        lines.append(f"p{i} = Conv<pads=[1,1,1,1]>({name}, a{i}) q{i} = Conv<pads=[1,1,1,1]>(p{i}, b{i})")
        name = f"r{i}"
        lines.append(f"{name} = Relu(q{i})")
    return model(f"g (float[N,16,24,24] x) => (float[N,16,24,24] {name}) {{ {' '.join(lines)} }}", **weights)


def test_approximate_merges_only_when_allowed_and_within_their_error(tmp_path):
    proto = padded_pairs(2)
    exact = optimize(proto, tmp_path / "e.onnx", **QUICK)
    assert exact.unchanged
    assert any("class 4" in miss.reason for miss in exact.passes.results["fuse-conv-chain"].misses)
    loose = optimize(proto, tmp_path / "l.onnx", allow_approximate=2.0, **QUICK)
    assert loose.after.by_operator["Conv"] == 2
    assert loose.after.macs < 0.5 * loose.before.macs
    assert {int(done.exactness) for done in loose.passes.results["fuse-conv-chain"].done} == {4}
    assert 1e-3 < loose.comparison.relative <= 2.0, "the error at the border is real, and it is measured"
    strict = optimize(proto, tmp_path / "s.onnx", allow_approximate=1e-4, **QUICK)
    assert strict.after.by_operator["Conv"] == 4
    assert [dropped.what for dropped in strict.dropped] == ["1 of 2 approximate merges", "1 of 1 approximate merges"]


def test_a_shape_that_was_asked_for_may_cost_its_bytes(tmp_path):
    """Nothing is left to leave out then: the file of 60 bytes grows by more than 1 %, and the work still ends."""
    onnx.save(model("g (float[?] x) => (float[?] y) { y = Relu(x) }"), tmp_path / "m.onnx")
    result = optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", input_shapes={"x": (100_000,)}, **QUICK)
    assert result.after.size_bytes > 1.01 * result.before.size_bytes
    assert result.dropped == []
    sizes = onnx.load(tmp_path / "o.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in sizes] == [100_000]
