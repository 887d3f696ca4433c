"""nn.Module to .onnx: same numbers, clean names, nothing folded, the module left as it was; and what can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
from torch import nn  # noqa: E402

from onnxcompress import cli  # noqa: E402
from onnxcompress.errors import DataError, EquivalenceError, ModelError, OutputError, RecipeError  # noqa: E402
from onnxcompress.models.digits import Digits  # noqa: E402
from onnxcompress.runtime import Runtime  # noqa: E402
from onnxcompress.train.checkpoints import load_checkpoint  # noqa: E402
from onnxcompress.train.export import export_module  # noqa: E402
from onnxcompress.train.exported_graph import Modules  # noqa: E402
from onnxcompress.train.factories import make_module, parse_settings  # noqa: E402

ROOT = Path(__file__).parents[2]
EXPORTERS = ["torchscript", "dynamo"]
DYNAMO_SLOW = ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)]  # each takes 2 s, whatever the module
MAX_ERROR = 3e-6  # onnxruntime against torch; measured 4.5e-7 at worst over the modules below


@pytest.fixture(scope="module")
def runtime():
    with Runtime(timeout_s=120) as shared:
        yield shared


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def export(tmp_path, runtime):
    def run(module, example, **wishes):
        exported = export_module(module, example, tmp_path / "m.onnx", runtime=runtime, **wishes)
        proto = onnx.load(exported.path)
        onnx.checker.check_model(proto, full_check=True)
        assert exported.relative_error <= MAX_ERROR
        return proto, exported

    return run


def ops(proto):
    return Counter(node.op_type for node in proto.graph.node)


def names(values):
    return [value.name for value in values]


def dims(value):
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


def parameters_of(module):
    return {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}


def scrambled(module):
    """A module whose every parameter and statistic has values of its own."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in parameters_of(module).values():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return module


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_digits(export, exporter):
    """A fresh net has many equal tensors: each must stay an initializer of its own, or training would tie them."""
    torch.manual_seed(0)
    module = Digits()
    proto, exported = export(module, torch.randn(1, 1, 8, 8), exporter=exporter, dynamic_batch=True)
    own = parameters_of(module)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for name, value in own.items():
        np.testing.assert_array_equal(stored[name], value.numpy())
    found = ops(proto)
    assert found["BatchNormalization"] == 11 and found["Conv"] == 14 and found["Gemm"] == 2
    assert set(found) <= {
        *("Conv", "BatchNormalization", "Relu", "Add", "Concat", "Gemm"),
        *("GlobalAveragePool", "Flatten", "ReduceMean", "Reshape"),
    }
    assert exported.nodes == len(proto.graph.node) == 41
    assert exported.opset == proto.opset_import[0].version == {"torchscript": 17, "dynamo": 18}[exporter]
    assert exported.exporter == exporter and exported.batch_sizes == (2, 3, 1)
    assert dims(proto.graph.input[0]) == ["batch", 1, 8, 8] and dims(proto.graph.output[0]) == ["batch", 10]
    assert len(stored) <= len(own) + 2, "constants: at most the axes and the shape behind the pool"
    assert_named_by_modules(proto, module)


def assert_named_by_modules(proto, module):
    paths = dict(module.named_modules())
    nodes = names(proto.graph.node)
    assert {"features.0.0/Conv", "features.2.large.1/BatchNormalization", "features.9.branches.2/Conv"} <= set(nodes)
    assert "features.2/Add_1" in nodes and "head.1/Gemm" in nodes and len(set(nodes)) == len(nodes)
    kinds = {"Conv": nn.Conv2d, "BatchNormalization": nn.BatchNorm2d, "Gemm": nn.Linear}
    for node in proto.graph.node:
        path, _, op = node.name.rpartition("/")
        assert op.split("_")[0] == node.op_type and isinstance(paths[path], kinds.get(node.op_type, nn.Module))
        inner = [name for name in node.output if name not in names(proto.graph.output)]
        assert inner == [f"{node.name}_output_{place}" for place in range(len(inner))]
        assert not node.doc_string and not node.metadata_props
    assert not proto.graph.value_info and proto.graph.name == "Digits"


