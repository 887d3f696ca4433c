"""`onnxcompress quantize` as a user meets it: exit codes, one line on stderr, sizes kept, stopped runs resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from onnxcompress.cli import main
from onnxcompress.testing import model

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def run(*arguments, cwd):
    command = [sys.executable, "-m", "onnxcompress", "quantize", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


def assert_fails(done, code, *words):
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("onnxcompress: "), done.stderr
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def mlp(layers=3, size=48):
    """Linear layers with ReLU between, on inputs that lie near a plane of few dimensions."""
    steps, name = [], "x"
    weights = {}
    for number in range(layers):
        weights[f"W{number}"] = (RNG.normal(size=(size, size)) / np.sqrt(size)).astype(np.float32)
        weights[f"b{number}"] = RNG.normal(size=size).astype(np.float32)
        last = number == layers - 1
        steps.append(f"h{number} = Gemm<transB = 1>({name}, W{number}, b{number})")
        name = f"h{number}"
        if not last:
            steps.append(f"r{number} = Relu({name})")
            name = f"r{number}"
    steps.append(f"y = Identity({name})")
    return model(f"g (float[N,{size}] x) => (float[N,{size}] y) {{ {'  '.join(steps)} }}", **weights)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "m.onnx").write_bytes(mlp().SerializeToString())
    basis = RNG.normal(size=(12, 48))
    np.savez(tmp_path / "x.npz", x=(RNG.normal(size=(64, 12)) @ basis).astype(np.float32))
    return tmp_path


def test_a_ratio_is_kept_and_reported(folder):
    done = run("m.onnx", "-o", "q.onnx", "--data", "x.npz", "--ratio", "3x", "--report", "r.md", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    size = (folder / "q.onnx").stat().st_size
    assert found["after_bytes"] == size <= (folder / "m.onnx").stat().st_size / 3
    assert found["ratio"] == pytest.approx((folder / "m.onnx").stat().st_size / size, abs=1e-3)
    assert [row["name"] for row in found["layers"]] == ["W0", "W1", "W2"]
    assert files(folder) == ["m.onnx", "q.onnx", "r.md", "x.npz"]
    report = (folder / "r.md").read_text()
    assert "| W1 | Gemm |" in report and f"{size:,} bytes" in report


def test_what_cannot_be_reached_is_named(folder):
    assert_fails(run("m.onnx", "--data", "none", "--ratio", "300x", cwd=folder), 1, "the smallest file is")
    assert files(folder) == ["m.onnx", "x.npz"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--data"),
        (("--data", "none", "--ratio", "3x", "--size", "5M"), "exclude each other"),
        (("--data", "none", "--ratio", "much"), "19x"),
        (("--data", "none", "--max-drop", "1%"), "--data or --val"),
        (("--data", "gone.npz"), "gone.npz"),
        (("--data", "none", "--keep", "Z*"), "names no layer"),
        (("--data", "none", "--tune", "joint"), "needs samples"),
        (("--data", "none", "--report", "r.txt"), ".json or .md"),
        (("--data", "none", "--metric", "top1"), "--val"),
        (("--data", "x.npz", "--val", "x.npz"), "no labels"),
        (("out.onnx", "-o", "other.onnx", "--data", "none"), "twice"),
    ],
)
def test_bad_usage_is_one_line(folder, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["onnxcompress", "quantize", "m.onnx", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert_fails(subprocess.CompletedProcess(sys.argv, end.value.code, out, err), 2, words)
    assert files(folder) == ["m.onnx", "x.npz"]


def test_a_dry_run_writes_nothing_and_its_size_is_exact(folder):
    planned = run("m.onnx", "q.onnx", "--data", "x.npz", "--size", "12K", "--dry-run", "--json", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    assert files(folder) == ["m.onnx", "x.npz"]
    plan = json.loads(planned.stdout)
    assert plan["output"] is None and plan["quality"] is None
    done = run("m.onnx", "q.onnx", "--data", "x.npz", "--size", "12K", "-q", cwd=folder)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
    assert (folder / "q.onnx").stat().st_size == plan["after_bytes"] <= 12 << 10


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was_to_the_same_bytes(tmp_path):
    (tmp_path / "m.onnx").write_bytes(mlp(layers=7).SerializeToString())
    np.savez(tmp_path / "x.npz", x=RNG.normal(size=(64, 48)).astype(np.float32))
    arguments = ("m.onnx", "-o", "q.onnx", "--data", "x.npz", "--ratio", "3x", "--jobs", "1")
    command = [sys.executable, "-m", "onnxcompress", "quantize", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    kept = tmp_path / "q.onnx.quantize"
    deadline = time.monotonic() + 60
    while not (kept.exists() and len(list(kept.glob("*.npz"))) >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = said.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "onnxcompress: interrupted; resume with: onnxcompress quantize m.onnx"
    )
    done_before = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.npz")}
    assert 2 <= len(done_before) < 7 and files(tmp_path) == ["m.onnx", "q.onnx.quantize", "x.npz"]
    other = run("m.onnx", "-o", "q.onnx", "--data", "x.npz", "--seed", "1", cwd=tmp_path)
    assert_fails(other, 2, "q.onnx.quantize", "--no-resume")
    assert run(*arguments, "-q", cwd=tmp_path).returncode == 0
    assert not kept.exists()
    resumed = (tmp_path / "q.onnx").read_bytes()
    assert run("m.onnx", "-o", "q.onnx", *arguments[3:-1], "2", "-q", cwd=tmp_path).returncode == 0
    assert (tmp_path / "q.onnx").read_bytes() == resumed
