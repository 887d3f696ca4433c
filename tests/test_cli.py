"""The command line as a user meets it: exit codes, one line on stderr, nothing half-written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import cli, models
from onnxcompress.model_io import PASS_KEY
from onnxcompress.testing import model

ROOT = Path(__file__).parents[1]
DIGITS = models.path("digits")


def run(*arguments, cwd, timeout=120, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "XDG_CACHE_HOME": f"{cwd}-cache", **environment}
    command = [sys.executable, "-m", "onnxcompress", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def assert_fails(done, code, *words):
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("onnxcompress: "), done.stderr
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "m.onnx").write_bytes(DIGITS.read_bytes())
    return tmp_path


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# -- optimize ----------------------------------------------------------------------------------------------------------


def test_the_embedded_default_shows_accuracy_on_real_data(tmp_path):
    done = run("optimize", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["after"]["nodes"] < 0.6 * report["before"]["nodes"]
    assert report["after"]["macs"] < 0.6 * report["before"]["macs"] and report["after"]["macs_exact"]
    assert report["after"]["size_bytes"] < report["before"]["size_bytes"]
    for before, after in report["quality"].values():
        assert before >= 0.97 and abs(after - before) < 0.002
    assert files(tmp_path) == ["digits.optimized.onnx"]


def test_names_of_outputs(folder):
    for arguments, expected in (
        (("m.onnx",), "m.optimized.onnx"),
        (("m.onnx", "-o", "a.onnx"), "a.onnx"),
        (("m.onnx", "b.onnx"), "b.onnx"),
        (("m.onnx", "-o", "."), None),
    ):
        done = run("optimize", *arguments, "--no-latency", "-q", cwd=folder)
        if expected is None:
            assert_fails(done, 2, "would be overwritten", "--in-place")
        else:
            assert done.returncode == 0 and (folder / expected).is_file(), done.stderr
            assert done.stdout == "" and done.stderr == ""
    assert (folder / "m.onnx").read_bytes() == DIGITS.read_bytes()


def test_several_models_a_folder_jobs_and_a_bad_one_among_them(folder):
    (folder / "in/deep").mkdir(parents=True)
    (folder / "in/deep/two.onnx").write_bytes(DIGITS.read_bytes())
    (folder / "in/one.onnx").write_bytes(DIGITS.read_bytes())
    (folder / "in/bad.onnx").write_bytes(b"no model")
    done = run("optimize", "in", "-o", "out", "--jobs", 2, "--no-latency", "--report", "r.json", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "bad.onnx" in done.stderr and "not an ONNX model" in done.stderr
    assert [f for f in files(folder) if f.startswith("out")] == ["out/deep/two.onnx", "out/one.onnx"]
    assert len(json.loads((folder / "r.json").read_text())) == 2


def test_in_place_and_every_made_node_is_stamped(folder):
    done = run("optimize", "m.onnx", "--in-place", "--no-latency", cwd=folder)
    assert done.returncode == 0 and files(folder) == ["m.onnx"]
    proto = onnx.load(folder / "m.onnx")
    stamps = {entry.value for node in proto.graph.node for entry in node.metadata_props if entry.key == PASS_KEY}
    assert {"fuse-batchnorm-into-conv", "fuse-conv-chain"} & stamps
    again = run("optimize", "m.onnx", "--in-place", "--no-latency", "--json", cwd=folder)
    assert json.loads(again.stdout)["unchanged"]


def test_fixed_shapes_change_the_interface_only_when_asked(folder):
    run("optimize", "m.onnx", "-o", "a.onnx", "--no-latency", cwd=folder)
    done = run("optimize", "m.onnx", "-o", "b.onnx", "--batch", 3, "--no-latency", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = run("optimize", "m.onnx", "-o", "c.onnx", "--input-shape", "image:4,1,8,8", "--no-latency", cwd=folder)
    assert done.returncode == 0, done.stderr

    def sizes(name):
        proto = onnx.load(folder / name)
        dims = [value.type.tensor_type.shape.dim[0] for value in (*proto.graph.input, *proto.graph.output)]
        return [dim.dim_value or dim.dim_param for dim in dims]

    assert sizes("a.onnx") == ["batch", "batch"] and sizes("b.onnx") == [3, 3] and sizes("c.onnx") == [4, 4]


def test_only_skip_level_and_list(folder):
    done = run(
        "optimize", "m.onnx", "-o", "a.onnx", "--only", "fuse-batchnorm-into-conv", "--json", "--no-latency", cwd=folder
    )
    assert [one["name"] for one in json.loads(done.stdout)["passes"]] == ["fuse-batchnorm-into-conv"]
    done = run(
        "optimize",
        "m.onnx",
        "-o",
        "b.onnx",
        "--skip",
        "fuse-conv-chain,fuse-skip-into-conv",
        "--json",
        "--no-latency",
        cwd=folder,
    )
    names = {one["name"] for one in json.loads(done.stdout)["passes"] if one["rewrites"]}
    assert "fuse-conv-chain" not in names and "fuse-batchnorm-into-conv" in names
    done = run("optimize", "m.onnx", "-o", "c.onnx", "-O0", "--json", "--no-latency", cwd=folder)
    assert json.loads(done.stdout)["unchanged"] and onnx.load(folder / "c.onnx") == onnx.load(folder / "m.onnx")
    done = run("optimize", "m.onnx", "-o", "d.onnx", "-O2", "--json", "--no-latency", cwd=folder)
    assert not any(one["is_merge"] for one in json.loads(done.stdout)["passes"])
    listed = run("optimize", "--list-passes", cwd=folder).stdout
    assert "fuse-conv-chain" in listed and len(listed.splitlines()) > 30


def test_verify_each_and_markdown_report(folder):
    done = run("optimize", "m.onnx", "-o", "a.onnx", "--verify-each", "--report", "r.md", "--no-latency", cwd=folder)
    assert done.returncode == 0, done.stderr
    text = (folder / "r.md").read_text()
    assert "fuse-conv-chain" in text and "1 exact" in text and "Equivalence: equivalent" in text


def test_measured_cost_keeps_a_cache(folder):
    for _ in range(2):
        done = run("optimize", "m.onnx", "-o", "a.onnx", "--cost", "measured", "--no-latency", "-q", cwd=folder)
        assert done.returncode == 0, done.stderr
    cache = json.loads(Path(f"{folder}-cache/onnxcompress/latency.json").read_text())
    assert cache and all(0 < value < 1000 for value in cache.values())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.onnx", "-o", "x.onnx"), ["none.onnx", "No such file"]),
        (("m.onnx", "-o", "no/x.onnx"), ["no/x.onnx", "does not exist"]),
        (("m.onnx", "-o", "x.onnx", "--only", "fuse-batchnorm-in-conv"), ["did you mean 'fuse-batchnorm-into-conv'"]),
        (("m.onnx", "-o", "x.onnx", "--input-shape", "image"), ["NAME:1,3,224,224"]),
        (("m.onnx", "-o", "x.onnx", "--input-shape", "img:1,1,8,8"), ["'img'", "'image'"]),
        (("m.onnx", "-o", "x.onnx", "--input-shape", "image:1,1,8"), ["4 axes", "3 sizes"]),
        (("m.onnx", "-o", "x.onnx", "--input-shape", "image:1,3,8,8"), ["fixed to 1 on axis 1"]),
        (("m.onnx", "-o", "x.onnx", "--batch", "0"), ["--batch"]),
        (("m.onnx", "-o", "x.onnx", "--report", "r.pdf"), [".json or .md"]),
        (("m.onnx", "-o", "x.onnx", "--tolerance", "-1"), ["--tolerance"]),
        (("m.onnx", "-o", "x.onnx", "--data", "none.npz"), ["none.npz"]),
        (("m.onnx", "-o", "x.onnx", "--in-place"), ["exclude"]),
        (("m.onnx", "-o", "x.onnx", "--no-such-option"), ["--no-such-option"]),
        (("empty", "-o", "out"), ["empty", "no .onnx file"]),
        (("m.onnx", "m.onnx"), ["-o"]),
        (("m.onnx", "-o", "x.onnx", "--max-constant-mb", "nan"), ["--max-constant-mb", "finite"]),
        (("m.onnx", "-o", "x.onnx", "--tolerance", "nan"), ["--tolerance", "finite"]),
        (("m.onnx", "-o", "x.onnx", "--seed", "-1"), ["--seed"]),
        (("m.onnx", "-o", "x.onnx", "--batch", "99999999999999999999"), ["--batch"]),
        (("m.onnx", "-o", "x.onnx", "--input-shape", "image:99999999999999999999,1,8,8"), ["a size is above"]),
        (("m.onnx", "-o", "x.onnx", "--input-shape", "image:1,1,8,8", "--input-shape", "image:2,1,8,8"), ["both"]),
        (("m.onnx", "-o", "x.onnx", "--only", ""), ["empty"]),
        (("m.onnx", "-o", "x.onnx", "--report", "no/r.json"), ["no/r.json", "does not exist"]),
        (("m.onnx", "-o", "x.onnx", "--metric", "top1"), ["--data"]),
        (("m.onnx", "-o", "x.onnx", "--metric", "top_1", "--data", "sklearn:digits"), ["top_1"]),
        (("", "--in-place"), ["empty"]),
        (("m.onnx", "-o", "x.onnx", "--threads", "9999999999"), ["--threads"]),
    ],
)
def test_bad_usage_is_one_line(folder, arguments, words):
    (folder / "empty").mkdir()
    before = files(folder)
    assert_fails(run("optimize", *arguments, cwd=folder), 2, *words)
    assert files(folder) == before and (folder / "m.onnx").read_bytes() == DIGITS.read_bytes()


def unknown_operator():
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    return helper.make_model(
        helper.make_graph([node], "g", [x], [y]), ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )


def test_an_unknown_operator_is_named(folder):
    onnx.save(unknown_operator(), folder / "u.onnx")
    done = run("optimize", "u.onnx", "-o", "x.onnx", cwd=folder)
    assert_fails(done, 2, "NoSuchOperator")
    assert not (folder / "x.onnx").exists()
    done = run("optimize", "u.onnx", "-o", "x.onnx", "--no-check", "--no-latency", cwd=folder)
    assert done.returncode == 0 and onnx.load(folder / "x.onnx") == unknown_operator()


def test_truncated_files_and_flipped_bytes_never_leave_anything_half_written(folder):
    """Fifty cuts, and seeded byte flips: one line and exit 2 (or 1), or a result that was checked."""
    data = DIGITS.read_bytes()
    rng = np.random.default_rng(0)
    broken = [data[: len(data) * i // 50] for i in range(50)]
    for _ in range(20):
        flipped = bytearray(data)
        for place in rng.integers(0, len(data), 8):
            flipped[place] ^= 1 << int(rng.integers(8))
        broken.append(bytes(flipped))
    # A header flip is likelier to be noticed than one in a weight: flip there as well.
    for _ in range(20):
        flipped = bytearray(data)
        flipped[int(rng.integers(0, 12000))] ^= 1 << int(rng.integers(8))
        broken.append(bytes(flipped))
    (folder / "in").mkdir()
    for i, content in enumerate(broken):
        (folder / f"in/{i:03}.onnx").write_bytes(content)
    done = run("optimize", "in", "-o", "out", "--no-latency", "--json", cwd=folder, timeout=300)
    assert done.returncode in (1, 2), "the cuts at least are refused"
    results = json.loads(done.stdout or "[]")
    written = {Path(name).name for name in files(folder) if name.startswith("out")}
    assert written == {Path(one["output"]).name for one in results}
    refused = done.stderr.strip().splitlines()
    assert len(refused) + len(written) == len(broken), done.stderr
    assert all(line.startswith("onnxcompress: in/") for line in refused), done.stderr
    assert "internal error" not in done.stderr and "Traceback" not in done.stderr
    assert not any(name < "050" for name in written), "a truncated model was accepted"
    for i, content in enumerate(broken):
        assert (folder / f"in/{i:03}.onnx").read_bytes() == content


def external_model(folder):
    proto = model(
        "g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }",
        w=np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32),
    )
    path = folder / "e.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="e.data", size_threshold=0)
    return path


def test_external_data_missing_or_outside_is_one_line(folder):
    path = external_model(folder)
    ok = run("optimize", "e.onnx", "-o", "x.onnx", "--no-latency", cwd=folder)
    assert ok.returncode == 0 and (folder / "x.onnx.data").is_file(), ok.stderr
    (folder / "e.data").rename(folder / "moved")
    assert_fails(run("optimize", "e.onnx", "-o", "z.onnx", cwd=folder), 2, "e.data")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "../../../../../../etc/passwd"
    path.write_bytes(proto.SerializeToString())
    assert_fails(run("optimize", "e.onnx", "-o", "z.onnx", cwd=folder), 2, "outside")
    assert not [name for name in files(folder) if name.startswith(("z", ".onnxcompress"))]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(folder):
    """A file system of 64 kB where one can be mounted, /dev/full otherwise."""
    target = folder / "small"
    target.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(target)], capture_output=True)
    if mounted.returncode:
        done = run("optimize", "m.onnx", "-o", "x.onnx", "--no-latency", "--report", "r.md", cwd=folder)
        assert done.returncode == 0
        os.symlink("/dev/full", folder / "full.md")
        done = run("optimize", "m.onnx", "-o", "y.onnx", "--no-latency", "-q", "--report", "full.md", cwd=folder)
        assert_fails(done, 2, "No space left on device")
        return
    try:
        done = run("optimize", "m.onnx", "-o", target / "x.onnx", "--no-latency", cwd=folder)
        assert_fails(done, 2, "No space left on device")
        assert list(target.iterdir()) == []
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_one_line(folder):
    (folder / "ro").mkdir(mode=0o555)
    assert_fails(run("optimize", "m.onnx", "-o", "ro/x.onnx", cwd=folder), 2, "ro", "Permission denied")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0.3, 0.8, 1.3])
def test_an_interrupt_leaves_nothing(folder, number, delay_s):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "onnxcompress", "optimize", "m.onnx", "-o", "x.onnx", "--verify-each"]
    process = subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(delay_s)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    left = files(folder)
    if "x.onnx" in left:  # it came after the file had been put in place: then the file is whole
        onnx.checker.check_model(onnx.load(folder / "x.onnx"))
        assert process.returncode == 0 or "no output was written" not in err
        left.remove("x.onnx")
    elif process.returncode == 130:  # before the command line has set its handlers, Python's own apply
        assert err == "onnxcompress: interrupted; no output was written\n"
    assert left == ["m.onnx"], "something half-written was left"
    assert not [p for p in folder.iterdir() if p.name.startswith(".onnxcompress")]


# -- the other verbs ---------------------------------------------------------------------------------------------------


def test_validate(folder):
    run("optimize", "m.onnx", "-o", "x.onnx", "--no-latency", "-q", cwd=folder)
    done = run("validate", "m.onnx", "x.onnx", cwd=folder)
    assert done.returncode == 0 and "logits" in done.stdout, done.stderr
    done = run("validate", "m.onnx", "x.onnx", "--data", "sklearn:digits", "--metric", "top1", "--json", cwd=folder)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["metric"]["samples"] > 300 and found["metric"]["optimizations_off"][0] > 0.97
    proto = onnx.load(folder / "m.onnx")
    weight = next(t for t in proto.graph.initializer if t.name == "head.0.weight")
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(proto, folder / "wrong.onnx")
    done = run("validate", "m.onnx", "wrong.onnx", cwd=folder)
    assert done.returncode == 1 and "differs" in done.stdout
    done = run("validate", "m.onnx", "wrong.onnx", "--data", "sklearn:digits", "--metric", "top1", cwd=folder)
    assert done.returncode == 1
    assert_fails(run("validate", "m.onnx", "x.onnx", "--metric", "top1", cwd=folder), 2, "--data")
    assert_fails(run("validate", "m.onnx", "none.onnx", cwd=folder), 2, "none.onnx")


def test_inspect(folder):
    done = run("inspect", "m.onnx", cwd=folder)
    assert done.returncode == 0 and "image: float [batch, 1, 8, 8]" in done.stdout, done.stderr
    found = json.loads(run("inspect", "m.onnx", "--json", cwd=folder).stdout)
    assert found["operators"]["Conv"] == 14 and found["opsets"] == {"ai.onnx": 17}
    assert found["size_bytes"] == DIGITS.stat().st_size
    assert sum(entry["bytes"] for entry in found["initializers"]) == sum(found["weight_bytes_by_type"].values())
    (folder / "bad.onnx").write_bytes(b"x")
    assert_fails(run("inspect", "bad.onnx", cwd=folder), 2, "bad.onnx")


def test_bench(folder):
    done = run("bench", "m.onnx", "m.onnx", "--runs", 10, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [entry["runs"] for entry in found["models"]] == [10, 10]
    assert found["models"][0]["ratio"] is None and found["models"][1]["ratio"] > 0
    assert all(entry["peak_memory_bytes"] > 1e5 and entry["load_ms"] > 0 for entry in found["models"])
    onnx.save(model("g (float[2] z) => (float[2] y) { y = Relu(z) }"), folder / "other.onnx")
    assert_fails(run("bench", "m.onnx", "other.onnx", cwd=folder), 2, "other.onnx", "image")


def test_view_serves_and_ends_on_interrupt(folder):
    pytest.importorskip("netron")
    import urllib.request

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "onnxcompress", "view", "m.onnx", "m.onnx", "--no-browser"]
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[0]
        with urllib.request.urlopen(url, timeout=20) as page:
            assert page.read().decode().count("<iframe") == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
    assert_fails(run("view", "none.onnx", cwd=folder), 2, "none.onnx")


def test_help_names_every_verb(tmp_path):
    text = run("--help", cwd=tmp_path).stdout
    assert all(verb in text for verb in ("optimize", "validate", "inspect", "bench", "view"))
    done = run(cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", text)


def test_a_reader_that_goes_away_is_no_error(folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m onnxcompress inspect m.onnx --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_closed_stream_is_no_error_and_its_number_goes_to_no_model(folder, stream):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"exec {sys.executable} -m onnxcompress optimize m.onnx -o x.onnx --no-latency {stream}>&-"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert ("equivalent" in done.stdout) == (stream != 1)
    onnx.checker.check_model(onnx.load(folder / "x.onnx"))


def test_an_interrupt_after_the_write_names_what_was_written(folder, monkeypatch, capsys):
    def interrupted(report):
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcompress.cli.optimize._print_table", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["optimize", str(folder / "m.onnx"), "-o", str(folder / "x.onnx"), "--no-latency"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == f"onnxcompress: interrupted; {folder / 'x.onnx'} had been written\n"


def test_the_spinner_is_gone_when_the_table_comes(folder):
    pty = pytest.importorskip("pty")
    lead, follow = pty.openpty()
    command = [sys.executable, "-m", "onnxcompress", "optimize", "m.onnx", "-o", "x.onnx", "--no-latency"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=follow, stderr=follow, stdin=follow)
    os.close(follow)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while block := os.read(lead, 1 << 16):
            shown += block
    os.close(lead)
    assert process.wait(timeout=60) == 0
    erase = b"\x1b[2K"
    spinner, table = shown.split(b"m.onnx -> x.onnx", 1)
    assert b"checking" in spinner and erase in spinner.rsplit(b"checking", 1)[1] and erase not in table
