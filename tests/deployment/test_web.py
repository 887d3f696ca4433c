"""Target web: the same file in Python, in Node and in a browser. What needs npm, Node or Chromium is slow."""

import functools
import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import onnx
import pytest

from onnxcompress import models
from onnxcompress.codebook.options import QuantizeOptions
from onnxcompress.codebook.quantizer import quantize
from onnxcompress.deployment.deploying import deploy
from onnxcompress.deployment.targets import DeployOptions
from onnxcompress.deployment.web_runtime import FILES, PACKAGE, VERSION, copy_web_runtime
from onnxcompress.errors import EquivalenceError, OnnxCompressError, RecipeError, RuntimeFailure
from onnxcompress.testing import model
from tests.deployment import browser
from tests.deployment.conftest import codebook_model

TOLERANCE = 1e-4


@pytest.fixture
def package(tmp_path):
    """What looks like the npm package, with empty files."""
    folder = tmp_path / "project/node_modules" / PACKAGE
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": PACKAGE, "version": "1.2.3"}))
    for name in FILES:
        (folder / "dist" / name).write_text(name)
    return folder


def programs(tmp_path, monkeypatch, **scripts):
    """Let only these programs be found."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder))


def test_the_page_holds_what_it_needs(digits, package, tmp_path):
    options = DeployOptions("web", ort_web=package.parents[1], check=False)
    done = deploy(digits, tmp_path / "out", options)
    assert done.runtime is None and done.settings == [] and any("not checked" in note for note in done.notes)
    page = {"index.html", "page.mjs", "model.mjs", "check.mjs", "deployment.json", "sample.bin", "digits.onnx"}
    assert set(done.files) == page | {f"ort/{name}" for name in FILES}
    manifest = json.loads((tmp_path / "out/deployment.json").read_text())
    assert manifest["onnxruntime_web"] == "1.2.3" and manifest["model"] == "digits.onnx"
    for name in ("index.html", "page.mjs", "model.mjs"):
        assert (
            "//cdn" not in (tmp_path / "out" / name).read_text()
            and "https:" not in (tmp_path / "out" / name).read_text()
        )


def test_the_package_is_found_by_itself_its_dist_or_the_project(package, tmp_path):
    for number, given in enumerate((package, package / "dist", package.parents[1])):
        assert copy_web_runtime(tmp_path / f"ort{number}", given) == "1.2.3"
        assert {path.name for path in (tmp_path / f"ort{number}").iterdir()} == set(FILES)
    with pytest.raises(RecipeError, match="neither the npm package"):
        copy_web_runtime(tmp_path / "ort", tmp_path)
    (package / "dist" / FILES[0]).unlink()
    with pytest.raises(RecipeError, match=f"1.2.3 has no dist/{FILES[0]}; take version {VERSION}"):
        copy_web_runtime(tmp_path / "ort", package)


def test_without_programs_or_network_the_way_out_is_named(digits, package, tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch)
    for wishes, words in (
        ({"ort_web": package}, "install Node.js, or give --no-check"),
        ({"check": False}, "npm was not found.*--ort-web"),
    ):
        with pytest.raises(RecipeError, match=words):
            deploy(digits, tmp_path / "out", DeployOptions("web", **wishes))
    shutil.rmtree(tmp_path / "programs")
    failure = "echo 'npm error code ENOTFOUND' >&2; echo 'npm error network request failed' >&2; exit 1"
    programs(tmp_path, monkeypatch, npm=failure, node="exit 1")
    with pytest.raises(RecipeError, match=rf"{VERSION} \(network request failed\).*--ort-web"):
        deploy(digits, tmp_path / "out", DeployOptions("web"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("echo 'Error: unsupported IR version' >&2; exit 1", RuntimeFailure, "unsupported IR version"),
        (
            """echo '{"agrees": false, "outputs": [{"agrees": false, "name": "y", "sample": 2, "error": 0.5,"""
            """ "allowed": 0.0001}]}'; exit 1""",
            EquivalenceError,
            r"sample 2, output 'y': error 5.0e-01, allowed 1e-04; --tolerance allows more",
        ),
    ],
)
def test_what_node_finds_leaves_no_page(digits, package, tmp_path, monkeypatch, script, error, words):
    programs(tmp_path, monkeypatch, node=script)
    with pytest.raises(error, match=words):
        deploy(digits, tmp_path / "out", DeployOptions("web", ort_web=package))
    assert not (tmp_path / "out").exists()