class Listed(nn.Module):
    """Modules that a list and a dict hold, one that runs twice, one that another calls."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in "ab"])
        self.act = nn.ReLU()

    def forward(self, x):
        for block in self.blocks:
            x = self.act(block["norm"](block["lin"](x)))
        return x


@pytest.mark.parametrize("exporter", DYNAMO_SLOW)
def test_names_of_modules_in_lists_and_of_one_that_runs_twice(export, exporter):
    proto, _ = export(Listed(), torch.randn(2, 4), exporter=exporter)
    expected = [f"blocks.{i}.{part}" for i in "01" for part in ("lin/Gemm", "norm/LayerNormalization")]
    assert [name for name in names(proto.graph.node) if not name.startswith("act")] == expected
    assert [name for name in names(proto.graph.node) if name.startswith("act")] == ["act/Relu", "act/Relu_1"]


def test_a_module_is_found_by_its_shortened_name():
    modules = Modules(["", "a", "a.b", "a.b.0", "a.b.1", "a.b.1.b", "c", "c.b"])
    assert modules.path(("a", "b", "b.1")) == "a.b.1" and modules.path(("a", "b", "b.1", "b")) == "a.b.1.b"
    assert modules.path(("c", "b_2")) == "c.b" and modules.path(()) == "" and modules.path(("strange",)) == ""


def test_metadata_names_and_input_order(export):
    proto, exported = export(
        nn.Linear(3, 2), torch.randn(4, 3), input_names=["rows"], output_names=["y"], metadata={"factory": "a:b"}
    )
    kept = {entry.key: entry.value for entry in proto.metadata_props}
    assert kept["onnxcompress.export.factory"] == "a:b" and kept["onnxcompress.export.torch"] == torch.__version__
    assert exported.inputs == (("rows", (4, 3)),) and exported.outputs == (("y", (4, 2)),)
    assert exported.size_bytes == exported.path.stat().st_size and not exported.external_data and not exported.notes


# -- interfaces --------------------------------------------------------------------------------------------------------

Boxes = namedtuple("Boxes", "corners scores")


class Several(nn.Module):
    """Integers and floats in, one of them optional; a dict of tuples out, with None and a tensor that comes twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask=None, *, scale=None):
        h = self.embedding(tokens)
        h = h if mask is None else h * mask.unsqueeze(-1)
        y = self.head(h if scale is None else h * scale)
        return {"logits": y, "aux": (h, None), "boxes": Boxes(h * 2, y)}


@pytest.mark.parametrize("exporter", DYNAMO_SLOW)
def test_several_inputs_and_nested_outputs(export, exporter):
    tokens, mask = torch.arange(10).reshape(2, 5), torch.rand(2, 5)
    proto, _ = export(Several(), [tokens, mask], exporter=exporter, dynamic_batch=True)
    assert names(proto.graph.input) == ["tokens", "mask"]
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert names(proto.graph.output) == ["logits", "aux.0", "boxes.corners", "boxes.scores"]
    assert [dims(value) for value in proto.graph.output] == [["batch", 5, n] for n in (3, 4, 4, 3)]


def test_inputs_go_to_the_parameters_of_their_names(export):
    tokens, scale = torch.arange(10).reshape(2, 5), torch.rand(2, 5, 1)
    proto, _ = export(Several(), [scale, tokens], input_names=["scale", "tokens"])
    assert names(proto.graph.input) == ["scale", "tokens"] and dims(proto.graph.input[0]) == [2, 5, 1]


