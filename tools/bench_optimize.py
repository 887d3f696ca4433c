"""Compare optimizers over a folder of .onnx models: what each one keeps, breaks, costs and gains.

    python tools/bench_optimize.py MODELS --manifest MANIFEST.json --peers-python PEERS/bin/python \\
        --cache work/bench/cache.json --markdown work/bench/report.md --json work/bench/report.json

Every arm runs on every model in a process of its own under a time limit, measured from outside (bench_process.py).
What it wrote is then inspected, run against the original and timed beside it, in processes of their own too
(bench_judge.py). With --cache a second call does only what is missing: ``--arms onnxcompress --force`` runs one arm
anew and reports it beside the stored ones. The manifest states inputs for models whose inputs cannot be guessed
(bench_inputs.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_peers
import bench_process
import bench_tables

# This process stays small (no numpy, no onnx): a child starts as a copy of it, and would inherit its memory peak.
SCHEMA = 3
TOOLS = Path(__file__).resolve().parent
REPOSITORY = TOOLS.parent
PROBE = """
import importlib.metadata, importlib.util, sys
name = sys.argv[1]
if importlib.util.find_spec(name) is None:
    sys.exit(1)
try:
    print(importlib.metadata.version(name))
except importlib.metadata.PackageNotFoundError:
    print("checkout")
"""


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Model:
    name: str
    path: Path
    sha256: str
    specs: dict[str, Any] | None

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.sha256[:8]}"


@dataclass
class Cache:
    """Records by file hash, written to disk after each one."""

    path: Path | None
    originals: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None) -> Cache:
        if path is None or not path.exists():
            return cls(path)
        stored = json.loads(path.read_text())
        if stored.get("schema") != SCHEMA:
            progress(f"{path}: schema {stored.get('schema')}, this version writes {SCHEMA}; starting afresh")
            return cls(path)
        return cls(path, stored["originals"], stored["arms"])

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"schema": SCHEMA, "originals": self.originals, "arms": self.arms}, indent=1))
        os.replace(partial, self.path)


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def find_models(folder: Path, manifest: Path | None, only: Sequence[str]) -> list[Model]:
    """The models of ``folder``: in the manifest's order where there is one, then the rest by name."""
    entries = {entry["name"]: entry for entry in json.loads(manifest.read_text())["models"]} if manifest else {}
    found = {path.stem: path for path in sorted(folder.glob("*.onnx"))}
    for name in [name for name in entries if name not in found]:
        progress(f"{name}: in the manifest, not in {folder}")
    names = [name for name in entries if name in found] + [name for name in found if name not in entries]
    if unknown := set(only) - set(names):
        raise ValueError(f"--models: no {', '.join(sorted(unknown))} in {folder}; there is {', '.join(names)}")
    return [
        Model(name, found[name].resolve(), sha256_of(found[name]), entries.get(name, {}).get("inputs"))
        for name in names
        if not only or name in only
    ]


