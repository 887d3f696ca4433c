"""`onnxcompress compress` as a user meets it, on the embedded digits: goals, one line on stderr, nothing by halves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.cli import main, terminal
from onnxcompress.cli.terminal import print_rows
from onnxcompress.compression import attempts, compressing, meter, strategy
from onnxcompress.compression.describing import ATTEMPT_HEADER
from onnxcompress.compression.goal import parse_goal
from onnxcompress.compression.options import CompressOptions
from onnxcompress.compression.parts import Parts
from onnxcompress.compression.recipe import parse_recipe
from onnxcompress.cost import count
from onnxcompress.data import Dataset, load_data
from onnxcompress.testing import graph_of
from onnxcompress.validation.judge import input_specs

DIGITS = Path(__file__).parents[2] / "models" / "digits.onnx"


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """240 digits with labels in train.npz, 160 others in val.npz."""
    folder = tmp_path_factory.mktemp("digits")
    specs = input_specs(onnx.load(DIGITS))
    for name, source, number in (("train", "sklearn:digits:train", 240), ("val", "sklearn:digits", 160)):
        found = load_data(source, inputs=specs, limit=number)
        images = np.stack([sample[specs[0].name] for sample in found.samples])
        np.savez(folder / f"{name}.npz", **{specs[0].name: images, "labels": found.labels})
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("TIMING_S", "GOAL_TIMING_S", "LAST_TIMING_S"):
        monkeypatch.setattr(meter, name, 0.05)
    return tmp_path


def call(*arguments: str, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["compress", *map(str, arguments)])
    said = capsys.readouterr()
    return int(stop.value.code), said.out, said.err


def test_a_size_is_reached_within_a_drop(folder, samples, capsys):
    data = ["--data", samples / "train.npz", "--val", samples / "val.npz"]
    (folder / "fast.toml").write_text("goal = 'size=9x, drop=2%'\n[quantize]\npermut = 'none'\n")
    code, _, err = call(DIGITS, "fast.toml", "-o", "a.onnx", *data, capsys=capsys)
    assert code == 2 and "quantize has no setting 'permut'; did you mean 'permute'?" in err
    told = "permute = 'none'\nmethod = 'em'\nlimit = 64\n"
    (folder / "fast.toml").write_text(f"goal = 'size=9x, drop=2%'\n[quantize]\n{told}")
    code, out, err = call(
        DIGITS, "fast.toml", "-o", "a.onnx", *data, "--jobs", "1", "--json", "--report", "r.json", capsys=capsys
    )
    assert code == 0, err
    found, report = json.loads(out), json.loads((folder / "r.json").read_text())
    size = (folder / "a.onnx").stat().st_size
    assert size <= DIGITS.stat().st_size / 9 and found["after"]["size_bytes"] == size
    assert found["goal_met"] and found["after"]["drop"] <= 0.02 and found["after"]["criterion"] == "top1"
    assert found["samples"] == 160 and report["recipe"] == found["recipe"] and report["run"]["verb"] == "compress"
    assert sorted(path.name for path in folder.iterdir()) == ["a.onnx", "fast.toml", "r.json"]
    recipe = parse_recipe(report["recipe"])
    assert [step.verb for step in recipe.steps] == ["quantize"] and not recipe.settings


def test_macs_are_reached_and_a_run_that_was_stopped_goes_on(folder, samples, capsys, monkeypatch):
    """Stopped in its last step, it does that one alone; the recipe of its report gives the same bytes in one go."""
    monkeypatch.setattr(compressing, "has_torch", lambda: False)
    arguments = [DIGITS, "--data", samples / "train.npz", "--goal", "macs=0.3x, drop=5%"]
    calls: list[str] = []
    run_step = attempts.run_step

    def told(step, *rest):
        calls.append(step.verb)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_step(step, *rest)

    monkeypatch.setattr(attempts, "run_step", told)
    code, _, err = call(*arguments, "-o", "a.onnx", capsys=capsys)
    assert code == 130 and "resume with" in err and not (folder / "a.onnx").exists()
    kept = {path.name for path in (folder / "a.onnx.compress").iterdir()}
    assert {"settings.json", "step-01.json", "01-optimize.onnx", "fitting.npz", "deciding.npz"} <= kept

    code, _, err = call(*arguments[:-1], "macs=0.4x", "-o", "a.onnx", capsys=capsys)
    assert code == 2 and "another goal" in err and "--no-resume" in err
    code, out, err = call(*arguments, "-o", "a.onnx", "--report", "r.json", capsys=capsys)
    assert code == 0, err
    assert calls == ["optimize", "prune-width", "prune-width"]
    assert "60 samples of --data were kept back" in out and "without torch" in out and "top1 on 60 samples" in out
    before, after = (count(graph_of(onnx.load(path))).macs for path in (DIGITS, folder / "a.onnx"))
    assert after <= 0.3 * before
    assert sorted(path.name for path in folder.iterdir()) == ["a.onnx", "r.json"]
    (folder / "again.toml").write_text(json.loads((folder / "r.json").read_text())["recipe"])
    code, _, err = call(DIGITS, "-o", "b.onnx", "--goal", "again.toml", "-q", capsys=capsys)
    assert code == 0 and calls[3:] == ["prune-width"]
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


def test_what_is_out_of_reach_is_exit_code_1_and_the_nearest_is_named(folder, samples, capsys, monkeypatch):
    monkeypatch.setattr(compressing, "has_torch", lambda: False)
    monkeypatch.setattr(strategy, "BISECTIONS", 1)
    arguments = [DIGITS, "--data", samples / "train.npz", "--goal", "macs=0.01x", "-o", "a.onnx"]
    code, out, err = call(*arguments, "--report", "r.md", capsys=capsys)
    *steps, failure = err.splitlines()
    assert code == 1 and "macs=0.01x is out of reach; the nearest is macs 0." in failure
    assert steps[0].startswith("step 1, optimize: 239,")
    assert all(step.startswith(f"step {number}, ") for number, step in enumerate(steps, 1))
    assert "nothing was written" in out and "failed: " in out
    assert [path.name for path in folder.iterdir()] == ["r.md"]
    assert "not reached" in (folder / "r.md").read_text()


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_of_steps_keeps_its_figures_on_a_narrow_terminal(columns, monkeypatch, capsys):
    figures = ["439,846 (1.00x)", "4,136,384", "0.073 ms (1.00x)", "0.00%", "4"]
    step = "3 prune-depth stages=supernet,search,train epochs=4 lr=0.001 labels=true distill=true macs=1240915"
    monkeypatch.setattr(terminal, "width", lambda: columns)
    print_rows(ATTEMPT_HEADER, [[step, "0", *figures, "macs is 1,400,000, allowed 1,240,915"]], folded=(0, 7))
    out = capsys.readouterr().out
    assert all(figure in out for figure in figures) and "\u2026" not in out
    assert max(map(len, out.splitlines())) <= columns


def test_the_nearest_is_written_if_asked(folder, capsys):
    arguments = [DIGITS, "--data", "none", "--goal", "macs=0.1x", "-o", "a.onnx", "--nearest", "-q"]
    code, _, err = call(*arguments, capsys=capsys)
    assert code == 1 and "(optimize); it is in a.onnx" in err and err.count("\n") == 1
    before, after = (count(graph_of(onnx.load(path))).macs for path in (DIGITS, folder / "a.onnx"))
    assert f"macs {after / before:.3f}x" in err and after < before


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, samples, capsys):
    code, out, err = call(
        DIGITS, "--data", samples / "train.npz", "--goal", "macs=0.3x, drop=1%", "--dry-run", "--json", capsys=capsys
    )
    assert code == 0, err
    plan = json.loads(out)
    assert [step["verb"] for step in plan["steps"]][:3] == ["optimize", "prune-width", "prune-depth"]
    assert "bytes" in plan["steps"][0]["expected"] and "MACs" in plan["steps"][1]["expected"]
    assert all(step["why"] and step["when"] for step in plan["steps"])
    assert any("144 samples, it takes 512" in note for note in plan["notes"])  # 240 less those that judge and decide
    assert not list(folder.iterdir())


def test_without_data_there_are_exact_rewrites_and_what_that_means_is_said(folder, capsys):
    code, out, err = call(DIGITS, "--data", "none", "--goal", "size=1.5x, latency=1x", "-o", "a.onnx", capsys=capsys)
    assert code == 0, err
    assert "no drop can be measured" in out and "on made-up inputs" in out and "steps: optimize" in out
    assert (folder / "a.onnx").stat().st_size * 1.5 <= DIGITS.stat().st_size
    code, out, err = call(DIGITS, "--data", "none", "--goal", "macs=0.1x", "-o", "b.onnx", "--dry-run", capsys=capsys)
    assert code == 0 and "left to exact rewrites: pruning needs samples" in out


def test_too_few_samples_to_see_a_drop_are_a_note():
    judging = Dataset([{"x": np.zeros(1)}] * 16, None, "d", None, False)

    def notes(goal: str) -> list[str]:
        options = CompressOptions(goal=parse_goal(goal), data="d", val="v")
        return compressing._notes(options, Parts(judging=judging))

    assert notes("drop=5%") == [
        "16 samples judge, and one of them is 6.2%: to tell a drop of 5.0% from none takes more"
    ]
    assert not notes("drop=7%") and not notes("size=2x, drop=0%")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "none", "-o", "a.onnx"], "nothing to reach"),
        (["--goal", "size=2x", "-o", "a.onnx"], "--data none to go without"),
        (["--goal", "size=2x", "--data", "none"], "there is no output"),
        (["--goal", "size=2x, drop=1%", "--data", "none", "-o", "a.onnx"], "give --data or --val"),
        (["--goal", "none.toml", "--data", "none", "-o", "a.onnx"], "none.toml"),
        (["--goal", "size=2x", "--data", "sklearn:digits", "--limit", "9", "-o", "a.onnx"], "too few to be parted"),
        (["--goal", "size=2x", "--data", "none", "-o", "no/a.onnx"], "does not exist"),
        (["--goal", "size=2x", "--data", "none", "--dry-run", "--report", "r.md"], "--report is for a run"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, said, folder, capsys):
    code, out, err = call(DIGITS, *arguments, capsys=capsys)
    assert code == 2 and said in err and err.count("\n") == 1 and not out
    assert not list(folder.iterdir())