class Odd(nn.Module):
    """Returns its input, a parameter and, twice, a sum over the batch; does not read one of its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x, unread):
        y = (x @ self.weight).sum(0)
        return x, self.weight, y, y, x.repeat(2, 1)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_outputs_that_do_not_follow_the_batch_and_an_input_that_is_not_read(export, exporter):
    proto, _ = export(Odd(), [torch.randn(1, 3), torch.randn(1, 2)], exporter=exporter, dynamic_batch=True)
    assert names(proto.graph.input) == ["x", "unread"] and names(proto.graph.initializer)[0] == "weight"
    assert [dims(value) for value in proto.graph.output] == [["batch", 3], [3, 2], [2], [2], ["size_0", 3]]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


@pytest.mark.parametrize("opset", [9, 13])
def test_an_opset_that_is_asked_for(export, opset):
    proto, exported = export(Digits(), torch.randn(2, 1, 8, 8), opset=opset)
    assert exported.opset == proto.opset_import[0].version == opset and exported.nodes == 41


@pytest.mark.parametrize("exporter", DYNAMO_SLOW)
def test_weights_beyond_what_one_file_holds(tmp_path, runtime, monkeypatch, exporter):
    """A model of 2.3 GB takes a minute; here the limits are lowered instead."""
    monkeypatch.setattr("onnxcompress.model_io.staging.PROTO_LIMIT_BYTES", 1000)
    monkeypatch.setattr("onnxcompress.train.exporters.INLINE_LIMIT_BYTES", 1000)
    path = tmp_path / "m.onnx"
    exported = export_module(nn.Linear(40, 40), torch.randn(2, 40), path, exporter=exporter, runtime=runtime)
    assert exported.external_data and sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert exported.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir()) > 40 * 40 * 4


def test_tied_parameters_stay_one(export):
    proto, _ = export(Tied(), torch.arange(6).reshape(2, 3))
    assert names(proto.graph.initializer) == ["embedding.weight"]


def test_attention_of_torch(export):
    """Its fused inference path has no ONNX form; it is off while a module is exported, and on again afterwards."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    proto, _ = export(layer, torch.randn(2, 5, 8), dynamic_batch=True)
    assert set(parameters_of(layer)) <= set(names(proto.graph.initializer))
    assert ops(proto)["LayerNormalization"] == 2 and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types(export, dtype):
    proto, _ = export(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).to(dtype), torch.randn(2, 3).to(dtype))
    kinds = {torch.float16: onnx.TensorProto.FLOAT16, torch.float64: onnx.TensorProto.DOUBLE}
    assert {tensor.data_type for tensor in proto.graph.initializer} == {kinds[dtype]}


# -- the module is left as it was --------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Frozen and trained parts, a counter that every call moves, a mode that is not its children's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
        self.net[0].weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(1))
        self.switched = 0

    def train(self, mode=True):
        self.switched += 1
        return super().train(mode)

    def forward(self, x):
        self.calls = self.calls + 1
        return self.net(x)