class Bench:
    """Runs what the cache lacks."""

    def __init__(self, arguments: argparse.Namespace, cache: Cache, work: Path) -> None:
        self.arguments = arguments
        self.cache = cache
        self.work = work

    def python_of(self, arm: str) -> str:
        shared = self.arguments.peers_python if arm in bench_peers.PEERS else None
        return str(vars(self.arguments)[f"python_{arm.replace('-', '_')}"] or shared or sys.executable)

    def version_of(self, arm: str) -> str | None:
        """The version of the arm's package, or None when its Python has none."""
        package = bench_peers.distribution(arm)
        if package is None:
            return "control"
        with tempfile.TemporaryDirectory() as folder:
            cwd = REPOSITORY if arm in bench_peers.OURS else Path(folder)
            probe = bench_process.run_limited([self.python_of(arm), "-c", PROBE, package], limit_s=60, cwd=cwd)
        return probe.message if probe.ok else None

    def judge(self, kind: str, **job: Any) -> tuple[dict[str, Any] | None, str]:
        """Run one job of bench_judge.py: its result, or None and what went wrong."""
        with tempfile.TemporaryDirectory() as folder:
            job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
            job_file.write_text(json.dumps({"kind": kind, **job}))
            command = [sys.executable, str(TOOLS / "bench_judge.py"), str(job_file), str(result_file)]
            run = bench_process.run_limited(command, limit_s=self.arguments.judge_limit)
            if not run.ok:
                return None, f"{kind}: {run.failure}"
            return json.loads(result_file.read_text()), ""

    def original(self, model: Model) -> dict[str, Any]:
        """Facts and reference outputs of the untouched model."""
        record = self.cache.originals.get(model.sha256)
        if record and all(Path(case["file"]).exists() for case in record["reference"]["cases"]):
            return dict(record)
        progress(f"{model.name}: reference runs")
        inspected, failure = self.judge("inspect", path=str(model.path))
        if inspected is None:
            raise ValueError(f"{model.path}: {failure}")
        folder = self.work / model.folder / "reference"
        folder.mkdir(parents=True, exist_ok=True)
        reference, failure = self.judge(
            "reference",
            path=str(model.path),
            specs=model.specs,
            folder=str(folder),
            threads=self.arguments.threads,
        )
        if reference is None:
            reference = {
                "outputs": [],
                "cases": [],
                "dropped": {"every case": failure},
                "noise": None,
                "sensitivity": None,
                "samples": {},
            }
        self.cache.originals[model.sha256] = {"name": model.name, "facts": inspected["facts"], "reference": reference}
        self.cache.save()
        return dict(self.cache.originals[model.sha256])

    def target(self, model: Model, arm: str) -> Path:
        return self.work / model.folder / arm / f"{model.name}.onnx"

    def optimize(self, model: Model, arm: str, original: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Run one arm: the fastest repeat's times, the largest memory, and why there is no file."""
        target = self.target(model, arm)
        samples = {name: Path(path) for name, path in original["reference"]["samples"].items()}
        command = bench_peers.command(arm, self.python_of(arm), model.path, target, samples)
        runs: list[bench_process.Run] = []
        load = os.getloadavg()[0]
        for _ in range(self.arguments.repeats):
            shutil.rmtree(target.parent, ignore_errors=True)
            target.parent.mkdir(parents=True)
            cwd = REPOSITORY if arm in bench_peers.OURS else target.parent
            runs.append(bench_process.run_limited(command, limit_s=self.arguments.time_limit, cwd=cwd))
            if not runs[-1].ok:
                return runs[-1].as_dict(), runs[-1].failure
        best = min(runs, key=lambda run: run.wall_s).as_dict()
        best["peak_mb"] = max(run.peak_mb for run in runs)
        best["walls_s"] = [run.wall_s for run in runs]
        best["load"] = load  # of the machine, before: times taken beside other work are too long
        return best, None if target.exists() else f"exit code 0, but no file: {runs[-1].message}"

    def arm(self, model: Model, arm: str, original: Mapping[str, Any]) -> dict[str, Any]:
        """Everything about one arm on one model but its latency."""
        run, failure = self.optimize(model, arm, original)
        record: dict[str, Any] = {"arm": arm, "model": model.name, "optimize": run, "failure": failure}
        if failure:
            return record
        path = str(self.target(model, arm))
        inspected, failure = self.judge("inspect", path=path, before=original["facts"]["interface"])
        if inspected is None:
            return {**record, "failure": failure}
        compared, failure = self.judge(
            "compare", path=path, reference=original["reference"], threads=self.arguments.threads
        )
        if compared is None:
            compared = {"loads": False, "runs": False, "error": None, "message": failure, "cases": []}
        return {**record, **inspected, "compare": compared}

    def latency(self, model: Model, original: Mapping[str, Any], records: Mapping[str, dict[str, Any]]) -> None:
        """Time the given arms beside the original and write the ratios into their records."""
        files = {arm: str(self.target(model, arm)) for arm in records}
        load, cpus = os.getloadavg()[0], os.cpu_count() or 1
        busy = f" (load {load:.1f} on {cpus} CPUs: expect noise)" if load > cpus else ""
        progress(f"{model.name}: latency of {', '.join(files)}{busy}")
        result, failure = self.judge(
            "latency",
            original=str(model.path),
            files=files,
            case=original["reference"]["cases"][0]["file"],
            threads=self.arguments.threads,
            seconds=self.arguments.latency_seconds,
        )
        if result is None and len(records) > 1:  # find out whose file it was
            for arm, record in records.items():
                self.latency(model, original, {arm: record})
            return
        for arm, record in records.items():
            if result is None:
                record["latency"] = {"message": failure}
                continue
            shared: dict[str, Any] = {key: result[key] for key in ("original_ms", "rounds", "repeats")}
            control = {f"control_{p}": result["arms"]["control"][f"ratio_{p}"] for p in ("p10", "p50", "p90")}
            record["latency"] = {
                **result["arms"][arm],
                **shared,
                **control,
                "threads": self.arguments.threads,
                "load": load,
            }

    def run_model(self, model: Model, versions: Mapping[str, str]) -> None:
        original = self.original(model)
        for arm, version in versions.items():
            key = f"{model.sha256}/{arm}"
            if key in self.cache.arms and not self.arguments.force:
                continue
            record = {**self.arm(model, arm, original), "version": version}
            self.cache.arms[key] = record
            self.cache.save()
            run = record["optimize"]
            verdict = bench_tables.status(record, original)
            detail = f" ({bench_tables.shortened(bench_tables.remark(record, original))})" if verdict != "ok" else ""
            progress(f"{model.name}: {arm} {verdict}{detail}, {run['wall_s']:.1f} s, {run['peak_mb']:.0f} MB")
        if self.arguments.latency_seconds and original["reference"]["cases"]:
            keys = {arm: f"{model.sha256}/{arm}" for arm in versions}
            missing = {
                arm: self.cache.arms[key]
                for arm, key in keys.items()
                if bench_tables.usable(self.cache.arms[key], original)
                and self.target(model, arm).exists()
                and (self.arguments.force_latency or not self.cache.arms[key].get("latency"))
            }
            if missing:
                self.latency(model, original, missing)
                self.cache.save()


def stored_results(models: Sequence[Model], cache: Cache) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every arm of the cache with its records of these models, also those that this call did not run."""
    for arm in bench_peers.ARMS:
        records = {model.name: cache.arms.get(f"{model.sha256}/{arm}") for model in models}
        if any(records.values()):
            yield arm, {name: record for name, record in records.items() if record}


def report(models: Sequence[Model], cache: Cache) -> tuple[str, str, dict[str, Any]]:
    """The full Markdown, its summary table alone, and the same as data."""
    originals = {model.name: cache.originals[model.sha256] for model in models}
    results = dict(stored_results(models, cache))
    heading = f"Optimizers over {len(models)} models ({platform.machine()}, {os.cpu_count()} CPUs)"
    summary = {arm: bench_tables.summarize(records, originals) for arm, records in results.items()}
    rows = [bench_tables.summary_row(arm, own) for arm, own in summary.items()]
    data = {"schema": SCHEMA, "originals": originals, "summary": summary, "results": results}
    return (
        bench_tables.markdown(originals, results, heading),
        bench_tables.table(bench_tables.SUMMARY_HEADER, rows),
        data,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of .onnx files")
    parser.add_argument("--manifest", type=Path, help="JSON with input specs by model name")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these models of the folder")
    parser.add_argument("--arms", nargs="+", default=list(bench_peers.ARMS), choices=bench_peers.ARMS, metavar="ARM")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter that has the peers (default: this one)")
    for arm in bench_peers.ARMS:
        parser.add_argument(f"--python-{arm}", metavar="PATH", help=f"interpreter for {arm} alone")
    parser.add_argument("--cache", type=Path, help="JSON file that makes the run resumable")
    parser.add_argument("--work", type=Path, help="folder for outputs (default: files/ beside the cache)")
    parser.add_argument("--force", action="store_true", help="run the chosen arms again")
    parser.add_argument("--force-latency", action="store_true", help="time the chosen arms again")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each arm; the fastest counts (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="onnxruntime threads (default 2)")
    parser.add_argument("--latency-seconds", type=float, default=10.0, help="per model, 0 for none (default 10)")
    parser.add_argument(
        "--time-limit", type=float, default=300.0, help="seconds for one arm on one model (default 300)"
    )
    parser.add_argument("--judge-limit", type=float, default=300.0, help="seconds for one check (default 300)")
    parser.add_argument("--json", type=Path, dest="json_out", help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here; stdout then holds the summary alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        models = find_models(options.folder, options.manifest, options.models)
    except (OSError, ValueError, KeyError) as error:
        progress(f"{options.folder}: {error}")
        return 2
    if not models:
        progress(f"{options.folder}: no .onnx file")
        return 2
    cache = Cache.load(options.cache)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or (options.cache.parent / "files" if options.cache else Path(scratch))
        bench = Bench(options, cache, work.resolve())
        found = {arm: bench.version_of(arm) for arm in options.arms}
        versions = {arm: version for arm, version in found.items() if version}
        for arm in found.keys() - versions.keys():
            progress(f"{arm}: not found by {bench.python_of(arm)}, left out")
        for model in models:
            bench.run_model(model, versions)
    full, summary, data = report(models, cache)
    if options.json_out:
        options.json_out.write_text(json.dumps(data, indent=1))
    if options.markdown:
        options.markdown.write_text(full)
    print(summary if options.markdown else full)
    return 0


if __name__ == "__main__":
    sys.exit(main())