# -- the real ones -----------------------------------------------------------------------------------------------------


@functools.cache
def why_no_runtime(folder):
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "Node.js and npm are not installed"
    try:
        copy_web_runtime(folder / "ort", None)
    except OnnxCompressError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def web(tmp_path_factory):
    """A folder with onnxruntime-web, fetched once."""
    folder = tmp_path_factory.getbasetemp() / "web"
    (folder / "dist").mkdir(parents=True, exist_ok=True)
    if reason := why_no_runtime(folder):
        pytest.skip(reason)
    for name in FILES:
        shutil.copyfile(folder / "ort" / name, folder / "dist" / name)
    (folder / "package.json").write_text(json.dumps({"name": PACKAGE, "version": VERSION}))
    return folder


@pytest.fixture
def chromium(tmp_path):
    if browser.program() is None:
        pytest.skip("Chromium is not installed")
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def compressed(tmp_path_factory):
    """The embedded digits model in codebooks, a tenth of its size."""
    path = tmp_path_factory.mktemp("compressed") / "digits.q.onnx"
    options = QuantizeOptions(data="sklearn:digits:train", ratio=10, limit=64, jobs=1)
    quantize(models.path("digits"), path, options)
    assert path.stat().st_size <= models.path("digits").stat().st_size / 10
    return path


def node_check(folder):
    done = subprocess.run(["node", "check.mjs", "0.1"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1])


def opened(chromium, folder):
    """What the page found."""
    with browser.served(folder) as url:
        chromium.open(url)
        state = chromium.wait_for("document.body.dataset.state !== 'working' && document.body.dataset.state")
        result = chromium.evaluate("document.getElementById('result').textContent")
        return state, json.loads(result or "null"), chromium.evaluate("document.body.innerText")


@pytest.mark.slow
def test_the_same_compressed_file_in_python_node_and_a_browser(compressed, web, chromium, tmp_path):
    options = DeployOptions("web", data="sklearn:digits", ort_web=web, tolerance=TOLERANCE)
    done = deploy(compressed, tmp_path / "out", options)
    assert (tmp_path / "out/digits.q.onnx").read_bytes() == compressed.read_bytes()
    assert done.runtime == f"onnxruntime-web {VERSION}" and done.settings[0].error <= 1e-6  # measured 2.7e-7
    deploy(compressed, tmp_path / "python", DeployOptions("onnxruntime", data="sklearn:digits", tolerance=TOLERANCE))
    script = subprocess.run([sys.executable, "run.py"], cwd=tmp_path / "python", capture_output=True, timeout=120)
    assert script.returncode == 0, script.stderr
    # Both folders hold the same samples and expected outputs.
    assert (tmp_path / "python/sample.bin").read_bytes() == (tmp_path / "out/sample.bin").read_bytes()
    code, in_node = node_check(tmp_path / "out")
    state, in_browser, text = opened(chromium, tmp_path / "out")
    assert code == 0 and state == "agrees", text
    assert len(in_node["outputs"]) == len(in_browser["outputs"]) == 3
    for one in [*in_node["outputs"], *in_browser["outputs"]]:
        assert one["agrees"] and one["allowed"] == TOLERANCE and one["error"] <= 1e-6  # measured 2.7e-7
    assert in_browser["bytes"] == compressed.stat().st_size
    assert f"{compressed.stat().st_size:,} bytes" in text and "latency" in text and "all outputs agree" in text