@pytest.mark.parametrize("exporter", DYNAMO_SLOW)
def test_module_and_random_state_are_untouched(tmp_path, runtime, exporter):
    module = Counting()
    module.net[1].training = False
    module.net(torch.randn(2, 1, 5, 5)).sum().backward()
    modes = [inner.training for inner in module.modules()]
    values = {name: value.clone() for name, value in module.state_dict().items()}
    gradient, own = module.net[0].bias.grad.clone(), set(module.__dict__)
    random = torch.get_rng_state()
    exported = export_module(
        module,
        torch.randn(2, 1, 5, 5, generator=torch.Generator()),
        tmp_path / "m.onnx",
        exporter=exporter,
        runtime=runtime,
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert exported.relative_error <= MAX_ERROR
    assert [inner.training for inner in module.modules()] == modes and module.switched == 0
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert torch.equal(module.net[0].bias.grad, gradient) and set(module.__dict__) == own
    assert "Dropout" not in ops(onnx.load(exported.path))


# -- failures ----------------------------------------------------------------------------------------------------------


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x + torch.zeros(2, 3)


class Text(nn.Module):
    def forward(self, x):
        return {"y": x, "kind": "text"}


FAILURES = [
    (Bessel, {}, ModelError, ["torchscript exporter has no ONNX form of aten.special_bessel_j0", "--exporter dynamo"]),
    (Bessel, {"exporter": "dynamo"}, ModelError, ["no ONNX form of", "bessel_j0", "--exporter torchscript"]),
    pytest.param(
        *(Branching, {"exporter": "dynamo"}, ModelError, ["dynamo exporter cannot take it", "--exporter torchscript"]),
        marks=pytest.mark.slow,
    ),
    (Random, {}, EquivalenceError, ["differs from torch", "allowed 1e-05", "called twice"]),
    (FixedBatch, {"dynamic_batch": True}, DataError, ["batch is not dynamic", "(3, 3)"]),
    (Text, {}, ModelError, ["returns str as kind"]),
    (nn.ReLU, {"tolerance": 1.0, "exporter": "onnx"}, RecipeError, ["'onnx'", "torchscript or dynamo"]),
    (nn.ReLU, {"opset": 99}, RecipeError, ["opset 99", "9 to "]),
    (nn.ReLU, {"opset": 17, "exporter": "dynamo"}, RecipeError, ["opset 17", "18 to"]),
    (nn.ReLU, {"input_names": ["a", "b"]}, RecipeError, ["2 input names", "1 input"]),
    (nn.ReLU, {"output_names": ["a", "b"]}, RecipeError, ["2 output names", "1 output"]),
    (lambda: nn.Linear(3, 3), {"input_names": ["weight"]}, RecipeError, ["'weight'", "name of a parameter"]),
    (lambda: nn.Linear(4, 3), {}, DataError, ["Linear does not take input (2, 3)", "RuntimeError"]),
]


@pytest.mark.parametrize(("make", "wishes", "error", "words"), FAILURES)
def test_a_failure_says_why_and_writes_nothing(tmp_path, runtime, capfd, make, wishes, error, words):
    module = make()
    with pytest.raises(error) as failure:
        export_module(module, torch.randn(2, 3), tmp_path / "m.onnx", runtime=runtime, **wishes)
    assert all(word in str(failure.value) for word in words), failure.value
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", ""), "torch prints the graph on a failure"
    assert "forward" not in module.__dict__ and module.training


def test_a_wrong_file_is_refused(tmp_path, runtime, monkeypatch):
    """A weight that changes on the way: the check sees it."""
    from onnxcompress.train import export as home

    def spoiled(proto, *rest):
        for tensor in proto.graph.initializer:
            if tensor.name == "weight":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), "weight"))
        return tidy(proto, *rest)

    tidy = home.tidy_graph
    monkeypatch.setattr(home, "tidy_graph", spoiled)
    with pytest.raises(EquivalenceError, match=r"max\|d\| / max\|y\|"):
        export_module(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "m.onnx", runtime=runtime)
    assert list(tmp_path.iterdir()) == []


def test_what_tracing_took_for_constant_is_noted(export):
    class Half(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] > 0 and bool((x * 0).sum() == 0) else x - 1

    _, exported = export(Half(), torch.randn(2, 3))
    assert len(exported.notes) == 1 and "test_export.py" in exported.notes[0] and "boolean" in exported.notes[0]


def test_an_output_that_never_varies_is_noted(export):
    zeros = nn.Linear(3, 2)
    nn.init.zeros_(zeros.weight), nn.init.zeros_(zeros.bias)
    assert export(zeros, torch.randn(2, 3))[1].notes == ("the comparison says little: every output is constant",)


