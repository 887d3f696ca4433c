"""What a codebook file costs when it is loaded and run: time to load, memory, latency, in two settings of onnxruntime.

    python tools/bench_decoding.py ORIGINAL.onnx QUANTIZED.onnx [--threads 1] [--repeats 5]

folded      the default: onnxruntime decodes the weights once, while it loads the file
packed      optimization.constant_folding_max_output_size_in_bytes = 65536: weights stay indices and are decoded anew in
            each run, for machines that have less memory than time

Each figure is of a process of its own, which loads onnxruntime, the model, and runs it on a seeded input; memory is
what the process holds more after loading and running the model than before, peak the most that it held above that in
between. Runs take turns, medians are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

CHILD = """
import json, sys, time
import numpy as np, onnxruntime as ort

def resident(field="VmRSS:"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

path, packed, threads, seconds = sys.argv[1], sys.argv[2] == "packed", int(sys.argv[3]), float(sys.argv[4])
options = ort.SessionOptions()
options.intra_op_num_threads = threads
options.log_severity_level = 3
if packed:
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", "65536")
before, start = resident(), time.perf_counter()
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
load = time.perf_counter() - start
rng = np.random.default_rng(0)
feeds = {}
for value in session.get_inputs():
    shape = [size if isinstance(size, int) else 1 if axis == 0 else 64 for axis, size in enumerate(value.shape)]
    if "int" in value.type:
        feeds[value.name] = rng.integers(0, 2, shape).astype(value.type[7:-1])
    else:
        feeds[value.name] = rng.normal(size=shape).astype("float16" if "16" in value.type else "float32")
session.run(None, feeds)
held, peak = resident() - before, resident("VmHWM:") - before
times, end = [], time.perf_counter() + seconds
while len(times) < 5 or time.perf_counter() < end:
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
print(json.dumps({"load_ms": load * 1e3, "memory_mb": held / 1e6, "peak_mb": peak / 1e6,
    "latency_ms": sorted(times)[len(times) // 2] * 1e3}))
"""


def measure(path: str, setting: str, threads: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, path, setting, str(threads), str(seconds)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("quantized")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    arms = {
        "original": (arguments.original, "folded"),
        "codebooks, folded": (arguments.quantized, "folded"),
        "codebooks, packed": (arguments.quantized, "packed"),
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(arguments.repeats):
        for name, (path, setting) in arms.items():
            rows[name].append(measure(path, setting, arguments.threads, arguments.seconds))
    print(f"{'':20}{'load ms':>10}{'memory MB':>12}{'peak MB':>10}{'latency ms':>12}{'of the original':>17}")
    base = statistics.median(row["latency_ms"] for row in rows["original"])
    for name, found in rows.items():
        load, memory, peak, latency = (
            statistics.median(row[key] for row in found) for key in ("load_ms", "memory_mb", "peak_mb", "latency_ms")
        )
        print(f"{name:20}{load:10.0f}{memory:12.1f}{peak:10.1f}{latency:12.2f}{latency / base:16.2f}x")


if __name__ == "__main__":
    main()