@pytest.mark.slow
@pytest.mark.parametrize(("codewords", "opset"), [(16, 17), (16, 21), (256, 17)])
def test_every_type_of_index(web, chromium, tmp_path, codewords, opset):
    source = codebook_model(tmp_path / "m.onnx", codewords=codewords, opset=opset, ir_version=10)
    done = deploy(source, tmp_path / "out", DeployOptions("web", ort_web=web))
    assert done.settings[0].error <= 1e-6  # measured 1.2e-7
    state, found, text = opened(chromium, tmp_path / "out")
    assert state == "agrees" and len(found["outputs"]) == 2, text


@pytest.mark.slow
def test_another_output_is_noticed_in_node_and_in_a_browser(codebooks, web, chromium, tmp_path):
    deploy(codebooks, tmp_path / "out", DeployOptions("web", ort_web=web))
    manifest = json.loads((tmp_path / "out/deployment.json").read_text())
    place = manifest["samples"][0]["outputs"][0]
    data = bytearray((tmp_path / "out/sample.bin").read_bytes())
    expected = np.frombuffer(data, "<f4", offset=place["offset"], count=place["bytes"] // 4).copy()
    expected[-1] += 3e-4 * np.abs(expected).max()  # 1e-4 is allowed
    data[place["offset"] : place["offset"] + place["bytes"]] = expected.tobytes()
    (tmp_path / "out/sample.bin").write_bytes(data)
    code, found = node_check(tmp_path / "out")
    assert code == 1 and [one["agrees"] for one in found["outputs"]] == [False, True]
    state, found, text = opened(chromium, tmp_path / "out")
    assert state == "differs" and text.count("DIFFERS") == 1


@pytest.mark.slow
def test_several_types_and_a_scalar(web, chromium, tmp_path):
    text = (
        "g (float[N,4] x, int64[N] i, bool c) => (float[N,4] y, int64[N] j, float16[N,4] h, bool d) "
        "{ y = Relu(x)  j = Add(i, i)  h = Cast<to = 10>(x)  d = Not(c) }"
    )
    onnx.save(model(text), tmp_path / "m.onnx")
    done = deploy(tmp_path / "m.onnx", tmp_path / "out", DeployOptions("web", ort_web=web))
    assert done.settings[0].error == 0
    state, found, text = opened(chromium, tmp_path / "out")
    assert state == "agrees" and [one["error"] for one in found["outputs"]] == [0] * 8, text


@pytest.mark.slow
def test_data_external_to_the_file(web, chromium, tmp_path):
    proto = onnx.load(codebook_model(tmp_path / "small.onnx"))
    (tmp_path / "in/w").mkdir(parents=True)
    onnx.save(proto, tmp_path / "in/m 1.onnx", save_as_external_data=True, location="w/a b.bin", size_threshold=1024)
    done = deploy(tmp_path / "in/m 1.onnx", tmp_path / "out", DeployOptions("web", ort_web=web))
    assert {"m 1.onnx", "w/a b.bin"} <= set(done.files)
    state, found, text = opened(chromium, tmp_path / "out")
    size = sum(os.stat(tmp_path / "out" / name).st_size for name in ("m 1.onnx", "w/a b.bin"))
    assert state == "agrees" and found["bytes"] == size, text


@pytest.mark.slow
def test_a_damaged_model_is_said_to_be(codebooks, web, chromium, tmp_path):
    deploy(codebooks, tmp_path / "out", DeployOptions("web", ort_web=web))
    (tmp_path / "out/codebooks.onnx").write_bytes(codebooks.read_bytes()[:-1000])
    done = subprocess.run(["node", "check.mjs"], cwd=tmp_path / "out", capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == "" and "Error: " in done.stderr
    state, _, text = opened(chromium, tmp_path / "out")
    assert state == "failed" and "failed: " in text
