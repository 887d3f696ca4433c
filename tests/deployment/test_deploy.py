"""Targets onnxruntime and ort-format: what is written runs, and says so when it does not."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcompress import cli
from onnxcompress.deployment.deploying import deploy
from onnxcompress.deployment.ort_format import FOLDING_LIMIT
from onnxcompress.deployment.targets import DeployOptions
from onnxcompress.errors import EquivalenceError, ModelError, OutputError, RecipeError, RuntimeFailure
from onnxcompress.testing import model
from tests.deployment.conftest import codebook_model


def run_script(folder, *arguments):
    command = [sys.executable, folder / "run.py", *arguments]
    # It must work where this package is not.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder.parent, env=env, capture_output=True, text=True, timeout=120)


def test_the_model_comes_with_a_program_that_runs_it(digits, tmp_path):
    done = deploy(digits, tmp_path / "out", DeployOptions("onnxruntime"))
    assert set(done.files) == {"deployment.json", "digits.onnx", "run.py", "sample.bin"}
    assert (tmp_path / "out/digits.onnx").read_bytes() == digits.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.onnx", "out"]
    [setting] = done.settings
    assert setting.size_bytes == digits.stat().st_size and 0 < setting.error < 1e-5  # measured 4.6e-7
    script = run_script(tmp_path / "out")
    assert script.returncode == 0, script.stderr
    assert script.stdout.count("agrees") == 2 and "DIFFERS" not in script.stdout


def test_the_program_notices_another_output(digits, tmp_path):
    deploy(digits, tmp_path / "out", DeployOptions("onnxruntime"))
    manifest = json.loads((tmp_path / "out/deployment.json").read_text())
    place = manifest["samples"][1]["outputs"][0]
    data = bytearray((tmp_path / "out/sample.bin").read_bytes())
    expected = np.frombuffer(data, "<f4", offset=place["offset"], count=place["bytes"] // 4).copy()
    expected[0] += 3e-4 * np.abs(expected).max()  # 1e-4 is allowed
    data[place["offset"] : place["offset"] + place["bytes"]] = expected.tobytes()
    (tmp_path / "out/sample.bin").write_bytes(data)
    script = run_script(tmp_path / "out")
    assert script.returncode == 1 and script.stdout.count("DIFFERS") == 1 and script.stdout.count("agrees") == 1


def test_the_program_takes_arrays(digits, tmp_path):
    deploy(digits, tmp_path / "out", DeployOptions("onnxruntime"))
    image = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", image)
    script = run_script(tmp_path / "out", "--input", f"image={tmp_path / 'x.npy'}", "--output", tmp_path / "found")
    assert script.returncode == 0, script.stderr
    expected = ort.InferenceSession(str(digits)).run(None, {"image": image})[0]
    np.testing.assert_array_equal(np.load(tmp_path / "found/logits.npy"), expected)


def test_codebooks_come_with_the_low_memory_setting(codebooks, tmp_path):
    done = deploy(codebooks, tmp_path / "out", DeployOptions("onnxruntime"))
    assert [setting.name for setting in done.settings] == ["default", "low memory"]
    manifest = json.loads((tmp_path / "out/deployment.json").read_text())
    assert manifest["low_memory"] == {FOLDING_LIMIT: "65536"}
    script = run_script(tmp_path / "out", "--low-memory")
    assert script.returncode == 0 and script.stdout.count("agrees") == 2
    assert any("run.py --low-memory" in note for note in done.notes)


@pytest.mark.parametrize("codewords", [16, 256])
def test_an_ort_file_keeps_weights_packed(tmp_path, codewords):
    source = codebook_model(tmp_path / "m.onnx", codewords=codewords)
    done = deploy(source, tmp_path / "out", DeployOptions("ort-format"))
    packed, folded = done.settings
    assert (packed.name, folded.name) == ("packed", "folded")
    path = tmp_path / "out/m.ort"
    assert path.stat().st_size == packed.size_bytes == done.files["m.ort"]
    # Decoded, the weight alone takes 73,728 bytes.
    assert packed.size_bytes < source.stat().st_size + 8192 < 73_728 < folded.size_bytes
    session, original = ort.InferenceSession(str(path)), ort.InferenceSession(str(source))
    assert [(v.name, v.type, v.shape) for v in session.get_inputs()] == [
        (v.name, v.type, v.shape) for v in original.get_inputs()
    ]
    x = np.random.default_rng(1).normal(size=(3, 32, 6, 6)).astype(np.float32)
    expected, found = original.run(None, {"x": x})[0], session.run(None, {"x": x})[0]
    assert np.max(np.abs(found - expected)) <= 1e-6 * np.max(np.abs(expected))  # measured 1.2e-7
    assert run_script(tmp_path / "out").returncode == 0


def test_indices_of_4_bits_are_stored_in_8(tmp_path):
    source = codebook_model(tmp_path / "m.onnx", codewords=16, opset=21, ir_version=10)
    kinds = {tensor.data_type for tensor in onnx.load(source).graph.initializer}
    assert onnx.TensorProto.UINT4 in kinds
    done = deploy(source, tmp_path / "out", DeployOptions("ort-format"))
    assert done.settings[0].name == "packed" and any("stored in 8" in note for note in done.notes)
    assert done.settings[0].size_bytes < source.stat().st_size + 64 * 96 / 2 + 8192
    assert run_script(tmp_path / "out").returncode == 0


def test_weights_that_cannot_stay_packed_are_said_to_be_folded(tmp_path):
    # Something other than a Cast reads the indices as well, so they are not stored in another type.
    proto = onnx.load(codebook_model(tmp_path / "m.onnx", codewords=16, opset=21, ir_version=10))
    name = next(t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.UINT4)
    proto.graph.node.append(onnx.helper.make_node("Transpose", [name], ["turned"]))
    proto.graph.node.append(onnx.helper.make_node("Cast", ["turned"], ["seen"], to=onnx.TensorProto.INT32))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("seen", onnx.TensorProto.INT32, [96, 64]))
    onnx.save(proto, tmp_path / "m.onnx")
    done = deploy(tmp_path / "m.onnx", tmp_path / "out", DeployOptions("ort-format"))
    assert [setting.name for setting in done.settings] == ["folded"]
    assert any("cannot be kept packed" in note for note in done.notes)
    assert run_script(tmp_path / "out").returncode == 0


def test_a_file_with_4_bits_that_nothing_folds_has_no_ort_form(tmp_path):
    text = "g (float[N,6] x) => (float[N,6] y) { d = DequantizeLinear(W, s)  y = Mul(x, d) }"
    proto = model(text, opset=21, ir_version=10, W=np.arange(6).astype(ml_dtypes.uint4), s=np.float32(0.5))
    onnx.save(proto, tmp_path / "m.onnx")
    assert deploy(tmp_path / "m.onnx", tmp_path / "out", DeployOptions("onnxruntime")).settings[0].error == 0
    with pytest.raises(RuntimeFailure, match=r"no \.ort file of m\.onnx.*--target onnxruntime"):
        deploy(tmp_path / "m.onnx", tmp_path / "ort", DeployOptions("ort-format"))
    assert not (tmp_path / "ort").exists()


def test_folded_weights_can_be_asked_for(codebooks, tmp_path):
    done = deploy(codebooks, tmp_path / "out", DeployOptions("ort-format", weights="folded"))
    assert [setting.name for setting in done.settings] == ["folded", "packed"]
    assert done.files["codebooks.ort"] == done.settings[0].size_bytes > 73_728


def test_a_model_without_codebooks_is_converted(digits, tmp_path):
    done = deploy(digits, tmp_path / "out", DeployOptions("ort-format"))
    assert [setting.name for setting in done.settings] == ["folded"] and done.notes == []
    assert run_script(tmp_path / "out").returncode == 0


def test_data_external_to_the_file_comes_along(tmp_path):
    proto = onnx.load(codebook_model(tmp_path / "small.onnx"))
    (tmp_path / "in/w").mkdir(parents=True)
    onnx.save(proto, tmp_path / "in/m.onnx", save_as_external_data=True, location="w/data.bin", size_threshold=1024)
    for target, files in (("onnxruntime", {"m.onnx", "w/data.bin"}), ("ort-format", {"m.ort"})):
        done = deploy(tmp_path / "in/m.onnx", tmp_path / target, DeployOptions(target))
        assert set(done.files) == {"deployment.json", "run.py", "sample.bin", *files}
        assert run_script(tmp_path / target).returncode == 0


def test_several_types_and_a_scalar_come_back_from_the_sample(tmp_path):
    text = (
        "g (float[N,4] x, int64[N] i, bool c) => (float[N,4] y, int64[N] j, float16[N,4] h, bool d) "
        "{ y = Relu(x)  j = Add(i, i)  h = Cast<to = 10>(x)  d = Not(c) }"
    )
    onnx.save(model(text), tmp_path / "m.onnx")
    deploy(tmp_path / "m.onnx", tmp_path / "out", DeployOptions("onnxruntime"))
    script = run_script(tmp_path / "out")
    assert script.returncode == 0 and script.stdout.count("agrees") == 8, script.stdout + script.stderr


def test_what_does_not_load_or_is_no_tensor_is_named(tmp_path):
    proto = model("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    proto.graph.node[0].op_type = "Nothing"
    onnx.save(proto, tmp_path / "bad.onnx")
    onnx.save(model("g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }"), tmp_path / "sequence.onnx")
    for name, error, words in (("bad", RuntimeFailure, "Nothing"), ("sequence", ModelError, "'y' is no tensor")):
        for target in ("onnxruntime", "ort-format"):
            with pytest.raises(error, match=words):
                deploy(tmp_path / f"{name}.onnx", tmp_path / "out", DeployOptions(target))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.onnx", "sequence.onnx"]


def test_outputs_beyond_the_tolerance_leave_nothing(wrong, tmp_path):
    for target in ("onnxruntime", "ort-format", "web"):
        words = r"onnxruntime's own optimizations: output 'y'.*allowed 1e-04.*; --tolerance allows more"
        with pytest.raises(EquivalenceError, match=words):
            deploy(wrong, tmp_path / "out", DeployOptions(target, data=str(tmp_path / "x.npy")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong.onnx", "x.npy"]


@pytest.fixture
def wrong(tmp_path):
    """A model that onnxruntime optimizes wrongly: it takes the zeros of a Pad in front of a MaxPool for -infinity."""
    text = "g (float[N,2,8,8] x) => (float[N,2,8,8] y) { p = Pad(x, pads)  y = MaxPool<kernel_shape = [3,3]>(p) }"
    onnx.save(model(text, pads=np.array([0, 0, 1, 1, 0, 0, 1, 1])), tmp_path / "wrong.onnx")
    np.save(tmp_path / "x.npy", -np.ones((3, 2, 8, 8), np.float32))
    return tmp_path / "wrong.onnx"


def test_options_that_do_not_go_together():
    for wishes, words in (
        ({"target": "phone"}, "must be one of"),
        ({"target": "web", "weights": "packed"}, "--weights is for --target ort-format"),
        ({"target": "onnxruntime", "check": False}, "--no-check is for --target web"),
        ({"target": "ort-format", "ort_web": "x"}, "--ort-web is for --target web"),
        ({"target": "ort-format", "weights": "thin"}, "must be packed or folded"),
    ):
        with pytest.raises(RecipeError, match=words):
            DeployOptions(**wishes)


def test_a_name_that_deploy_needs_itself(digits, tmp_path):
    (tmp_path / "in").mkdir()
    proto = onnx.load(digits)
    onnx.save(proto, tmp_path / "in/m.onnx", save_as_external_data=True, location="sample.bin", size_threshold=64)
    with pytest.raises(OutputError, match=r"sample\.bin has the name"):
        deploy(tmp_path / "in/m.onnx", tmp_path / "out", DeployOptions("onnxruntime"))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["m.onnx", "--target", "onnxruntime", "-o", "out"], 0),
        (["wrong.onnx", "--target", "onnxruntime", "-o", "out", "--data", "x.npy"], 1),
        (["none.onnx", "--target", "onnxruntime", "-o", "out"], 2),
        (["m.onnx", "--target", "onnxruntime", "-o", "m.onnx"], 2),
        (["m.onnx", "--target", "onnxruntime", "-o", "out", "--weights", "packed"], 2),
        (["m.onnx", "-o", "out"], 2),
    ],
)
def test_exit_codes_and_one_line(digits, wrong, tmp_path, monkeypatch, capsys, arguments, code):
    digits.rename(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["deploy", *arguments])
    shown = capsys.readouterr()
    assert end.value.code == code, shown.err
    assert (tmp_path / "out").exists() == (code == 0)
    if code:
        assert shown.out == "" and shown.err.startswith("onnxcompress: ") and shown.err.count("\n") == 1
    else:
        assert "m.onnx -> out for onnxruntime" in shown.out and "run.py" in shown.out and shown.err == ""


def test_json(codebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["deploy", "codebooks.onnx", "--target", "ort-format", "-o", "out", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and found["settings"][0]["name"] == "packed"
    assert found["files"]["codebooks.ort"] == (tmp_path / "out/codebooks.ort").stat().st_size
