"""One job on one model, in a process of its own because onnxruntime may abort it.

    python bench_judge.py JOB.json RESULT.json

A job names its kind and that function's arguments:

    inspect    nodes, bytes, interface and checker verdict of a file
    reference  inputs and outputs of the original, with onnxruntime's own noise and the model's sensitivity
    compare    another file on the same inputs, against those outputs
    latency    several files side by side, as ratios to the original

The reference is onnxruntime with its optimizations off; latency is measured with all of them on, as users run it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_inputs
import bench_model
import numpy as np
import onnx
import onnxruntime as ort

PERTURBATION = 1e-6  # relative change of every float input, for the sensitivity
WARMUP_RUNS = 3
ROUND_S = 0.004  # a model faster than this runs several times a round
MIN_ROUNDS, MAX_ROUNDS = 8, 400

Feed = dict[str, np.ndarray]


def open_session(path: str | Path, *, optimized: bool, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Sessions take turns in one process: the threads of the last one must not spin through the run of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def flatten(value: Any) -> list[np.ndarray]:
    """The arrays of one output, which may be a sequence or a map."""
    if isinstance(value, Mapping):
        return [array for key in sorted(value) for array in flatten(value[key])]
    if isinstance(value, list):
        return [array for item in value for array in flatten(item)]
    array = np.asarray(value)
    return [array.astype(np.str_) if array.dtype == object else array]


def run(session: ort.InferenceSession, feed: Feed, names: Sequence[str]) -> list[np.ndarray]:
    """The outputs by name, or by position where the names are not the original's."""
    own_inputs = {value.name for value in session.get_inputs()} | {
        value.name for value in session.get_overridable_initializers()
    }
    own_outputs = [value.name for value in session.get_outputs()]
    wanted = list(names) if set(names) <= set(own_outputs) else own_outputs
    values = session.run(wanted, {name: value for name, value in feed.items() if name in own_inputs})
    return [array for value in values for array in flatten(value)]


def relative_error(expected: np.ndarray, actual: np.ndarray) -> tuple[float | None, str | None]:
    """max|d| / max|y|, or what makes the two incomparable."""
    if expected.shape != actual.shape:
        return None, f"shape {list(expected.shape)} became {list(actual.shape)}"
    if expected.dtype.kind != actual.dtype.kind:
        return None, f"{expected.dtype} became {actual.dtype}"
    if np.array_equal(expected, actual):
        return 0.0, None
    if expected.dtype.kind in "US":
        return None, "strings differ"
    old, new = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(old)
    if not np.array_equal(finite, np.isfinite(new)) or not np.array_equal(old[~finite], new[~finite], equal_nan=True):
        return None, "infinities or NaN in other places"
    largest = float(np.abs(new[finite] - old[finite]).max(initial=0.0))
    scale = float(np.abs(old[finite]).max(initial=0.0))
    if largest and not scale:
        return None, f"max|d| is {largest:.1e} where all is zero"
    return (largest / scale if largest else 0.0), None