@pytest.mark.parametrize("place", ["none/m.onnx", "folder"])
def test_an_output_that_cannot_be_written(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=place.split("/")[0]):
        export_module(nn.ReLU(), torch.randn(2, 3), tmp_path / place)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def wrapped(state):
    ddp = {f"module.{name}": value for name, value in state.items()}
    return {
        "plain": (state, "", ""),
        "state_dict": ({"epoch": 3, "state_dict": state}, "state_dict", ""),
        "model": ({"model": state, "optimizer": {"state": {}, "param_groups": []}}, "model", ""),
        "model_state": ({"model_state": state, "step": torch.tensor(3)}, "model_state", ""),
        "ema": ({"ema": state}, "ema", ""),
        "nested": ({"model": {"state_dict": state}}, "model.state_dict", ""),
        "ddp": (ddp, "", "module."),
        "compiled": ({f"_orig_mod.{name}": value for name, value in state.items()}, "", "_orig_mod."),
        "compiled inside": (
            {name.replace("0.", "0._orig_mod."): value for name, value in state.items()},
            "",
            "_orig_mod.",
        ),
        "both": (
            {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
            "state_dict",
            "module._orig_mod.",
        ),
        "averaged": ({**ddp, "n_averaged": torch.tensor(5)}, "", "module."),
        "half": ({name: v.half() if v.is_floating_point() else v for name, v in state.items()}, "", ""),
        "without counters": ({name: v for name, v in state.items() if "tracked" not in name}, "", ""),
    }


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


STATE = scrambled(net()).state_dict()


@pytest.mark.parametrize("form", wrapped(STATE))
def test_checkpoint_forms(tmp_path, form):
    content, key, prefix = wrapped(STATE)[form]
    torch.save(content, tmp_path / "c.pt")
    module = net()
    loaded = load_checkpoint(module, tmp_path / "c.pt")
    assert loaded.key == key and loaded.prefix.replace("_orig_mod.module.", "module._orig_mod.") == prefix
    assert loaded.tensors == (7 if form != "without counters" else 6)
    for name, value in parameters_of(module).items():
        assert torch.equal(value, STATE[name].half().float() if form == "half" else STATE[name])


def test_safetensors_old_torch_files_and_a_named_place(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "c.safetensors")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": net().state_dict(), "ema": {"shadow": STATE}}, tmp_path / "two.pt")
    for name, key in (("c.safetensors", None), ("old.pth", None), ("two.pt", "ema.shadow")):
        module = net()
        load_checkpoint(module, tmp_path / name, key=key)
        assert torch.equal(module[0].weight, STATE["0.weight"])
    with pytest.raises(RecipeError, match=r"no key 'nothing'; there is model, ema"):
        load_checkpoint(net(), tmp_path / "two.pt", key="nothing")


def test_a_module_named_module_keeps_its_name(tmp_path):
    outer = nn.Module()
    outer.module = net()
    torch.save({f"module.{name}": value for name, value in STATE.items()}, tmp_path / "c.pt")
    assert load_checkpoint(outer, tmp_path / "c.pt").prefix == "" and torch.equal(
        outer.module[0].weight, STATE["0.weight"]
    )


class NotWeights:
    pass


def bad_checkpoints(folder):
    torch.save({"model": NotWeights()}, folder / "object.pt")
    torch.save(net(), folder / "whole.pt")
    torch.save(STATE, folder / "good.pt")
    data = (folder / "good.pt").read_bytes()
    (folder / "cut.pt").write_bytes(data[: len(data) // 2])
    (folder / "text.pt").write_bytes(b"hello, I am not a checkpoint")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00" + b'{"a":')
    torch.save({**STATE, "0.bias": torch.zeros(3)}, folder / "shape.pt")
    torch.save({f"a{i}": torch.zeros(1) for i in range(5)}, folder / "other.pt")
    torch.save({"epoch": 3, "loss": 0.5}, folder / "none.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net().eval(), torch.zeros(1, 1, 5, 5)), folder / "script.pt")
    (folder / "folder.pt").mkdir()
    return {
        "object.pt": ["more than weights", "NotWeights", "torch.save(model.state_dict(), FILE)"],
        "whole.pt": ["more than weights", "torch.save(model.state_dict(), FILE)"],
        "script.pt": ["TorchScript archive", "torch.save(model.state_dict(), FILE)"],
        "cut.pt": ["damaged"],
        "text.pt": ["not a checkpoint"],
        "empty.pt": ["empty"],
        "cut.safetensors": ["damaged"],
        "shape.pt": ["1 of another shape (0.bias 3 for 2)"],
        "other.pt": ["6 missing (0.weight, 0.bias, 1.weight, ...)", "5 unexpected (a0, a1, a2, ...)"],
        "none.pt": ["holds no state_dict, but epoch, loss", "--checkpoint-key"],
        "absent.pt": ["No such file"],
        "folder.pt": ["folder"],
    }


def test_bad_checkpoints_are_one_line_and_change_nothing(tmp_path):
    pytest.importorskip("safetensors")
    for name, words in bad_checkpoints(tmp_path).items():
        module = net()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with pytest.raises(ModelError) as failure:
            load_checkpoint(module, tmp_path / name)
        text = str(failure.value)
        assert name in text and "\n" not in text and len(text) < 300, text
        assert all(word in text for word in words), text
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


# -- factories ---------------------------------------------------------------------------------------------------------


def test_settings():
    assert parse_settings(["classes=10", "widths=(8,16)", "kind=small", "rate=0.5", "deep=True"]) == {
        "classes": 10,
        "widths": (8, 16),
        "kind": "small",
        "rate": 0.5,
        "deep": True,
    }
    for bad in (["classes"], ["=3"], ["a b=3"], ["a=1", "a=2"]):
        with pytest.raises(RecipeError):
            parse_settings(bad)


def test_a_seed_decides_the_weights_and_leaves_torch_alone():
    random = torch.get_rng_state()
    one, same, other = (
        make_module("torch.nn:Linear", {"in_features": 2, "out_features": 2}, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), random)


# -- the command line --------------------------------------------------------------------------------------------------

NETS = """
import torch
from torch import nn

print("imported")

def small(classes=4, width=3):
    print("made")
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 4, classes))

ready = small()
number = 3

def nothing():
    return 3

def broken():
    raise ValueError("no such size")

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 4)

    def forward(self, tokens, mask):
        return self.embedding(tokens) * mask.unsqueeze(-1)

class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)
"""


@pytest.fixture
def verb(tmp_path, monkeypatch, capfd):
    (tmp_path / "exported_nets.py").write_text(NETS)
    (tmp_path / "ends_itself.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "exported_nets", raising=False)

    def run(*arguments):
        with pytest.raises(SystemExit) as done:
            cli.main(["export", *map(str, arguments)])
        return done.value.code, *capfd.readouterr()

    return run


def test_the_verb(verb, tmp_path):
    code, out, err = verb("exported_nets:small", "--input", "1x1x4x4", "--dynamic-batch", "-o", "m.onnx")
    assert code == 0 and err == "imported\nmade\nmade\n", "what a factory prints is no result"
    assert "4 nodes" in out and "seeded initialization (seed 0)" in out and "[batch, 1, 4, 4]" in out
    assert "max|d| / max|y|" in out and "at batch 2, 3, 1" in out
    torch.save(make_module("exported_nets:small", {"classes": 7}, seed=5).state_dict(), "c.pt")
    code, out, _ = verb(
        *("exported_nets:small", "--set", "classes=7", "--checkpoint", "c.pt", "--input", "image:2,1,4,4"),
        *("--output-names", "logits", "-o", "n.onnx", "--json"),
    )
    found = json.loads(out)
    assert code == 0 and found["weights"] == "9 tensors of c.pt" and found["relative_error"] <= MAX_ERROR
    assert found["inputs"] == [{"name": "image", "shape": [2, 1, 4, 4]}]
    assert found["outputs"] == [{"name": "logits", "shape": [2, 7]}]
    kept = {entry.key.rpartition(".")[2]: entry.value for entry in onnx.load("n.onnx").metadata_props}
    assert kept["factory"] == "exported_nets:small" and kept["checkpoint"] == "c.pt" and "seed" not in kept
    code, out, _ = verb("exported_nets:Tokens", "--input", "tokens:1x6:int64:50", "--input", "mask:1x6", "-o", "t.onnx")
    assert code == 0 and "tokens: [1, 6]" in out
    assert sorted(p.name for p in tmp_path.glob("*.onnx")) == ["m.onnx", "n.onnx", "t.onnx"]


IMAGE = ("--input", "1x1x4x4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no_such_package:net", *IMAGE), ["no_such_package:net", "ModuleNotFoundError"]),
        (("exported_nets:absent", *IMAGE), ["AttributeError", "absent"]),
        (("exported_nets:broken", *IMAGE), ["exported_nets:broken", "ValueError: no such size"]),
        (("exported_nets:nothing", *IMAGE), ["gives a int", "nn.Module"]),
        (("exported_nets:number", *IMAGE), ["is a int", "a function, a class or an nn.Module"]),
        (("exported_nets:ready", "--set", "classes=3", *IMAGE), ["takes no settings (classes)"]),
        (("exported_nets:small", "--set", "depth=3", *IMAGE), ["TypeError", "depth"]),
        (("ends_itself:net", *IMAGE), ["SystemExit"]),
        (("exported_nets", *IMAGE), ["package.module:factory"]),
        (("exported_nets:small",), ["--input"]),
        (("exported_nets:small", "--input", "1x?x4"), ["1x?x4", "1x3x224x224"]),
        (("exported_nets:small", "--input", "1x1x4x4:int"), ["does not take input (1, 1, 4, 4)"]),
        (("exported_nets:small", "--input", "1x0x4"), ["sizes are from 1"]),
        (("exported_nets:small", "--input", "1x4:text"), ["DTYPE one of"]),
        (("exported_nets:small", "--input", "1x4:float32:9"), ["bound"]),
        (("exported_nets:small", "--input", "1x2x4x4"), ["does not take input (1, 2, 4, 4)", "channels"]),
        (("exported_nets:small", "--input", "a:1x4", "--input", "1x4"), ["1 of 2 inputs have a name"]),
        (("exported_nets:small", "--input", "a:1x4", "--input-names", "b"), ["not by both"]),
        (("exported_nets:small", *IMAGE, "--checkpoint", "none.pt"), ["none.pt", "No such file"]),
        (("exported_nets:small", *IMAGE, "--checkpoint-key", "ema"), ["--checkpoint"]),
        (("exported_nets:small", *IMAGE, "-o", "no/m.onnx"), ["no/m.onnx", "does not exist"]),
        (("exported_nets:Bessel", *IMAGE), ["aten.special_bessel_j0", "--exporter dynamo"]),
        (("exported_nets:small", *IMAGE, "--opset", "99"), ["opset 99"]),
    ],
)
def test_bad_usage_is_one_line(verb, tmp_path, arguments, words):
    code, out, err = verb("-o", "m.onnx", *arguments)
    lines = [line for line in err.splitlines() if line not in ("imported", "made")]
    assert code == 2 and len(lines) == 1 and out == "", err
    assert lines[0].startswith("onnxcompress: ") and all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.glob("*.onnx*")) and not list(tmp_path.glob(".onnxcompress*"))


def test_an_exported_file_that_differs_is_exit_1(verb, tmp_path):
    (tmp_path / "exported_random.py").write_text(
        "import torch\nclass R(torch.nn.Module):\n    def forward(self, x):\n        return x + torch.rand_like(x)\n"
    )
    code, out, err = verb("exported_random:R", "--input", "2x3", "-o", "m.onnx")
    assert code == 1 and out == "" and err.count("\n") == 1 and "differs from torch" in err
    assert not (tmp_path / "m.onnx").exists()


def test_without_torch_the_verb_says_what_to_install(tmp_path):
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from onnxcompress import cli; import onnxcompress.cli.export, sys; assert 'torch' not in sys.modules\n"
        "cli.main(['export', 'a:b', '--input', '1x3', '-o', 'm.onnx'])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "onnxcompress: export needs torch: pip install onnxcompress[train]\n"