def worst_error(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> tuple[float | None, str | None]:
    """The worst of several outputs; a mismatch is worse than any number."""
    if len(expected) != len(actual):
        return None, f"{len(expected)} arrays became {len(actual)}"
    pairs = [relative_error(old, new) for old, new in zip(expected, actual, strict=True)]
    for position, (_, mismatch) in enumerate(pairs):
        if mismatch:
            return None, f"output {position}: {mismatch}"
    return max((error for error, _ in pairs if error is not None), default=0.0), None


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def save_case(path: Path, feed: Feed, outputs: Sequence[np.ndarray]) -> None:
    arrays: dict[str, Any] = {f"input_{i}": value for i, value in enumerate(feed.values())}
    arrays |= {f"output_{i}": value for i, value in enumerate(outputs)}
    np.savez(path, names=np.array(list(feed)), **arrays)


def load_case(path: Path) -> tuple[Feed, list[np.ndarray]]:
    with np.load(path, allow_pickle=False) as stored:
        feed = {str(name): stored[f"input_{i}"] for i, name in enumerate(stored["names"])}
        outputs = sum(name.startswith("output_") for name in stored.files)
        return feed, [stored[f"output_{i}"] for i in range(outputs)]


def perturbed(feed: Feed) -> Feed:
    rng = np.random.default_rng(0)
    return {
        name: (value * (1 + PERTURBATION * rng.choice([-1, 1], value.shape))).astype(value.dtype)
        if value.dtype.kind == "f"
        else value
        for name, value in feed.items()
    }


def worst_of(errors: Sequence[float | None]) -> float | None:
    """The largest, or None (incomparable) when there is nothing or one of them is None."""
    known = [error for error in errors if error is not None]
    return max(known) if known and len(known) == len(errors) else None


def reference(path: str, specs: dict[str, Any] | None, folder: str, threads: int) -> dict[str, Any]:
    """Run the original on every case, and keep inputs and outputs under ``folder``."""
    model = onnx.load(path, load_external_data=False)
    inputs = bench_model.interface_of(model)["inputs"]
    names = [value.name for value in model.graph.output]
    plain = open_session(path, optimized=False, threads=threads)
    optimized = open_session(path, optimized=True, threads=threads)
    kept: list[dict[str, Any]] = []
    dropped: dict[str, str] = {}
    for case in bench_inputs.cases(specs or bench_inputs.generic_specs(inputs), inputs):
        feed = bench_inputs.make_inputs(case["specs"], case["seed"])
        try:
            outputs = run(plain, feed, names)
        except Exception as error:  # onnxruntime's errors share no base; the case is dropped and reported
            dropped[case["label"]] = first_line(error)
            continue
        file = Path(folder) / f"case{len(kept)}.npz"
        save_case(file, feed, outputs)
        kept.append(
            {
                "label": case["label"],
                "file": str(file),
                "shapes": {name: list(value.shape) for name, value in feed.items()},
                "noise": worst_error(outputs, run(optimized, feed, names))[0],
                "sensitivity": worst_error(outputs, run(plain, perturbed(feed), names))[0],
            }
        )
        if len(kept) == 1:
            for i, value in enumerate(feed.values()):
                np.save(Path(folder) / f"input{i}.npy", value)
    return {
        "outputs": names,
        "cases": kept,
        "dropped": dropped,
        "noise": worst_of([case["noise"] for case in kept]),
        "sensitivity": worst_of([case["sensitivity"] for case in kept]),
        "samples": {name: str(Path(folder) / f"input{i}.npy") for i, name in enumerate(kept[0]["shapes"])}
        if kept
        else {},
    }


def compare(path: str, reference: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Run another file on the cases of ``reference``."""
    try:
        session = open_session(path, optimized=False, threads=threads)
    except Exception as error:  # as above; that it does not load is the finding
        return {"loads": False, "runs": False, "message": first_line(error), "cases": []}
    cases, message = [], None
    for case in reference["cases"]:
        feed, expected = load_case(Path(case["file"]))
        worst, mismatch = None, None
        try:
            worst, mismatch = worst_error(expected, run(session, feed, reference["outputs"]))
        except Exception as error:  # as above; that it does not run is the finding
            mismatch = f"does not run: {first_line(error)}"
        cases.append({"label": case["label"], "error": worst, "mismatch": mismatch})
        message = message or (f"{case['label']}: {mismatch}" if mismatch else None)
    return {
        "loads": True,
        "runs": not any((case["mismatch"] or "").startswith("does not run") for case in cases),
        "error": worst_of([case["error"] for case in cases]),
        "message": message,
        "cases": cases,
    }


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def latency(original: str, files: Mapping[str, str], case: str, threads: int, seconds: float) -> dict[str, Any]:
    """Time all files in one process, one after the other in an order that is drawn anew each round.

    The ratio of a file is original / file of the same round, so above 1 is faster than the original. "control" is the
    original loaded a second time: what its ratio does is what the machine does. ``ratio_fast`` compares the fastest
    tenths, which other work on the machine disturbs least.
    """
    feed, _ = load_case(Path(case))
    runs: dict[str, Callable[[], Any]] = {}
    for arm, path in {"original": original, "control": original, **files}.items():
        session = open_session(path, optimized=True, threads=threads)
        own = {name: value for name, value in feed.items() if name in {v.name for v in session.get_inputs()}}
        runs[arm] = lambda session=session, own=own: session.run(None, own)  # type: ignore[misc]
    warm = {arm: [seconds_of(call, 1) for _ in range(WARMUP_RUNS)] for arm, call in runs.items()}
    repeats = max(1, math.ceil(ROUND_S / min(warm["original"])))
    samples: dict[str, list[float]] = {arm: [] for arm in runs}
    rng = np.random.default_rng(0)
    deadline = time.perf_counter() + seconds
    while (done := len(samples["original"])) < MIN_ROUNDS or (done < MAX_ROUNDS and time.perf_counter() < deadline):
        for arm in rng.permutation(list(runs)):
            samples[arm].append(seconds_of(runs[arm], repeats))
    base = np.array(samples.pop("original"))
    result: dict[str, Any] = {"original_ms": float(np.median(base) * 1e3), "rounds": len(base), "repeats": repeats}
    result["arms"] = {}
    for arm, seconds_each in samples.items():
        p10, p50, p90 = np.quantile(base / np.array(seconds_each), [0.1, 0.5, 0.9])
        result["arms"][arm] = {
            "ratio_p10": float(p10),
            "ratio_p50": float(p50),
            "ratio_p90": float(p90),
            "ratio_fast": float(np.quantile(base, 0.1) / np.quantile(seconds_each, 0.1)),
            "median_ms": float(np.median(seconds_each) * 1e3),
        }
    return result


def inspect(path: str, before: bench_model.Interface | None = None) -> dict[str, Any]:
    """Facts about a file, and how its interface differs from ``before``."""
    facts = bench_model.facts(Path(path))
    return {"facts": facts, "interface": bench_model.compare_interfaces(before, facts["interface"]) if before else None}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "inspect": inspect,
    "reference": reference,
    "compare": compare,
    "latency": latency,
}


def main(arguments: Sequence[str]) -> int:
    job = json.loads(Path(arguments[0]).read_text())
    result = JOBS[job.pop("kind")](**job)
    Path(arguments[1]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
